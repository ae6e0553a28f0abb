# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The C++ kernels as other processors get them, and on more threads than the tests have."""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from vllm_sparse.kernels.cpu import build

FOLDER = Path(__file__).parent
FOR_ALL = (
    *("test_decode.py", "test_attention.py", "test_sparda_attention.py", "test_sparda_choose.py"),
    *("test_sparda_prefill.py", "test_sparda_select.py", "test_sparda_tokens.py"),
    "test_fp8.py",
)

ON_X86 = pytest.mark.skipif(
    platform.machine() != "x86_64" or build.find_compiler() is None,
    reason="needs a C++ compiler and an x86, for flags of other processors",
)


@ON_X86
@pytest.mark.parametrize(
    ("flags", "threads", "files"),
    [
        ("", 4, FOR_ALL),
        ("-mno-avx512f", 1, FOR_ALL),  # AVX2
        # Whatever the compiler makes of it.
        ("-mno-avx512f -mno-avx2 -mno-fma -mno-f16c", 1, FOR_ALL[:1]),
    ],
    ids=["threads", "avx2", "generic"],
)
def test_kernels_as_other_machines_run_them(flags, threads, files):
    """Their own tests once more; a compiler's flags and a team of threads last for a process."""
    environment = {**os.environ, build.FLAGS_ENV: flags, "OMP_NUM_THREADS": str(threads)}
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_ADDOPTS"):
        environment.pop(name, None)
    chosen = "cpu or fused"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-n0", "-k", chosen, "-m", "not vllm",
         "-p", "no:cacheprovider", *files],
        cwd=FOLDER, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
    assert " passed" in run.stdout


def assembly_of(folder, flags, function):
    """What the compiler makes of a function over `simd.h`."""
    source = folder / "function.cpp"
    source.write_text(f'#include "simd.h"\nextern "C" {function}\n')
    command = [
        *(
            *shlex.split(build.find_compiler()),
            "-O3",
            "-std=c++17",
            "-march=native",
            *flags.split(),
        ),
        *("-I", str(Path(build.__file__).parent), "-S", "-o", "-", str(source)),
    ]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@ON_X86
@pytest.mark.parametrize("flags", ["", "-mno-avx512fp16", "-mno-avx512f"])
@pytest.mark.parametrize(
    ("dtype", "only"), [("_Float16", "vcvtph2ps"), ("fp8", "vcvtph2ps"), ("bf16", "vpmovzxwd")]
)
def test_a_vector_of_numbers_is_widened_at_once(tmp_path, flags, dtype, only):
    """In parts, or one by one, it takes up to ten times as long, and only the time tells."""
    function = f"void widen(const {dtype}* p, float* to) {{ store(to, load(p)); }}"
    text = assembly_of(tmp_path, flags, function)
    conversions = re.findall(r"\b(?:v?cvt|vpmovzx|vinsert)\w+", text)
    assert conversions == [only], text


@ON_X86
@pytest.mark.parametrize("flags", ["", "-mno-avx512f"])
def test_a_number_in_all_lanes_takes_a_load(tmp_path, flags):
    function = "void fill(const float* p, float* to) { store(to, Dot<float>::broadcast(p).first); }"
    text = assembly_of(tmp_path, flags, function)
    assert "vbroadcastss" in text
    assert not re.search(r"v(add|sub)[ps]s", text), text
