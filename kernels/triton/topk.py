# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Top-k by a search on float bits, then compaction in order: no sort, no host, fixed shapes.

Ties: entries equal to the smallest selected score are taken from the lowest index until the count
is reached, as in ``policies.votes.top_indices``. Minus zero equals zero; NaN, which the
reference excludes, ranks by its bits and still gives exactly ``count`` entries.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from vllm_sparse.kernels.triton.launch import launch


@triton.jit
def sort_key(score):
    """Unsigned integers in the order of the floats ``score``."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    sign = (bits >> 31).to(tl.uint32, bitcast=True)
    return bits.to(tl.uint32, bitcast=True) ^ (sign | 0x80000000)


@triton.jit
def place_of(
    index, inside, table, first,
    STRIDE: tl.constexpr, PER_BLOCK: tl.constexpr, BY_TABLE: tl.constexpr,
):  # fmt: skip
    """Where entries are that lie in blocks.

    Args:
        index: Of the entries.
        inside: Which of the blocks exist.
        table: Pointer to the blocks, if they are looked up ``BY_TABLE``.
        first: The first block.
        STRIDE: From one block to the next.
        PER_BLOCK: Entries of a block; 0 if entries are contiguous.
        BY_TABLE: See ``table``.
    """
    if PER_BLOCK == 0:
        return index
    if BY_TABLE:
        block = tl.load(table + index // PER_BLOCK, mask=inside, other=0)
    else:
        block = index // PER_BLOCK
    return (first + block) * STRIDE + index % PER_BLOCK


@triton.jit
def radix_threshold(
    score, size, count, BLOCK: tl.constexpr, table=None, first=0,
    STRIDE: tl.constexpr = 0, PER_BLOCK: tl.constexpr = 0, BY_TABLE: tl.constexpr = False,
):  # fmt: skip
    """Key of the ``count``-th largest of ``score[:size]`` and how many equal keys are selected.

    Each of four passes counts the next eight bits of the keys that match the bits found so far.

    Args:
        score: Pointer to float32.
        size: At least 1.
        count: 1 to ``size``.
        BLOCK: Entries per iteration.
        table, first, STRIDE, PER_BLOCK, BY_TABLE: Where scores lie, see :func:`place_of`.
    """
    digits = tl.arange(0, 256)
    prefix = (count * 0).to(tl.uint32)
    room = count
    for step in tl.static_range(4):
        histogram = tl.zeros([256], tl.int32)
        for start in range(0, size, BLOCK):
            index = start + tl.arange(0, BLOCK)
            counted = index < size
            place = place_of(index, counted, table, first, STRIDE, PER_BLOCK, BY_TABLE)
            key = sort_key(tl.load(score + place, mask=counted, other=0.0))
            if step > 0:
                counted &= (key >> (32 - 8 * step)) == prefix
            digit = ((key >> (24 - 8 * step)) & 255).to(tl.int32)
            histogram += tl.histogram(digit, 256, mask=counted)
        next_bits, room, _ = digit_of(histogram, digits, room)
        prefix = (prefix << 8) | next_bits.to(tl.uint32)
    return prefix, room


@triton.jit
def digit_of(histogram, digits, room):
    """The digit of the ``room``-th largest entry.

    Args:
        histogram: Entries with each digit.
        digits: The digits, ascending.
        room: 1 to the number of entries.

    Returns:
        The digit, how many entries with it are among the largest, and how many there are.
    """
    above = tl.cumsum(histogram, 0, reverse=True) - histogram
    found = (above + histogram >= room) & (above < room)
    room -= tl.sum(tl.where(found, above, 0), 0)
    return (
        tl.sum(tl.where(found, digits, 0), 0),
        room,
        tl.sum(tl.where(found, histogram, 0), 0),
    )


@triton.jit
def tile_threshold(score, inside, size, count):
    """Key of the ``count``-th largest score, and how many equal keys are selected, in registers.

    A search by four bits, which ends as soon as the bits found separate ``count`` keys from the
    rest: after three or four steps of eight, unless scores are equal.

    Args:
        score: float32 ``[BLOCK]``; at least as many entries as the program has threads.
        inside: Entries that exist, ``[BLOCK]``.
        size: How many exist.
        count: 1 to ``size``.
    """
    key = sort_key(score)
    digits = tl.arange(0, 16)
    prefix = (count * 0).to(tl.uint32)
    room = count
    here = size  # keys that match the bits found so far, of which so many are selected
    left = count * 0 + 32
    while (left > 0) & (here != room):
        left -= 4
        top = key >> left.to(tl.uint32)
        matches = inside & ((top >> 4) == prefix)
        histogram = tl.histogram((top & 15).to(tl.int32), 16, mask=matches)
        digit, room, here = digit_of(histogram, digits, room)
        prefix = (prefix << 4) | digit.to(tl.uint32)
    # The lowest of the selected keys, of which only some may be selected.
    lowest = tl.where(left < 32, prefix << (left & 31).to(tl.uint32), prefix)
    threshold = tl.min(tl.where(inside & (key >= lowest), key, 0xFFFFFFFF), 0)
    return threshold, count - tl.sum((inside & (key > threshold)).to(tl.int32), 0)


@triton.jit
def choose(score, inside, threshold, room, tied_before):
    """Which entries of a tile are selected.

    Args:
        score: float32 ``[BLOCK]``.
        inside: Entries that exist, ``[BLOCK]``.
        threshold: Sort key of the lowest entry that is selected.
        room: Entries equal to the threshold that are selected.
        tied_before: Entries of earlier tiles that equal the threshold.

    Returns:
        ``chosen [BLOCK]``, ``lowest [BLOCK]`` (the lowest-ranked selected entry), ``tied_after``.
    """
    key = sort_key(score)
    tied = inside & (key == threshold)
    ones = tied.to(tl.int32)
    rank = tied_before + tl.cumsum(ones, 0) - ones
    chosen = (inside & (key > threshold)) | (tied & (rank < room))
    return chosen, tied & (rank == room - 1), tied_before + tl.sum(ones, 0)


# Prompts are of any length, which must not compile variants.
@triton.jit(do_not_specialize=["stride_row", "stride_head", "width"])
def _top_indices_kernel(
    score,
    sizes,
    counts,
    index_out,
    stride_row,
    stride_head,
    heads,
    width,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    size = tl.load(sizes + row)
    count = tl.minimum(tl.minimum(tl.load(counts + row), size), width)
    score += row * stride_row + head.to(tl.int64) * stride_head
    index_out += (row * heads + head) * width
    if count > 0:
        threshold, room = radix_threshold(score, size, count, BLOCK)
        taken = 0
        tied = 0
        for start in range(0, size, BLOCK):
            index = start + tl.arange(0, BLOCK)
            inside = index < size
            tile = tl.load(score + index, mask=inside, other=0.0)
            chosen, _, tied = choose(tile, inside, threshold, room, tied)
            ones = chosen.to(tl.int32)
            tl.store(index_out + taken + tl.cumsum(ones, 0) - ones, index, mask=chosen)
            taken += tl.sum(ones, 0)
    for start in range(tl.maximum(count, 0), width, BLOCK):
        index = start + tl.arange(0, BLOCK)
        tl.store(index_out + index, tl.full([BLOCK], -1, tl.int32), mask=index < width)


def top_indices(score: Tensor, sizes: Tensor, counts: Tensor, max_count: int) -> Tensor:
    """Same contract as :func:`vllm_sparse.kernels.reference.topk.top_indices`."""
    rows, heads = score.shape[:2]
    assert score.dtype == torch.float32
    assert score.stride(-1) == 1
    index = torch.empty(rows, heads, max_count, dtype=torch.int32, device=score.device)
    if not index.numel():
        return index
    block, warps, stages = launch("top_indices", score.device)
    _top_indices_kernel[(rows, heads)](
        score,
        sizes,
        counts,
        index,
        score.stride(0),
        score.stride(1),
        heads,
        max_count,
        BLOCK=block,
        num_warps=warps,
        num_stages=stages,
    )
    return index
