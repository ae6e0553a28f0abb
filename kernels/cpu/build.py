# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Compiles and loads the C++ kernels.

A plain C interface through ctypes needs no PyTorch headers, so the build takes seconds. The library
links to the OpenMP runtime that PyTorch has loaded (same soname) and shares its pinned threads.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm_sparse.kernels.fp8 import FP8

from vllm_sparse.errors import VllmSparseError
from vllm_sparse.paths import CACHE_ENV, cache_dir

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, FP8: 3}
"""What the kernels call a dtype."""

# int, 64-bit number, float or pointer.
_ARGUMENTS = {
    "vllm_sparse_decode": "ipppppppppppfffi",
    "vllm_sparse_attend_frames": "ippppppff",
    "vllm_sparse_attend_slots": "ipppppppppfff",
    "vllm_sparse_attend_part": "ipppppppf",
    "vllm_sparse_choose_blocks": "ippppppf",
    "vllm_sparse_select_blocks": "ipppppppp",
    "vllm_sparse_update_windows": "ipppppppf",
    "vllm_sparse_resolve": "pppppppnp",
    "vllm_sparse_copy": "pppppn",
    "vllm_sparse_write_tokens": "ppppppppppff",
    "vllm_sparse_record_queries": "ppppp",
    "vllm_sparse_threads": "",
}
_SOURCES = tuple(sorted(Path(__file__).parent.glob("*.cpp")))
_FLAGS = (
    *("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fno-math-errno", "-fPIC", "-shared"),
    "-Wfatal-errors",  # of a compiler that cannot do it, the first error says why
)
# As simd.h has it: vectors are shuffled with GCC 12, _Float16 is there in C++ with 12 or 13.
_LEAST_GCC = 12 if platform.machine() in ("x86_64", "AMD64") else 13
_CANDIDATES = ("g++", *(f"g++-{version}" for version in range(15, _LEAST_GCC - 1, -1)), "clang++")
logger = logging.getLogger("vllm.sparse")
FLAGS_ENV = "VLLM_SPARSE_CXXFLAGS"


class KernelBuildError(VllmSparseError, RuntimeError):
    """The C++ kernels could not be compiled, or not be loaded."""


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


def _run(compiler: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command that may have words of its own, as of ``ccache g++``."""
    try:
        return subprocess.run(
            [*shlex.split(compiler), *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
    except (OSError, ValueError) as error:
        raise KernelBuildError(
            f"the C++ compiler {compiler!r} cannot be run ({error}); set CXX to the command of one"
        ) from error


def _is_new_enough(compiler: str) -> bool:
    try:
        version = _run(compiler, "-dumpversion").stdout.partition(".")[0].strip()
    except KernelBuildError:  # it cannot be run; another one may
        return False
    return "clang" in Path(compiler).name or (version.isdigit() and int(version) >= _LEAST_GCC)


def find_compiler() -> str | None:
    """The command of the C++ compiler that would build the kernels: ``$CXX``, or what is found.

    If nothing is new enough, that is an older one, which will say so.
    """
    asked = os.environ.get("CXX", "").strip()
    if asked:
        return asked
    found = [shlex.quote(path) for path in map(shutil.which, _CANDIDATES) if path]
    return next(filter(_is_new_enough, found), next(iter(found), None))


def _flags() -> tuple[str, ...]:
    """Ours, then those that the environment adds: of a sanitizer, for example."""
    return (*_FLAGS, *shlex.split(os.environ.get(FLAGS_ENV, "")))


def compiled_path(compiler: str) -> Path:
    """Where these sources are, or will be, compiled for this machine.

    Raises:
        KernelBuildError: The compiler cannot be run.
    """
    headers = sorted(Path(__file__).parent.glob("*.h"))
    sources = b"".join(source.read_bytes() for source in (*_SOURCES, *headers))
    # What else the result depends on: a folder may outlive an upgrade, or serve unlike machines.
    texts = (
        *(compiler, _run(compiler, "--version").stdout, " ".join(_flags())),
        *(_cpu_fingerprint(), " ".join(platform.libc_ver())),
    )
    digest = hashlib.sha256(b"\0".join((sources, *map(str.encode, texts)))).hexdigest()[:16]
    return cache_dir() / "kernels" / f"kernels-{platform.machine()}-{digest}.so"


def _compile(compiler: str, library: Path) -> None:
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        # Several workers may start at once: each builds under its own name, the last rename wins.
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            built = Path(folder) / "kernel.so"
            done = _run(compiler, *_flags(), *map(str, _SOURCES), "-o", str(built))
            if done.returncode:
                raise KernelBuildError(f"{compiler} failed:\n{done.stderr}")
            built.replace(library)
    except OSError as error:
        raise KernelBuildError(
            f"the folder of compiled kernels cannot be written ({error}); mend it, or set "
            f"{CACHE_ENV} to a folder that can"
        ) from error


def _open(compiler: str) -> ctypes.CDLL:
    library = compiled_path(compiler)
    with contextlib.suppress(OSError):  # not there, or not whole: compiled anew
        return ctypes.CDLL(str(library))
    _compile(compiler, library)
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise KernelBuildError(
            f"the compiled kernels cannot be loaded ({error}); if their file system forbids to "
            f"execute files, set {CACHE_ENV} to a folder of another one"
        ) from error


@cache
def load() -> ctypes.CDLL:
    """Compile the kernels if this machine has not done so yet, and load them.

    Returns:
        The loaded library.

    Raises:
        KernelBuildError: No C++ compiler, or it failed; or its library cannot be kept or loaded.
    """
    compiler = find_compiler()
    if compiler is None:
        raise KernelBuildError(
            f"no C++ compiler found: install g++ {_LEAST_GCC} or later, or name one in CXX; "
            "vLLM's CPU build needs one too"
        )
    kernels = _open(compiler)
    kinds = {"i": ctypes.c_int, "n": ctypes.c_int64, "f": ctypes.c_float, "p": ctypes.c_void_p}
    for name, arguments in _ARGUMENTS.items():
        getattr(kernels, name).argtypes = [kinds[kind] for kind in arguments]
    # PyTorch first, which sets this thread's team when it is asked.
    threads, ours = torch.get_num_threads(), kernels.vllm_sparse_threads()
    if ours != threads:
        logger.warning(
            "The C++ kernels run on %d threads where PyTorch has %d: %s links to another OpenMP "
            "runtime than PyTorch's, which is GCC's. Set CXX to a g++.",
            *(ours, threads, compiler),
        )
    return kernels


def call(
    name: str,
    tensors: Iterable[Tensor | None],
    *further: Any,
    dtype: torch.dtype | None = None,
) -> None:
    """Call a kernel.

    Args:
        name: Its name in C++, without the prefix that all have.
        tensors: Whose addresses it gets first; ``None`` becomes a null pointer.
        *further: What it gets after them. Structures are passed by their addresses.
        dtype: Of the tensors, which a kernel that supports several gets before everything else.

    Raises:
        ValueError: The kernel does not support that dtype, or heads of this size.
    """
    pointers = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    others = [ctypes.byref(x) if isinstance(x, ctypes.Structure) else x for x in further]
    function = getattr(load(), f"vllm_sparse_{name}")
    if dtype is None:
        function(*pointers, *others)
    elif function(DTYPES.get(dtype, -1), *pointers, *others):
        raise ValueError(f"the CPU kernel {name} does not support {dtype}, or heads of this size")
