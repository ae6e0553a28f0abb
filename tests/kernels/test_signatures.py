# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Implementations of a kernel are in files of one name and take the same arguments."""

from __future__ import annotations

import importlib
import inspect
from itertools import combinations
from pathlib import Path

import pytest
import vllm_sparse.kernels.reference

FOLDERS = ("reference", "cpu", "triton")
ROOT = Path(vllm_sparse.kernels.reference.__path__[0]).parent


def functions(folder: str, name: str) -> dict[str, inspect.Signature]:
    """Public functions that a module defines itself."""
    pytest.importorskip("triton")
    module = importlib.import_module(f"vllm_sparse.kernels.{folder}.{name}")
    return {
        key: inspect.signature(value)
        for key, value in vars(module).items()
        if inspect.isfunction(value)
        and not key.startswith("_")
        and value.__module__ == module.__name__
    }


def names(folder: str) -> set[str]:
    return {path.stem for path in (ROOT / folder).glob("*.py")} - {"__init__"}


@pytest.mark.parametrize(("first", "second"), list(combinations(FOLDERS, 2)))
def test_functions_of_one_name_have_one_signature(first, second):
    shared = names(first) & names(second)
    assert any(name.startswith("sparda_") for name in shared)
    for name in sorted(shared):
        one, other = functions(first, name), functions(second, name)
        both = one.keys() & other.keys()
        assert both, f"{name}.py of {first} and {second} have nothing in common"
        for key in both:
            assert one[key] == other[key], f"{name}.{key} in {first} and {second}"


# How kernels are built, sized and launched: there is nothing to compare.
HELPERS = {
    "cpu/build": None, "cpu/memory": None, "triton/grid": None, "triton/launch": None,
    "triton/counters": None, "triton/attention": {"make_shares", "attend_grid", "merged_at_once"},
    "triton/decode": {"decode_scratch_bytes"}, "triton/pages": {"pages_at_once", "score_shares"},
    "triton/sparda_scores": {"score_blocks"},  # a part of sparda_select
}  # fmt: skip


@pytest.mark.parametrize("folder", ["cpu", "triton"])
def test_every_kernel_has_a_reference(folder):
    for name in names(folder):
        there = functions("reference", name) if name in names("reference") else {}
        missing = functions(folder, name).keys() - there.keys()
        known = HELPERS.get(f"{folder}/{name}", set())
        assert known is None or missing == known, f"{folder}/{name}.py"
