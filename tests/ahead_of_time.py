# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Compiles Triton kernels for a GPU that is not there: the interpreter accepts what it does not."""

from __future__ import annotations

import os
import subprocess
import sys


def compiled(file: str, capability: int, cache_dir: object) -> list[str]:
    """Run a test file as a program that launches its kernels after :func:`compile_only`.

    Args:
        file: The file, given the capability as its argument.
        capability: 80 or 90.
        cache_dir: Where Triton keeps what it compiled.

    Returns:
        A line for each compiled kernel: its name and the bytes of shared memory.
    """
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(cache_dir)
    result = subprocess.run(
        [sys.executable, file, str(capability)],
        env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout.splitlines()


def compile_only(capability: int) -> None:
    """Make every launch in this process compile down to machine code, and print a line for it."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver, jit
    from vllm_sparse.kernels.triton import launch

    class NoGPU:
        """Stands in for the CUDA driver."""

        def get_current_target(self):
            return GPUTarget("cuda", capability, 32)

        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

    def compile_instead(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        assert kernel.asm["cubin"]
        print(self.__name__, kernel.metadata.shared, flush=True)

    driver.set_active(NoGPU())
    run, jit.JITFunction.run = jit.JITFunction.run, compile_instead
    launch.multiprocessors = lambda device: 132
    launch._SM80 = launch._SM90 if capability >= 90 else launch._SM80
