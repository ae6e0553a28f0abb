# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Compiles and loads the C++ kernels.

A plain C interface through ctypes needs no PyTorch headers, so the build takes seconds. The library
links to the OpenMP runtime that PyTorch has loaded (same soname) and shares its pinned threads.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

from vllm_sparse.errors import VllmSparseError
from vllm_sparse.paths import cache_dir

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""What the kernels call a dtype."""

_SOURCES = tuple(sorted(Path(__file__).parent.glob("*.cpp")))
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fno-math-errno", "-fPIC", "-shared")


class KernelBuildError(VllmSparseError, RuntimeError):
    """The C++ kernels could not be compiled."""


def sizes(name: str, fields: str) -> type[ctypes.Structure]:
    """The mirror of a C++ struct of 64-bit integers.

    Args:
        name: Name of both.
        fields: Names of the integers, in the order of the C++ struct, between spaces.
    """
    members = [(field, ctypes.c_int64) for field in fields.split()]
    return type(name, (ctypes.Structure,), {"_fields_": members})


def _cpu_fingerprint() -> str:
    """What ``-march=native`` depends on: a shared home folder may serve unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


@cache
def load() -> ctypes.CDLL:
    """Compile the kernels if this machine has not done so yet, and load them.

    Returns:
        The loaded library.

    Raises:
        KernelBuildError: No C++ compiler, or it failed.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise KernelBuildError(
            "no C++ compiler found (g++ or clang++, or set CXX); vLLM's CPU build needs one too"
        )
    headers = sorted(Path(__file__).parent.glob("*.h"))
    sources = b"".join(source.read_bytes() for source in (*_SOURCES, *headers))
    parts = (sources, compiler.encode(), " ".join(_FLAGS).encode(), _cpu_fingerprint().encode())
    digest = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    library = cache_dir() / "kernels" / f"kernels-{platform.machine()}-{digest}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        # Several workers may start at once: each builds under its own name, the last rename wins.
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            built = Path(folder) / "kernel.so"
            done = subprocess.run(
                [compiler, *_FLAGS, *map(str, _SOURCES), "-o", str(built)],
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                raise KernelBuildError(f"{compiler} failed:\n{done.stderr}")
            built.replace(library)
    kernels = ctypes.CDLL(str(library))
    pointer = ctypes.c_void_p
    kernels.vllm_sparse_decode.argtypes = (
        ctypes.c_int, *([pointer] * 10), ctypes.c_float, ctypes.c_int
    )  # fmt: skip
    kernels.vllm_sparse_attend_frames.argtypes = (ctypes.c_int, *([pointer] * 6), ctypes.c_float)
    kernels.vllm_sparse_attend_slots.argtypes = (ctypes.c_int, *([pointer] * 8), ctypes.c_float)
    kernels.vllm_sparse_attend_part.argtypes = (ctypes.c_int, *([pointer] * 7), ctypes.c_float)
    kernels.vllm_sparse_choose_blocks.argtypes = (ctypes.c_int, *([pointer] * 6), ctypes.c_float)
    kernels.vllm_sparse_select_blocks.argtypes = (ctypes.c_int, *([pointer] * 8))
    kernels.vllm_sparse_update_windows.argtypes = (ctypes.c_int, *([pointer] * 7))
    number = ctypes.c_int64
    for name, arguments in (
        ("resolve", (pointer, pointer, number, *([pointer] * 6))),
        ("copy", (*([pointer] * 5), number)),
        ("write_tokens", (pointer,) * 7),
        ("record_queries", (pointer,) * 5),
    ):
        function = getattr(kernels, f"vllm_sparse_{name}")
        function.argtypes, function.restype = arguments, None
    return kernels
