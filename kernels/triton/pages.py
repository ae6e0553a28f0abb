# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Stage 2: scores pages by the channel-major index, then lists the tokens to attend to.

One launch does both: the program that is the last one to score pages of a row and KV head selects.
Scores lie in scratch in blocks, ``[planes, blocks, G, H / G + 1, pages]``: estimated logits of each
query head, and room for probabilities. A plane is as large as the cache, and of a request's rows
each has its own, or as wide as the table, and each row has its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor
from vllm_sparse.kernels.fp8 import FP8
from vllm_sparse.kernels.triton import launch as launches
from vllm_sparse.kernels.triton.choose import take_all, take_pages
from vllm_sparse.kernels.triton.grid import (
    count_in,
    let_next_start,
    most_registers,
    programs_at_once,
    wait_for_previous,
    whole_waves,
)
from vllm_sparse.kernels.triton.launch import (
    MOST_SHARES,
    dim_block,
    launch,
    overlaps,
    row_block,
)
from vllm_sparse.kernels.triton.ops import dot, share_of, shares_used

if TYPE_CHECKING:
    from vllm_sparse.kernels.layout import PageLayout
    from vllm_sparse.kernels.types import Probes


@triton.jit
def _score_pages(
    base, table, scores, row_blocks, query, extreme, scale, newest_logit, begin, end, length,
    stride_block,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    PAGE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
    PRIVATE: tl.constexpr,
):  # fmt: skip
    """Scores pages ``begin`` to ``end`` of one row and KV head.

    Args:
        base: The KV head in the cache.
        table: The row's blocks.
        scores: Where those of the KV head are in the first block of scratch.
        row_blocks: The row's first block in scratch, or that of its plane if ``PRIVATE``.
        query: The first of its queries, cut down to the channels that are read.
        extreme: Its channels, see :class:`vllm_sparse.kernels.types.Probes`.
        scale: The first factor of its logits.
        newest_logit: The first estimate of its newest page.
        begin: Page.
        end: Page behind the last one.
        length: Tokens of the row.
        stride_block: Of the cache.
        HEADS: KV heads.
        GROUP: Query heads of each.
        DIM: Head size.
        BLOCK_SIZE: Tokens of a block.
        PAGE: Tokens of a page.
        BLOCK_M: ``GROUP`` rounded up.
        BLOCK_P: Pages of a tile.
        BLOCK_D: ``DIM`` rounded up.
        PRIVATE: Blocks of a plane of scratch go by blocks of the cache.

    Returns:
        The largest logit of each query head, and the sum over tokens of ``exp(logit - largest)``.
    """
    PAGES: tl.constexpr = BLOCK_SIZE // PAGE
    STRIDE: tl.constexpr = HEADS * (GROUP + 1) * PAGES
    newest = (length - 1) // PAGE
    member = tl.arange(0, BLOCK_M)
    member_inside = member < GROUP
    dim = tl.arange(0, BLOCK_D)
    mask = member_inside[:, None] & (dim < DIM)[None, :]
    b_q = tl.load(query + member[:, None] * DIM + dim[None, :], mask=mask, other=0.0)
    channel = tl.load(extreme + dim, mask=dim < DIM, other=-1)
    factor = tl.load(scale + member, mask=member_inside, other=0.0)
    of_newest = tl.load(newest_logit + member, mask=member_inside, other=0.0)
    # Each column of a tile on its own, so that threads meet only once, after the loop.
    peak = tl.full([BLOCK_M, BLOCK_P], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK_M, BLOCK_P], tl.float32)
    for start in range(begin, end, BLOCK_P):
        page = start + tl.arange(0, BLOCK_P)
        inside = page < end
        # Whole blocks, or a channel's pages could not be loaded as vectors. What was loaded from
        # the newest page on is not used.
        there = page // PAGES <= newest // PAGES
        block = tl.load(table + page // PAGES, mask=there, other=0).to(tl.int64)
        source = block * stride_block + BLOCK_SIZE * 2 * DIM + page % PAGES
        # Channels that are not read are masked: their bytes stay where they are.
        b_bound = tl.load(
            base + channel[:, None] * PAGES + source[None, :],
            mask=(channel >= 0)[:, None] & there[None, :],
            other=0.0,
        )  # [BLOCK_D, BLOCK_P]
        logit = dot(b_q, b_bound.to(b_q.dtype)) * factor[:, None]
        logit = tl.where((page == newest)[None, :], of_newest[:, None], logit)
        if not PRIVATE:
            block = (page // PAGES).to(tl.int64)
        held = row_blocks + block.to(tl.int32)
        target = member[:, None] * PAGES + (held * STRIDE + page % PAGES)[None, :]
        tl.store(scores + target, logit, mask=member_inside[:, None] & inside[None, :])
        logit = tl.where(inside[None, :], logit, float("-inf"))
        highest = tl.maximum(peak, logit)
        base_logit = tl.where(highest == float("-inf"), 0.0, highest)  # nothing was scored yet
        tokens = tl.where(page == newest, length - newest * PAGE, PAGE).to(tl.float32)
        mass = mass * tl.exp(peak - base_logit) + tl.exp(logit - base_logit) * tokens[None, :]
        peak = highest
    highest = tl.max(peak, 1)
    return highest, tl.sum(mass * tl.exp(peak - highest[:, None]), 1)


# How wide a table is changes from step to step, which must not compile variants.
@triton.jit(do_not_specialize=["plane", "capacity", "stride_table"])
def _select_slots_kernel(
    cache,
    query,
    extreme,
    scale,
    newest,
    sinks,
    table,
    lengths,
    final_lengths,
    top_r,
    scores,
    peaks,
    masses,
    weights,
    arrived,
    slots,
    top_k,
    plane,
    capacity,
    stride_block,
    stride_head,
    stride_table,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr,
    TILE: tl.constexpr,
    MOST: tl.constexpr,
    PRIVATE: tl.constexpr,
    SINKS: tl.constexpr,
    PDL: tl.constexpr,
):
    let_next_start(PDL)
    PAGES: tl.constexpr = BLOCK_SIZE // PAGE
    pair = tl.program_id(0).to(tl.int64)
    row = pair // HEADS
    head = pair % HEADS
    length = tl.load(lengths + row)
    channels = tl.load(top_r + row)
    wait_for_previous(PDL)
    if (length <= 0) | (channels <= 0):
        return
    table += row * stride_table
    slots += pair * capacity
    if length <= top_k:
        if tl.program_id(1) == 0:
            take_all(slots, table, length, BLOCK_SIZE, TILE // 4)
        return
    pages = tl.cdiv(length, PAGE)
    begin, end = share_of(pages, 1, 1, BLOCK_P)
    if begin >= end:
        return
    scores += head * ((GROUP + 1) * PAGES)
    row_blocks = (row * plane).to(tl.int32)
    if PRIVATE:  # a request's rows have blocks in common: each has scores in a plane of its own
        row_blocks = (tl.load(final_lengths + row) - length) * plane
    peak, mass = _score_pages(
        cache + head * stride_head, table, scores, row_blocks, query + pair * (GROUP * DIM),
        extreme + pair * DIM, scale + pair * GROUP, newest + pair * GROUP, begin, end, length,
        stride_block, HEADS, GROUP, DIM, BLOCK_SIZE, PAGE, BLOCK_M, BLOCK_P, BLOCK_D, PRIVATE,
    )  # fmt: skip
    shares = tl.num_programs(1)
    peaks += pair * GROUP * shares
    masses += pair * GROUP * shares
    member = tl.arange(0, BLOCK_M)
    if SINKS:  # one more entry of the softmax, in the first share
        first = (member < GROUP) & (tl.program_id(1) == 0)
        sink = tl.load(sinks + head * GROUP + member, mask=first, other=float("-inf"))
        sink = sink.to(tl.float32)
        highest = tl.maximum(peak, sink)
        mass = mass * tl.exp(peak - highest) + tl.exp(sink - highest)
        peak = highest
    at = member * shares + tl.program_id(1)
    tl.store(peaks + at, peak, mask=member < GROUP)
    tl.store(masses + at, mass, mask=member < GROUP)
    used = shares_used(pages, 1, 1, BLOCK_P)
    if count_in(arrived + pair, used):
        take_pages(
            scores, row_blocks, peaks, masses, weights + pair * GROUP, slots, table, length, top_k,
            shares, used, HEADS, GROUP, BLOCK_SIZE, PAGE, BLOCK_G, MOST, TILE, PRIVATE,
        )  # fmt: skip


def select_slots(
    cache: Tensor,
    probes: Probes,
    block_table: Tensor,
    lengths: Tensor,
    top_r: Tensor,
    *,
    layout: PageLayout,
    top_k: int,
    private: bool = False,
    final_lengths: Tensor | None = None,
    most_rows: int = 1,
    arrived: Tensor | None = None,
    out: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Same contract as :func:`vllm_sparse.kernels.reference.pages.select_slots`.

    Pages with equal probability: the lower one is taken first, see
    :mod:`vllm_sparse.kernels.triton.topk`.
    """
    (rows, heads, dim), (blocks, kv_heads) = probes.query.shape, cache.shape[:2]
    device, width = cache.device, block_table.shape[1]
    assert block_table.stride(-1) == cache.stride(-1) == 1
    assert cache.stride(-2) == cache.shape[-1], "a page must be one contiguous run"
    assert all(part.is_contiguous() for part in probes)
    assert sinks is None or sinks.is_contiguous()
    capacity = min(top_k, width * layout.block_size)
    slots = out
    if slots is None:
        slots = torch.empty(rows, kv_heads, capacity, dtype=torch.int32, device=device)
    assert slots.shape == (rows, kv_heads, capacity)
    assert slots.is_contiguous()
    if not rows:
        return slots
    block, warps, stages = launch("select_slots", device, dim, probes.query.dtype)
    if cache.dtype == FP8:
        stages = 1  # Triton would copy bounds byte by byte, which asynchronous copies cannot
    head_bytes = dim * probes.query.element_size()
    pages = width * layout.pages_per_block
    shares = score_shares(rows * kv_heads, pages, block, head_bytes, device)
    plane = blocks if private else width
    planes = most_rows if private else rows
    scratch = (planes * plane, kv_heads, heads // kv_heads + 1)
    scores = torch.empty(*scratch, layout.pages_per_block, dtype=torch.float32, device=device)
    peaks, masses = (
        torch.empty(rows, heads, shares, dtype=torch.float32, device=device) for _ in range(2)
    )
    weights = torch.empty(rows, heads, dtype=torch.float32, device=device)
    assert scores.numel() < 1 << 31, "places in scratch are 32-bit"
    if arrived is None:
        arrived = torch.zeros(rows, kv_heads, dtype=torch.int32, device=device)
    overlapped = overlaps(device)
    _select_slots_kernel[(rows * kv_heads, shares)](
        cache,
        *probes,
        lengths if sinks is None else sinks,
        block_table,
        lengths,
        lengths if final_lengths is None else final_lengths,
        top_r,
        scores,
        peaks,
        masses,
        weights,
        arrived,
        slots,
        top_k,
        plane,
        capacity,
        cache.stride(0),
        cache.stride(1),
        block_table.stride(0),
        HEADS=kv_heads,
        GROUP=heads // kv_heads,
        DIM=dim,
        BLOCK_SIZE=layout.block_size,
        PAGE=layout.page_size,
        BLOCK_M=row_block(heads // kv_heads),
        BLOCK_P=block,
        BLOCK_D=dim_block(dim),
        BLOCK_G=triton.next_power_of_2(heads // kv_heads),
        TILE=pages_at_once(warps),
        MOST=MOST_SHARES,
        PRIVATE=private,
        SINKS=sinks is not None,
        PDL=overlapped,
        num_warps=warps,
        num_stages=stages,
        maxnreg=most_registers("select_slots", head_bytes, warps),
        launch_pdl=overlapped,
    )
    return slots


def score_shares(pairs: int, pages: int, block: int, head_bytes: int, device: torch.device) -> int:
    """Programs that score the pages of a row and KV head.

    Args:
        pairs: Rows times KV heads.
        pages: That the longest row may have.
        block: Pages of a tile.
        head_bytes: Of a query of one head.
        device: Where.
    """
    slots = programs_at_once("select_slots", head_bytes, launches.multiprocessors(device))
    return whole_waves(slots, pairs, -(-pages // block))


def pages_at_once(warps: int) -> int:
    """Pages among which a program chooses without leaving its registers: 16 a thread."""
    return 16 * 32 * warps
