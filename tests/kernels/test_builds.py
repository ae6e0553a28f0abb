# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The C++ kernels as other processors get them, and on more threads than the tests have."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from vllm_sparse.kernels.cpu import build

FOLDER = Path(__file__).parent
FOR_ALL = (
    *("test_decode.py", "test_attention.py", "test_sparda_attention.py", "test_sparda_choose.py"),
    *("test_sparda_prefill.py", "test_sparda_select.py", "test_sparda_tokens.py"),
)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="flags of other processors")
@pytest.mark.skipif(build.find_compiler() is None, reason="needs a C++ compiler")
@pytest.mark.parametrize(
    ("flags", "threads", "files"),
    [
        ("", 4, FOR_ALL),
        ("-mno-avx512f", 1, FOR_ALL),  # AVX2
        ("-mno-avx512f -mno-avx2 -mno-fma", 1, FOR_ALL[:1]),  # whatever the compiler makes of it
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
        [sys.executable, "-m", "pytest", "-q", "-x", "-n0", "-k", chosen, "-p", "no:cacheprovider",
         *files],
        cwd=FOLDER, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
    assert " passed" in run.stdout
