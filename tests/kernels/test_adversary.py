# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Kernels that are wrong in the ways that the interpreter alone does not notice, and are caught."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from support.kernels import DEVICE

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="a GPU needs no interpreter")


@pytest.fixture
def toys(_interpreter):
    """Imported where the interpreter has been chosen."""
    return importlib.import_module("support.toys")


@pytest.fixture
def broken(_interpreter, tmp_path, monkeypatch):
    """Makes a copy of a module of kernels in which some of the text is another."""

    def copy(name: str, *changes: tuple[str, str]):
        original = importlib.import_module(f"vllm_sparse.kernels.triton.{name}")
        text = Path(original.__file__).read_text()
        for old, new in changes:
            assert text.count(old) == 1, f"{name} has changed: break it in another way than {old!r}"
            text = text.replace(old, new)
        file = tmp_path / f"{name}_with_{len(changes)}_changes.py"
        file.write_text(text)
        spec = importlib.util.spec_from_file_location(file.stem, file)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, file.stem, module)
        spec.loader.exec_module(module)
        return module

    return copy


def test_the_copy_of_pieces_without_its_mask_is_caught(broken):
    """Of 12 words, of which a program copies 16."""
    store = "tl.store(target + begin + word, data, mask=inside)"
    last, first = torch.tensor([3]).int(), torch.tensor([1]).int()
    source, target, count = torch.randn(4, 12), torch.zeros(4, 12), torch.ones(1).int()
    broken("sparda_paging").copy_pieces(target, last, source, first, count)
    assert target[3].equal(source[1])
    assert not target[:3].any()
    wrong = broken("sparda_paging", (store, store.replace(", mask=inside", "")))
    with pytest.raises(Exception, match=r"a store of .* after the end of target"):
        wrong.copy_pieces(target, last, source, first, count)


def test_the_best_indices_in_places_from_a_counter_are_caught(broken):
    """Heads of a row that share a list, each behind whichever came before it."""
    score, taken = torch.randn(1, 4, 40), torch.zeros(1).int()
    sizes, counts = torch.tensor([40]).int(), torch.tensor([8]).int()
    listed = torch.zeros(1, 4, 8).int()
    arguments = (*score.stride()[:2], 4, 8)
    right = broken("topk")
    right._top_indices_kernel[(1, 4)](score, sizes, counts, listed, *arguments, BLOCK=64)
    assert listed.sort().values.equal(score.topk(8).indices.sort().values.int())
    wrong = broken(
        "topk",
        ("    sizes,\n    counts,\n    index_out,\n    stride_row,", (
            "    sizes,\n    counts,\n    index_out,\n    counter,\n    stride_row,"
        )),
        ("index_out += (row * heads + head) * width", "index_out += row * heads * width"),
        ("        taken = 0\n", "        taken = tl.atomic_add(counter, count)\n"),
    )  # fmt: skip
    with pytest.raises(Exception, match=r"top_indices_kernel leaves .* other bytes in index_out"):
        wrong._top_indices_kernel[(1, 4)](score, sizes, counts, listed, taken, *arguments, BLOCK=64)


def test_a_missing_mask_is_caught(toys):
    source, target = torch.arange(10.0), torch.zeros(10)
    toys.copy_kernel[(3,)](source, target, 10, MASKED=True, BLOCK=4)
    assert target.equal(source)
    with pytest.raises(Exception, match="a store of 4 bytes 1 bytes after the end of target"):
        toys.copy_kernel[(3,)](source, target, 10, MASKED=False, BLOCK=4)
    with pytest.raises(Exception, match=r"a load of 4 bytes .* source"):
        toys.copy_kernel[(3,)](
            source[2:6], target, 10, MASKED=True, BLOCK=4
        )  # the view ends before


def test_a_counter_that_hands_out_places_is_caught(toys):
    source, target, taken = torch.arange(-2.0, 6.0), torch.zeros(8), torch.zeros(1).int()
    toys.compact_kernel[(8,)](source, target, taken, ORDERED=True)
    with pytest.raises(Exception, match=r"compact_kernel leaves .* other bytes in target"):
        toys.compact_kernel[(8,)](source, target, taken, ORDERED=False)


def test_programs_that_read_each_other_s_results_are_caught(toys):
    with pytest.raises(Exception, match=r"scan_kernel leaves .* other bytes in values"):
        toys.scan_kernel[(6,)](torch.ones(7))


def test_a_lane_that_is_masked_off_holds_anything(toys):
    source, target = torch.ones(5), torch.zeros(1)
    toys.sum_kernel[(1,)](source, target, 5, OTHER=True, BLOCK=8)
    assert target.item() == 5
    toys.sum_kernel[(1,)](source, target, 5, OTHER=False, BLOCK=8)
    assert target.isnan()
    toys.sum_kernel[(1,)](source.long(), counted := target.long(), 5, OTHER=False, BLOCK=8)
    assert abs(counted.item()) > 1 << 20


def test_a_last_program_is_right_in_any_order(toys):
    target, counter = torch.zeros(1).int(), torch.zeros(1).int()
    toys.count_kernel[(7,)](target, counter)
    assert target.item() == counter.item() == 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32, torch.int64])
def test_memory_that_nobody_wrote_shows(dtype):
    given = torch.ones(2, dtype=dtype)
    for empty in (torch.empty(3, dtype=dtype), torch.empty_like(given), given.new_empty(4)):
        assert bool((empty != empty).all() if dtype.is_floating_point else (empty > 1 << 24).all())
