# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Kernels that are wrong in the ways that the interpreter alone does not notice, and are caught."""

from __future__ import annotations

import importlib

import pytest
import torch
from support.kernels import DEVICE

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="a GPU needs no interpreter")


@pytest.fixture
def toys(_interpreter):
    """Imported where the interpreter has been chosen."""
    return importlib.import_module("support.toys")


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
