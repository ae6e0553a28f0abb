# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Compiles Triton kernels for a GPU that is not there: the interpreter accepts what it does not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def compiled(file: str, what: object, cache_dir: object) -> list[str]:
    """Run a test file as a program that launches its kernels without a GPU.

    Args:
        file: The file, which calls :func:`compile_only` or :func:`name_only`.
        what: Its argument.
        cache_dir: Where Triton keeps what it compiled.

    Returns:
        What it printed, a line for each kernel.
    """
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(cache_dir)
    env["PYTHONPATH"] = str(Path(__file__).parent.parent)
    result = subprocess.run(
        [sys.executable, file, str(what)],
        env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout.splitlines()


def compile_only(capability: int) -> None:
    """Make every launch in this process compile down to machine code.

    Each prints a line: the kernel, its bytes of shared memory, its asynchronous copies of 16 bytes.

    Args:
        capability: 80 or 90.
    """
    from triton.runtime import jit
    from vllm_sparse.kernels.triton import launch

    def compile_instead(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        assert kernel.asm["cubin"]
        copies = kernel.asm["ptx"].count("cp.async.cg")  # always 16 bytes
        print(self.__name__, kernel.metadata.shared, copies, flush=True)

    _pretend(capability)
    run, jit.JITFunction.run = jit.JITFunction.run, compile_instead
    launch._SM80 = launch._SM90 if capability >= 90 else launch._SM80


def name_only() -> None:
    """Make every launch in this process compile nothing.

    Each prints a line if it would have had to compile: the kernel and what sets the variant apart.
    """
    from triton import knobs

    def name(*, key, fn, **_):
        if key not in seen:
            seen.add(key)
            print(fn.name, key, flush=True)
        return True

    seen: set[str] = set()
    _pretend(90)
    knobs.runtime.jit_cache_hook = name


def _pretend(capability: int) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from vllm_sparse.kernels.triton import launch

    class NoGPU:
        """Stands in for the CUDA driver."""

        def get_current_target(self):
            return GPUTarget("cuda", capability, 32)

        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

    driver.set_active(NoGPU())
    launch.multiprocessors = lambda device: 132
    launch.capability = lambda device: (capability // 10, capability % 10)
