# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""No file is longer than one can read, and one page says where everything is."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES, TESTS = 400, 500


@pytest.mark.parametrize(
    ("folder", "limit"),
    [("vllm_sparse", MODULES), ("kernels", MODULES), ("benchmarks", MODULES), ("scripts", MODULES),
     ("tests", TESTS)],
)  # fmt: skip
def test_files_are_short(folder, limit):
    files = [path for kind in ("*.py", "*.cpp", "*.h") for path in (ROOT / folder).rglob(kind)]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    assert len(lengths) > 5
    assert {name: length for name, length in lengths.items() if length > limit} == {}


def test_the_page_on_architecture_names_every_part():
    page = (ROOT / "docs" / "architecture.md").read_text()
    parts = [path for path in (ROOT / "vllm_sparse").iterdir() if path.name[0] not in "_."]
    names = {path.name + "/" * path.is_dir() for path in parts} - {"py.typed"}
    assert {name for name in names if f"`{name}" not in page} == set()
