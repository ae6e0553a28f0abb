# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Stage 2: page scores from channel-major extrema, then the tokens to attend to."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor
from vllm_sparse.kernels.triton.launch import (
    MOST_SHARES,
    dim_block,
    launch,
    row_block,
    split_kernel,
)
from vllm_sparse.kernels.triton.ops import dot, share_of
from vllm_sparse.kernels.triton.topk import choose, radix_threshold, tile_threshold
from vllm_sparse.kernels.types import PageScores

if TYPE_CHECKING:
    from vllm_sparse.kernels.layout import PageLayout


# How wide a table is changes from step to step, which must not compile variants.
@triton.jit(do_not_specialize=["width", "least", "stride_table"])
def _score_pages_kernel(
    cache,
    query,
    table,
    lengths,
    top_r,
    logits,
    peak_out,
    mass_out,
    top_k,
    width,
    least,
    stride_block,
    stride_head,
    stride_query_row,
    stride_query_head,
    stride_table,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    PAGES: tl.constexpr = BLOCK_SIZE // PAGE
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    length = tl.load(lengths + row)
    channels = tl.load(top_r + row)
    if (length <= 0) | (length <= top_k) | (channels <= 0):
        return
    newest = (length - 1) // PAGE
    member = tl.arange(0, BLOCK_M)
    member_inside = member < GROUP
    first_head = row * (HEADS * GROUP) + head * GROUP
    part = (first_head + member) * tl.num_programs(2) + tl.program_id(2)
    begin, last = share_of(newest + 1, least, 2, BLOCK_P)
    if begin >= last:  # before the work that a share without pages has no use for
        tl.store(peak_out + part, tl.full([BLOCK_M], float("-inf"), tl.float32), mask=member_inside)
        tl.store(mass_out + part, tl.zeros([BLOCK_M], tl.float32), mask=member_inside)
        return
    dim = tl.arange(0, BLOCK_D)
    dim_inside = dim < DIM
    b_q = tl.load(
        query
        + row * stride_query_row
        + (head * GROUP + member)[:, None] * stride_query_head
        + dim[None, :],
        mask=member_inside[:, None] & dim_inside[None, :],
        other=0.0,
    )
    q = b_q.to(tl.float32)

    # The channels with the largest group magnitude, ties to the lower channel.
    magnitude = tl.where(dim_inside, tl.sum(tl.abs(q), 0), -1.0)
    larger = magnitude[:, None] > magnitude[None, :]
    tied_before = (magnitude[:, None] == magnitude[None, :]) & (dim[:, None] < dim[None, :])
    rank = tl.sum((larger | tied_before).to(tl.int32), 0)
    kept = (rank < channels) & dim_inside
    upper = tl.sum(q, 0) > 0
    channel = tl.where(upper, dim + DIM, dim)
    selected = tl.where(kept[None, :], q, 0.0)
    norm = tl.sum(tl.abs(q), 1)
    ratio = tl.sum(tl.abs(selected), 1) / tl.where(norm > 0, norm, 1.0)
    temperature = tl.where(norm > 0, tl.sqrt(DIM * ratio), 1.0)
    b_selected = tl.where(kept[None, :], b_q, 0.0).to(b_q.dtype)

    base = cache + head.to(tl.int64) * stride_head
    table += row * stride_table
    # The stored extrema of the newest page may already hold tokens that come later.
    newest_base = base + tl.load(table + newest // PAGES).to(tl.int64) * stride_block
    low = tl.full([BLOCK_D], float("inf"), tl.float32)
    high = tl.full([BLOCK_D], float("-inf"), tl.float32)
    end = tl.where(dim_inside, length, 0)
    for offset in tl.static_range(PAGE):
        slot = newest * PAGE + offset
        key = newest_base + slot % BLOCK_SIZE * (2 * DIM) + dim
        b_k = tl.load(key, mask=slot < end, other=0.0).to(tl.float32)
        low = tl.where(slot < end, tl.minimum(low, b_k), low)
        high = tl.where(slot < end, tl.maximum(high, b_k), high)
    bound = tl.where(dim_inside, tl.where(upper, high, low), 0.0)
    newest_logit = tl.sum(selected * bound[None, :], 1)

    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK_M], tl.float32)
    for start in range(begin, last, BLOCK_P):
        page = start + tl.arange(0, BLOCK_P)
        inside = page < last
        # Whole blocks, or a channel's pages could not be loaded as vectors. What was loaded from
        # the newest page on is not used.
        there = page // PAGES <= newest // PAGES
        block = tl.load(table + page // PAGES, mask=there, other=0).to(tl.int64)
        source = block * stride_block + BLOCK_SIZE * 2 * DIM + page % PAGES
        # Channels that are not kept are masked: their bytes stay where they are.
        b_bound = tl.load(
            base + channel[:, None] * PAGES + source[None, :],
            mask=kept[:, None] & there[None, :],
            other=0.0,
        )  # [BLOCK_D, BLOCK_P]
        logit = dot(b_selected, b_bound)
        logit = tl.where((page == newest)[None, :], newest_logit[:, None], logit)
        logit = logit / temperature[:, None]
        target = (first_head + member)[:, None] * width + page[None, :]
        tl.store(logits + target, logit, mask=member_inside[:, None] & inside[None, :])
        logit = tl.where(inside[None, :], logit, float("-inf"))
        highest = tl.maximum(peak, tl.max(logit, 1))
        tokens = tl.where(page == newest, length - newest * PAGE, PAGE).to(tl.float32)
        mass = mass * tl.exp(peak - highest)
        mass += tl.sum(tl.exp(logit - highest[:, None]) * tokens[None, :], 1)
        peak = highest
    tl.store(peak_out + part, peak, mask=member_inside)
    tl.store(mass_out + part, mass, mask=member_inside)


def score_pages(
    cache: Tensor,
    query: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    top_r: Tensor,
    *,
    layout: PageLayout,
    top_k: int,
) -> PageScores:
    """Same contract as :func:`vllm_sparse.kernels.reference.pages.score_pages`."""
    rows, heads, dim = query.shape
    kv_heads, device = cache.shape[1], cache.device
    assert query.stride(-1) == block_table.stride(-1) == cache.stride(-1) == 1
    assert cache.stride(-2) == cache.shape[-1], "a page must be one contiguous run"
    width = block_table.shape[1] * layout.pages_per_block
    (block, warps, stages), (shares, least) = split_kernel(
        "score_pages", rows * kv_heads, width, dim, cache.dtype, device
    )
    query = query.to(cache.dtype)
    logits = torch.empty(rows, heads, width, dtype=torch.float32, device=device)
    peak, mass = (
        torch.empty(rows, heads, shares, dtype=torch.float32, device=device) for _ in range(2)
    )
    if rows:
        _score_pages_kernel[(rows, kv_heads, shares)](
            cache,
            query,
            block_table,
            lengths,
            top_r,
            logits,
            peak,
            mass,
            top_k,
            width,
            least,
            cache.stride(0),
            cache.stride(1),
            query.stride(0),
            query.stride(1),
            block_table.stride(0),
            HEADS=kv_heads,
            GROUP=heads // kv_heads,
            DIM=dim,
            BLOCK_SIZE=layout.block_size,
            PAGE=layout.page_size,
            BLOCK_M=row_block(heads // kv_heads),
            BLOCK_P=block,
            BLOCK_D=dim_block(dim),
            num_warps=warps,
            num_stages=stages,
        )
    return PageScores(logits, peak, mass)


@triton.jit
def _probabilities(
    logits, peaks, masses, page, inside, width, shares,
    GROUP: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """Softmax over tokens per query head, summed over the group."""
    share = tl.arange(0, MOST)
    there = share < shares
    probability = tl.zeros(page.shape, tl.float32)
    for member in tl.static_range(GROUP):
        peak = tl.load(peaks + member * shares + share, mask=there, other=float("-inf"))
        mass = tl.load(masses + member * shares + share, mask=there, other=0.0)
        highest = tl.max(peak, 0)
        part = 1.0 / tl.sum(mass * tl.exp(peak - highest), 0)
        logit = tl.load(logits + member * width + page, mask=inside, other=float("-inf"))
        probability += tl.exp(logit - highest) * part
    return probability


@triton.jit
def _store_pages(
    slots, table, page, tokens, written,
    BLOCK_SIZE: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Appends the first ``tokens`` slots of each page; returns how many are written by then."""
    PAGES: tl.constexpr = BLOCK_SIZE // PAGE
    position = written + tl.cumsum(tokens, 0) - tokens
    block = tl.load(table + page // PAGES, mask=tokens > 0, other=0)
    slot = block * BLOCK_SIZE + page % PAGES * PAGE
    for offset in tl.static_range(PAGE):
        tl.store(slots + position + offset, slot + offset, mask=offset < tokens)
    return written + tl.sum(tokens, 0)


@triton.jit
def _take_at_once(
    logits, peaks, masses, slots, table, pages, count, last, width, shares,
    GROUP: tl.constexpr, BLOCK_SIZE: tl.constexpr, PAGE: tl.constexpr, MOST: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Up to ``TILE`` pages: their probabilities never leave the registers."""
    page = tl.arange(0, TILE)
    inside = page < pages
    probability = _probabilities(logits, peaks, masses, page, inside, width, shares, GROUP, MOST)
    threshold, room = tile_threshold(probability, inside, pages, count)
    chosen, lowest, _ = choose(probability, inside, threshold, room, 0)
    tokens = tl.where(chosen, tl.where(lowest, last, PAGE), 0)
    return _store_pages(slots, table, page, tokens, 0, BLOCK_SIZE, PAGE)


@triton.jit
def _take_in_passes(
    logits, peaks, masses, probability, slots, table, pages, count, last, width, shares,
    GROUP: tl.constexpr, BLOCK_SIZE: tl.constexpr, PAGE: tl.constexpr, MOST: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Any number of pages."""
    for start in range(0, pages, TILE):
        page = start + tl.arange(0, TILE)
        inside = page < pages
        tile = _probabilities(logits, peaks, masses, page, inside, width, shares, GROUP, MOST)
        tl.store(probability + page, tile, mask=inside)
    tl.debug_barrier()  # other threads of this program read them
    threshold, room = radix_threshold(probability, pages, count, TILE)
    tied = 0
    written = 0
    for start in range(0, pages, TILE):
        page = start + tl.arange(0, TILE)
        inside = page < pages
        tile = tl.load(probability + page, mask=inside, other=0.0)
        chosen, lowest, tied = choose(tile, inside, threshold, room, tied)
        tokens = tl.where(chosen, tl.where(lowest, last, PAGE), 0)
        written = _store_pages(slots, table, page, tokens, written, BLOCK_SIZE, PAGE)
    return written


@triton.jit(do_not_specialize=["width", "shares", "capacity", "stride_table"])
def _select_slots_kernel(
    logits,
    peaks,
    masses,
    table,
    lengths,
    top_r,
    probability,
    slots,
    top_k,
    width,
    shares,
    capacity,
    stride_table,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    MOST: tl.constexpr,
):
    PAGES: tl.constexpr = BLOCK_SIZE // PAGE
    SMALL: tl.constexpr = BLOCK // 4
    MIDDLE: tl.constexpr = BLOCK // 2
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    length = tl.load(lengths + row)
    pair = row * HEADS + head
    table += row * stride_table
    slots += pair * capacity
    if (length <= 0) | (tl.load(top_r + row) <= 0):
        return
    if length <= top_k:
        for start in range(0, length, SMALL):
            token = start + tl.arange(0, SMALL)
            inside = token < length
            block = tl.load(table + token // BLOCK_SIZE, mask=inside, other=0)
            tl.store(slots + token, block * BLOCK_SIZE + token % BLOCK_SIZE, mask=inside)
        return

    newest = (length - 1) // PAGE
    from_newest = tl.minimum(length - newest * PAGE, top_k)
    rest = top_k - from_newest
    written = 0
    if rest > 0:
        peaks += pair * GROUP * shares
        masses += pair * GROUP * shares
        logits += pair * GROUP * width
        count = tl.cdiv(rest, PAGE)
        last = rest - (count - 1) * PAGE  # tokens of the lowest-ranked page
        if newest <= SMALL:
            written = _take_at_once(
                logits, peaks, masses, slots, table, newest, count, last, width,
                shares, GROUP, BLOCK_SIZE, PAGE, MOST, SMALL,
            )  # fmt: skip
        elif newest <= MIDDLE:
            written = _take_at_once(
                logits, peaks, masses, slots, table, newest, count, last, width,
                shares, GROUP, BLOCK_SIZE, PAGE, MOST, MIDDLE,
            )  # fmt: skip
        elif newest <= BLOCK:
            written = _take_at_once(
                logits, peaks, masses, slots, table, newest, count, last, width,
                shares, GROUP, BLOCK_SIZE, PAGE, MOST, BLOCK,
            )  # fmt: skip
        else:
            written = _take_in_passes(
                logits, peaks, masses, probability + pair * width, slots, table, newest, count,
                last, width, shares, GROUP, BLOCK_SIZE, PAGE, MOST, SMALL,
            )  # fmt: skip
    block = tl.load(table + newest // PAGES)
    offset = tl.arange(0, PAGE)
    slot = block * BLOCK_SIZE + newest % PAGES * PAGE + offset
    tl.store(slots + written + offset, slot, mask=offset < from_newest)


def select_slots(
    scores: PageScores,
    block_table: Tensor,
    lengths: Tensor,
    top_r: Tensor,
    *,
    layout: PageLayout,
    top_k: int,
    kv_heads: int,
    out: Tensor | None = None,
) -> Tensor:
    """Same contract as :func:`vllm_sparse.kernels.reference.pages.select_slots`.

    One program per row and KV head. Pages with equal probability: the lower one is taken first,
    see :mod:`vllm_sparse.kernels.triton.topk`. The slots are written to ``out`` if it is given.
    """
    rows, heads, width = scores.logits.shape
    device = scores.logits.device
    capacity = min(top_k, block_table.shape[1] * layout.block_size)
    slots = out
    if slots is None:
        slots = torch.empty(rows, kv_heads, capacity, dtype=torch.int32, device=device)
    assert slots.shape == (rows, kv_heads, capacity)
    assert slots.is_contiguous()
    probability = torch.empty(rows, kv_heads, width, dtype=torch.float32, device=device)
    block, warps, stages = launch("select_slots", device)
    if rows:
        _select_slots_kernel[(rows, kv_heads)](
            *(t.contiguous() for t in scores), block_table, lengths, top_r, probability, slots,
            top_k, width, scores.peak.shape[-1], capacity, block_table.stride(0),
            HEADS=kv_heads, GROUP=heads // kv_heads, BLOCK_SIZE=layout.block_size,
            PAGE=layout.page_size, BLOCK=block, MOST=MOST_SHARES,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return slots
