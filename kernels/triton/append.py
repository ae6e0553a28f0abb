# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Writes a step's new tokens, the extrema of the pages they fall into, and window queries.

What rows ask of pages is found here too: once per row and KV head, where scoring would have each
of its programs find it again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from vllm_sparse.kernels.fp8 import FP8, UNSCALED, Scales
from vllm_sparse.kernels.triton.grid import let_next_start, wait_for_previous
from vllm_sparse.kernels.triton.launch import FIXED, dim_block, overlaps
from vllm_sparse.kernels.triton.ops import rounded_to

if TYPE_CHECKING:
    from torch import Tensor
    from vllm_sparse.kernels.layout import PageLayout
    from vllm_sparse.kernels.types import Probes


@triton.jit
def _store_probe(
    b_q, low, high, channels, logit_scale, pair, first_head, query_out, extreme_out, scale_out,
    newest_out, GROUP: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """What one row and KV head asks of pages.

    Args:
        b_q: Its queries, in the dtype in which they are asked with, ``[M, D]``.
        low: Smallest keys of its newest page, ``[D]``.
        high: Largest keys of its newest page, ``[D]``.
        channels: How many to read.
        logit_scale: What logits are multiplied with.
        pair: Row times KV heads plus KV head.
        first_head: Row times query heads plus the first query head.
        query_out, extreme_out, scale_out, newest_out: Pointers to the four parts of
            :class:`vllm_sparse.kernels.types.Probes`, written.
        GROUP: Query heads.
        DIM: Head size.
    """
    member = tl.arange(0, b_q.shape[0])
    dim = tl.arange(0, b_q.shape[1])
    inside = dim < DIM
    q = b_q.to(tl.float32)
    # The channels with the largest group magnitude, ties to the lower channel.
    magnitude = tl.where(inside, tl.sum(tl.abs(q), 0), -1.0)
    larger = magnitude[:, None] > magnitude[None, :]
    tied_before = (magnitude[:, None] == magnitude[None, :]) & (dim[:, None] < dim[None, :])
    rank = tl.sum((larger | tied_before).to(tl.int32), 0)
    kept = (rank < channels) & inside
    upper = tl.sum(q, 0) > 0
    extreme = tl.where(kept, tl.where(upper, dim + DIM, dim), -1)
    tl.store(extreme_out + pair * DIM + dim, extreme, mask=inside)

    selected = tl.where(kept[None, :], q, 0.0)
    norm = tl.sum(tl.abs(q), 1)
    share = tl.sum(tl.abs(selected), 1) / tl.where(norm > 0, norm, 1.0)
    scale = tl.where(share > 0, logit_scale / tl.sqrt(tl.where(share > 0, share, 1.0)), 1.0)
    bound = tl.where(inside, tl.where(upper, high, low), 0.0)
    newest = tl.sum(selected * bound[None, :], 1) * scale
    at = first_head + member
    tl.store(scale_out + at, scale, mask=member < GROUP)
    tl.store(newest_out + at, newest, mask=member < GROUP)
    mask = (member < GROUP)[:, None] & inside[None, :]
    b_selected = tl.where(kept[None, :], b_q, 0.0).to(b_q.dtype)
    tl.store(query_out + at[:, None] * DIM + dim[None, :], b_selected, mask=mask)


# How wide a table is changes from step to step, which must not compile variants.
@triton.jit(do_not_specialize=["stride_table", "stride_arrived"])
def _append_kernel(
    cache,
    query,
    key,
    value,
    table,
    lengths,
    final_lengths,
    top_r,
    parked,
    probe_query,
    probe_extreme,
    probe_scale,
    probe_newest,
    arrived,
    logit_scale,
    key_scale,
    value_scale,
    stride_block,
    stride_head,
    stride_query_row,
    stride_query_head,
    stride_key_row,
    stride_key_head,
    stride_value_row,
    stride_value_head,
    stride_table,
    stride_arrived,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WRITE_ROW: tl.constexpr,
    WRITE_EXTREMA: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    PROBE: tl.constexpr,
    COUNTERS: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous(PDL)
    # Only now: what follows may read what the host or other launches have planned before it waits.
    let_next_start(PDL)
    PAGES: tl.constexpr = BLOCK_SIZE // PAGE
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    pair = row * HEADS + head
    # Before each use, so that a graph can be replayed, and whatever became of the use before.
    for counter in tl.static_range(COUNTERS):
        tl.store(arrived + counter * stride_arrived + pair, 0)
    length = tl.load(lengths + row)
    if length <= 0:
        return
    slot = (length - 1) % BLOCK_SIZE
    block = tl.load(table + row * stride_table + (length - 1) // BLOCK_SIZE).to(tl.int64)
    base = cache + block * stride_block + head * stride_head
    dim = tl.arange(0, BLOCK_D)
    inside = dim < DIM
    element = cache.dtype.element_ty
    b_k = tl.load(key + row * stride_key_row + head * stride_key_head + dim, mask=inside)
    b_k = rounded_to(b_k, key_scale, element)
    if WRITE_ROW:
        b_v = tl.load(value + row * stride_value_row + head * stride_value_head + dim, mask=inside)
        tl.store(base + slot * (2 * DIM) + dim, b_k, mask=inside)
        b_v = rounded_to(b_v, value_scale, element)
        tl.store(base + slot * (2 * DIM) + DIM + dim, b_v, mask=inside)
    channels = tl.load(top_r + row)
    member = tl.arange(0, BLOCK_M)
    mask = (member < GROUP)[:, None] & inside[None, :]
    if PROBE | (PER_BLOCK > 0):
        source = query + row * stride_query_row + dim[None, :]
        source += (head * GROUP + member)[:, None] * stride_query_head
        b_q = tl.load(source, mask=mask, other=0.0)
        if element != tl.float8e4nv:
            b_q = b_q.to(element)
    # Where all tokens are read nobody needs extrema, and window queries may wait in their place.
    if WRITE_EXTREMA & (channels > 0):
        page = slot // PAGE
        low = b_k.to(tl.float32)
        high = low
        end = tl.where(inside, slot, 0)
        for offset in tl.static_range(PAGE - 1):
            earlier = page * PAGE + offset
            other = tl.load(base + earlier * (2 * DIM) + dim, mask=earlier < end, other=0.0)
            other = other.to(tl.float32)
            low = tl.where(earlier < end, tl.minimum(low, other), low)
            high = tl.where(earlier < end, tl.maximum(high, other), high)
        # Only the last token that this step writes to a page stores the page's extrema.
        if (length == tl.load(final_lengths + row)) | (length % PAGE == 0):
            target = base + BLOCK_SIZE * 2 * DIM + dim * PAGES + page
            tl.store(target, low.to(element), mask=inside)
            tl.store(target + DIM * PAGES, high.to(element), mask=inside)
        if PROBE:
            _store_probe(
                b_q, low, high, channels, logit_scale, pair, pair * GROUP, probe_query,
                probe_extreme, probe_scale, probe_newest, GROUP, DIM,
            )  # fmt: skip
    if PER_BLOCK > 0:
        place = tl.load(parked + row)
        if place >= 0:
            area = cache + (place // PER_BLOCK).to(tl.int64) * stride_block + head * stride_head
            area += BLOCK_SIZE * 2 * DIM
            if element == tl.float8e4nv:  # queries are not rounded, but take several slots a number
                area = area.to(query.dtype, bitcast=True)
            area += (place % PER_BLOCK) * (GROUP * DIM)
            tl.store(area + member[:, None] * DIM + dim[None, :], b_q, mask=mask)


def append_tokens(
    cache: Tensor,
    key: Tensor,
    value: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    final_lengths: Tensor,
    top_r: Tensor,
    layout: PageLayout,
    *,
    replays: bool = True,
    query: Tensor | None = None,
    parked: Tensor | None = None,
    per_block: int = 0,
    probes: Probes | None = None,
    scale: float = 0.0,
    arrived: Tensor | None = None,
    scales: Scales = UNSCALED,
) -> None:
    """Same contract as :func:`vllm_sparse.kernels.reference.append.append_tokens`.

    Args:
        cache: A page must be contiguous.
        key: Channels contiguous.
        value: Channels contiguous.
        block_table: int32.
        lengths: int32.
        final_lengths: int32.
        top_r: int32.
        layout: Page geometry.
        replays: A request may bring several tokens. If the caller knows that none does, the
            token and the extrema are written by one launch instead of two.
        query: Channels contiguous.
        parked: int32.
        per_block: Window queries that a block has room for.
        probes: Contiguous, the queries in the cache's dtype, or of fp8 caches in their own.
        scale: Logit scale; needed with ``probes``.
        arrived: ``[n, T, G]``, a row after the other.
        scales: Of an fp8 cache.
    """
    rows, kv_heads, dim = key.shape
    assert key.stride(-1) == value.stride(-1) == block_table.stride(-1) == 1
    assert cache.stride(-1) == 1
    assert cache.stride(-2) == cache.shape[-1], "a page must be one contiguous run"
    assert cache.dtype != FP8 or not scales.truncates
    if not rows:
        return
    if query is None:
        query, parked, probes = key, None, None
    # Pointers that are not used must be some.
    asked = probes or (query, lengths, lengths, lengths)
    assert all(part.is_contiguous() for part in probes or ())
    counters = 0 if arrived is None else len(arrived)
    assert arrived is None or arrived.stride()[1:] == (kv_heads, 1)
    group, overlapped = query.shape[1] // kv_heads, overlaps(cache.device)
    for write_row, write_extrema in ((True, False), (False, True)) if replays else ((True, True),):
        probing = probes is not None and write_extrema
        kind = "append_and_probe" if probing else "append"
        _, warps, stages = FIXED[f"{kind}_large" if probing and dim > 128 else kind]
        _append_kernel[(rows, kv_heads)](
            cache,
            query,
            key,
            value,
            block_table,
            lengths,
            final_lengths,
            top_r,
            lengths if parked is None else parked,
            *asked,
            lengths if arrived is None else arrived,
            scale * scales.key,
            scales.key,
            scales.value,
            cache.stride(0),
            cache.stride(1),
            query.stride(0),
            query.stride(1),
            key.stride(0),
            key.stride(1),
            value.stride(0),
            value.stride(1),
            block_table.stride(0),
            0 if arrived is None else arrived.stride(0),
            HEADS=kv_heads,
            GROUP=group,
            DIM=dim,
            BLOCK_SIZE=layout.block_size,
            PAGE=layout.page_size,
            BLOCK_M=triton.next_power_of_2(group),
            BLOCK_D=dim_block(dim),
            WRITE_ROW=write_row,
            WRITE_EXTREMA=write_extrema,
            PER_BLOCK=per_block if parked is not None and write_extrema else 0,
            PROBE=probing,
            COUNTERS=counters,
            PDL=overlapped,
            num_warps=warps,
            num_stages=stages,
            launch_pdl=overlapped,
        )
