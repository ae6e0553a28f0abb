# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Small kernels, some of them wrong on purpose; see ``tests/kernels/test_adversary.py``."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def copy_kernel(source, target, count, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    if MASKED:
        tl.store(target + index, tl.load(source + index, mask=inside), mask=inside)
    else:
        tl.store(target + index, tl.load(source + index, mask=inside))


@triton.jit
def compact_kernel(source, target, taken, ORDERED: tl.constexpr):
    """Lists what is positive: where it stands, or behind whatever came before."""
    index = tl.program_id(0)
    value = tl.load(source + index)
    if value > 0:
        place = index
        if not ORDERED:
            place = tl.atomic_add(taken, 1)
        tl.store(target + place, value)


@triton.jit
def scan_kernel(values):
    """Each program adds what the one before has left."""
    index = tl.program_id(0) + 1
    tl.store(values + index, tl.load(values + index) + tl.load(values + index - 1))


@triton.jit
def sum_kernel(source, target, count, OTHER: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    if OTHER:
        values = tl.load(source + index, mask=index < count, other=0)
    else:
        values = tl.load(source + index, mask=index < count)
    tl.store(target, tl.sum(values, 0))


@triton.jit
def count_kernel(target, counter):
    """The last program to arrive says how many there were: right in any order."""
    if tl.atomic_add(counter, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tl.store(target, tl.load(counter))
