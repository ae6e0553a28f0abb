# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Which slots the scored pages of one row and KV head give; for one program."""

from __future__ import annotations

import triton
import triton.language as tl
from vllm_sparse.kernels.triton import launch
from vllm_sparse.kernels.triton.topk import (
    choose,
    place_of,
    radix_threshold,
    sort_key,
    tile_threshold,
)

LOG2_E = tl.constexpr(launch.LOG2_E)


@triton.jit
def take_all(slots, table, length, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    """Lists the slots of a row that is short enough to be read whole."""
    for start in range(0, length, TILE):
        token = start + tl.arange(0, TILE)
        inside = token < length
        block = tl.load(table + token // BLOCK_SIZE, mask=inside, other=0)
        tl.store(slots + token, block * BLOCK_SIZE + token % BLOCK_SIZE, mask=inside)


@triton.jit
def _store_weights(
    weights, peaks, masses, shares, used,
    GROUP: tl.constexpr, BLOCK_G: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """Stores what makes a logit, base 2, the logarithm of a probability, for each query head."""
    member = tl.arange(0, BLOCK_G)
    share = tl.arange(0, MOST)[None, :]
    there = (member < GROUP)[:, None] & (share < used)
    at = member[:, None] * shares + share
    peak = tl.load(peaks + at, mask=there, other=float("-inf"))
    mass = tl.load(masses + at, mask=there, other=0.0)
    highest = tl.max(peak, 1)
    total = tl.sum(mass * tl.exp2((peak - highest[:, None]) * LOG2_E), 1)
    tl.store(weights + member, -highest * LOG2_E - tl.log2(total), mask=member < GROUP)
    tl.debug_barrier()  # other threads of this program read them


@triton.jit
def _probabilities(scores, weights, place, inside, GROUP: tl.constexpr, PAGES: tl.constexpr):
    """Softmax over tokens per query head, summed over the group."""
    probability = tl.zeros(place.shape, tl.float32)
    for member in tl.static_range(GROUP):
        logit = tl.load(scores + member * PAGES + place, mask=inside, other=float("-inf"))
        probability += tl.exp2(logit * LOG2_E + tl.load(weights + member))
    return probability


@triton.jit
def _store_pages(
    slots, table, page, tokens, position,
    BLOCK_SIZE: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Stores the first ``tokens`` slots of each page, from ``position`` on."""
    PAGES: tl.constexpr = BLOCK_SIZE // PAGE
    block = tl.load(table + page // PAGES, mask=tokens > 0, other=0)
    slot = block * BLOCK_SIZE + page % PAGES * PAGE
    for offset in tl.static_range(PAGE):
        tl.store(slots + position + offset, slot + offset, mask=offset < tokens)


@triton.jit
def _take_at_once(
    scores, row_blocks, weights, slots, table, pages, count, last,
    HEADS: tl.constexpr, GROUP: tl.constexpr, BLOCK_SIZE: tl.constexpr, PAGE: tl.constexpr,
    TILE: tl.constexpr, PRIVATE: tl.constexpr,
):  # fmt: skip
    """Up to ``TILE`` pages: their probabilities never leave the registers."""
    PAGES: tl.constexpr = BLOCK_SIZE // PAGE
    STRIDE: tl.constexpr = HEADS * (GROUP + 1) * PAGES
    page = tl.arange(0, TILE)
    inside = page < pages
    place = place_of(page, inside, table, row_blocks, STRIDE, PAGES, PRIVATE)
    probability = _probabilities(scores, weights, place, inside, GROUP, PAGES)
    threshold, room = tile_threshold(probability, inside, pages, count)
    key = sort_key(probability)
    above = (inside & (key > threshold)).to(tl.int32)
    tied = (inside & (key == threshold)).to(tl.int32)
    # Both at once: passes over all threads are what takes time. Neither exceeds 16 bits.
    both = (above << 16) | tied
    before = tl.cumsum(both, 0) - both
    rank = before & 0xFFFF  # among those that tie, of which the first few are chosen
    position = ((before >> 16) + tl.minimum(rank, room)) * PAGE
    position -= tl.where(rank >= room, PAGE - last, 0)  # behind the page that is taken in part
    tokens = tl.where(tied > 0, tl.where(rank == room - 1, last, PAGE), PAGE * above)
    tokens = tl.where((tied > 0) & (rank >= room), 0, tokens)
    _store_pages(slots, table, page, tokens, position, BLOCK_SIZE, PAGE)
    return (count - 1) * PAGE + last


@triton.jit
def _take_in_passes(
    scores, row_blocks, weights, slots, table, pages, count, last,
    HEADS: tl.constexpr, GROUP: tl.constexpr, BLOCK_SIZE: tl.constexpr, PAGE: tl.constexpr,
    TILE: tl.constexpr, PRIVATE: tl.constexpr,
):  # fmt: skip
    """Any number of pages."""
    PAGES: tl.constexpr = BLOCK_SIZE // PAGE
    STRIDE: tl.constexpr = HEADS * (GROUP + 1) * PAGES
    probability = scores + GROUP * PAGES
    for start in range(0, pages, TILE):
        page = start + tl.arange(0, TILE)
        inside = page < pages
        place = place_of(page, inside, table, row_blocks, STRIDE, PAGES, PRIVATE)
        tile = _probabilities(scores, weights, place, inside, GROUP, PAGES)
        tl.store(probability + place, tile, mask=inside)
    tl.debug_barrier()  # other threads of this program read them
    threshold, room = radix_threshold(
        probability, pages, count, TILE, table, row_blocks, STRIDE, PAGES, PRIVATE
    )
    tied = 0
    written = 0
    for start in range(0, pages, TILE):
        page = start + tl.arange(0, TILE)
        inside = page < pages
        place = place_of(page, inside, table, row_blocks, STRIDE, PAGES, PRIVATE)
        tile = tl.load(probability + place, mask=inside, other=0.0)
        chosen, lowest, tied = choose(tile, inside, threshold, room, tied)
        tokens = tl.where(chosen, tl.where(lowest, last, PAGE), 0)
        position = written + tl.cumsum(tokens, 0) - tokens
        _store_pages(slots, table, page, tokens, position, BLOCK_SIZE, PAGE)
        written += tl.sum(tokens, 0)
    return written


@triton.jit
def take_pages(
    scores, row_blocks, peaks, masses, weights, slots, table, length, top_k, shares, used,
    HEADS: tl.constexpr, GROUP: tl.constexpr, BLOCK_SIZE: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_G: tl.constexpr, MOST: tl.constexpr, TILE: tl.constexpr, PRIVATE: tl.constexpr,
):  # fmt: skip
    """Lists ``top_k`` slots: of the best pages, in ascending order, then of the newest one.

    Args:
        scores: Where those of the KV head are in the first block of scratch, see :mod:`.pages`.
        row_blocks: See :func:`.pages.select_slots`'s kernel.
        peaks: Of its query heads' shares.
        masses: Of its query heads' shares.
        weights: Scratch, a number for each of its query heads.
        slots: Written.
        table: The row's blocks.
        length: Its tokens, more than ``top_k``.
        top_k: Tokens to select.
        shares: Of a query head, at most.
        used: How many there are.
        HEADS: KV heads.
        GROUP: Query heads of each.
        BLOCK_SIZE: Tokens of a block.
        PAGE: Tokens of a page.
        BLOCK_G: ``GROUP`` rounded up.
        MOST: ``shares`` at most.
        TILE: Pages that fit the registers.
        PRIVATE: Blocks of scratch go by blocks of the cache.
    """
    PAGES: tl.constexpr = BLOCK_SIZE // PAGE
    newest = (length - 1) // PAGE
    from_newest = tl.minimum(length - newest * PAGE, top_k)
    rest = top_k - from_newest
    written = 0
    if rest > 0:
        count = tl.cdiv(rest, PAGE)
        last = rest - (count - 1) * PAGE  # tokens of the lowest-ranked page
        _store_weights(weights, peaks, masses, shares, used, GROUP, BLOCK_G, MOST)
        if newest <= TILE // 4:
            written = _take_at_once(
                scores, row_blocks, weights, slots, table, newest, count, last,
                HEADS, GROUP, BLOCK_SIZE, PAGE, TILE // 4, PRIVATE,
            )  # fmt: skip
        elif newest <= TILE // 2:
            written = _take_at_once(
                scores, row_blocks, weights, slots, table, newest, count, last,
                HEADS, GROUP, BLOCK_SIZE, PAGE, TILE // 2, PRIVATE,
            )  # fmt: skip
        elif newest <= TILE:
            written = _take_at_once(
                scores, row_blocks, weights, slots, table, newest, count, last,
                HEADS, GROUP, BLOCK_SIZE, PAGE, TILE, PRIVATE,
            )  # fmt: skip
        else:
            written = _take_in_passes(
                scores, row_blocks, weights, slots, table, newest, count, last,
                HEADS, GROUP, BLOCK_SIZE, PAGE, TILE // 4, PRIVATE,
            )  # fmt: skip
    block = tl.load(table + newest // PAGES)
    offset = tl.arange(0, PAGE)
    slot = block * BLOCK_SIZE + newest % PAGES * PAGE + offset
    tl.store(slots + written + offset, slot, mask=offset < from_newest)
