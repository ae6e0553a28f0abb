# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Compiles Triton kernels for a GPU that is not there: the interpreter accepts what it does not."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


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
    tests = Path(__file__).parent.parent
    env["PYTHONPATH"] = f"{tests}{os.pathsep}{tests.parent}"
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


def machine_code(capability: int) -> None:
    """As :func:`compile_only`, but print what the machine code is like, as JSON.

    Args:
        capability: 80 or 90.
    """
    from triton.runtime import jit
    from vllm_sparse.kernels.triton import launch

    def compile_instead(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        facts = {
            "kernel": self.__name__,
            "programs": math.prod(grid),
            "warps": kernel.metadata.num_warps,
            "shared": kernel.metadata.shared,
            "most_registers": kernel.metadata.maxnreg,
            "waits": kernel.asm["ptx"].count("griddepcontrol.wait"),
            "overlapped": bool(kernel.metadata.launch_pdl),
            "counters": kernel.asm["ptx"].count("atom.global.gpu.acq_rel"),
            **_facts(kernel.asm["cubin"]),
        }
        print(json.dumps(facts), flush=True)

    _pretend(capability)
    run, jit.JITFunction.run = jit.JITFunction.run, compile_instead
    launch._SM80 = launch._SM90 if capability >= 90 else launch._SM80


def _facts(cubin: bytes) -> dict[str, Any]:
    """Registers, bytes of stack, instructions and barriers, and those of the loop over tiles."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

    def told(*command: str) -> str:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            Path(file.name).write_bytes(cubin)
            whole = [str(tools / command[0]), *command[1:], file.name]
            return subprocess.run(whole, capture_output=True, text=True, check=True).stdout

    usage = dict(re.findall(r"(\w+):(\d+)", told("cuobjdump", "--dump-resource-usage")))
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in told("nvdisasm", "-c").splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif re.match(r"\s+/\*[0-9a-f]{4,}\*/", line):
            code.append(line)
    loops = []
    for end, line in enumerate(code):
        target = re.search(r"BRA.*\(\s*(\.L_x_\d+)\)", line)
        if target and labels.get(target[1], end) < end:
            loops.append(code[labels[target[1]] : end + 1])
    # Tensor cores are used by tiles only; the innermost loop that does is the one over tiles.
    tiles = min((loop for loop in loops if _count(loop, "HMMA")), key=len, default=[])
    loads = [index for index, line in enumerate(code) if re.search(r"LDGSTS", line)]
    return {
        "registers": int(usage["REG"]),
        "stack": int(usage["STACK"]),
        "instructions": len(code),
        "barriers": _count(code, "BAR.SYNC"),
        "before_tiles": _count(code[: loads[0]], "BAR.SYNC") if loads else 0,
        "tile_instructions": len(tiles),
        "tile_barriers": _count(tiles, "BAR.SYNC"),
        "spills": _count(code, "STL") + _count(code, "LDL"),
        "tile_spills": _count(tiles, "STL") + _count(tiles, "LDL"),
        "tile_copies": _count(tiles, "LDGSTS"),
        "tile_copies_of_16": sum("LDGSTS" in line and ".128" in line for line in tiles),
    }


def _count(code: list[str], what: str) -> int:
    return sum(what in line for line in code)


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
