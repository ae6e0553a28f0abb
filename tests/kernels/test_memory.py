# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Huge pages for a CPU's cache."""

from __future__ import annotations

import mmap

import pytest
import torch
from support.memory import advice_of
from vllm_sparse.kernels.cpu.memory import back_with_huge_pages

HUGE = 2 << 20


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="Linux's")
def test_only_the_tensor_s_own_memory_is_moved():
    """What lies whole within it; before and behind it are its neighbours."""
    memory = torch.frombuffer(mmap.mmap(-1, 6 * HUGE), dtype=torch.uint8)
    memory.copy_(torch.arange(len(memory), dtype=torch.int32).remainder(251))
    before, page = memory.clone(), memory.data_ptr() % HUGE
    first = HUGE - page + 4096  # not at the border of a huge page
    tensor = memory[first : first + 3 * HUGE]
    back_with_huge_pages(tensor)
    advised = back_with_huge_pages(tensor, at_once=False)
    assert torch.equal(memory, before)
    if not advised:
        pytest.skip("this kernel has no huge pages")
    inside = memory[2 * HUGE - page :][:1], memory[4 * HUGE - page - 1 :][:1]
    outside = memory[HUGE - page :][:1], memory[4 * HUGE - page :][:1]
    assert all("hg" in advice_of(part) for part in inside)
    assert not any("hg" in advice_of(part) for part in outside)


def test_what_is_small_stays():
    assert not back_with_huge_pages(torch.zeros(1000))
    assert not back_with_huge_pages(torch.zeros(2, 3 * HUGE, dtype=torch.uint8)[:, ::2])
