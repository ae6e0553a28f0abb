# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Writes a step's new tokens, the extrema of the pages they fall into, and window queries."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from vllm_sparse.kernels.triton.launch import dim_block

if TYPE_CHECKING:
    from torch import Tensor
    from vllm_sparse.kernels.layout import PageLayout


# How wide a table is changes from step to step, which must not compile variants.
@triton.jit(do_not_specialize=["stride_table"])
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
    stride_block,
    stride_head,
    stride_query_row,
    stride_query_head,
    stride_key_row,
    stride_key_head,
    stride_value_row,
    stride_value_head,
    stride_table,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WRITE_ROW: tl.constexpr,
    WRITE_EXTREMA: tl.constexpr,
    PER_BLOCK: tl.constexpr,
):
    PAGES: tl.constexpr = BLOCK_SIZE // PAGE
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
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
    b_k = b_k.to(element)
    if WRITE_ROW:
        b_v = tl.load(value + row * stride_value_row + head * stride_value_head + dim, mask=inside)
        tl.store(base + slot * (2 * DIM) + dim, b_k, mask=inside)
        tl.store(base + slot * (2 * DIM) + DIM + dim, b_v.to(element), mask=inside)
    if WRITE_EXTREMA:
        # Only the last token that this step writes to a page stores the page's extrema. Where all
        # tokens are read nobody needs them, and window queries may wait in their place.
        closes = (length == tl.load(final_lengths + row)) | (length % PAGE == 0)
        if closes & (tl.load(top_r + row) > 0):
            page = slot // PAGE
            low = b_k.to(tl.float32)
            high = low
            end = tl.where(inside, slot, 0)
            for member in tl.static_range(PAGE - 1):
                earlier = page * PAGE + member
                other = tl.load(base + earlier * (2 * DIM) + dim, mask=earlier < end, other=0.0)
                other = other.to(tl.float32)
                low = tl.where(earlier < end, tl.minimum(low, other), low)
                high = tl.where(earlier < end, tl.maximum(high, other), high)
            target = base + BLOCK_SIZE * 2 * DIM + dim * PAGES + page
            tl.store(target, low.to(element), mask=inside)
            tl.store(target + DIM * PAGES, high.to(element), mask=inside)
    if PER_BLOCK > 0:
        place = tl.load(parked + row)
        if place >= 0:
            member = tl.arange(0, BLOCK_M)
            mask = (member < GROUP)[:, None] & inside[None, :]
            source = query + row * stride_query_row + dim[None, :]
            source += (head * GROUP + member)[:, None] * stride_query_head
            b_q = tl.load(source, mask=mask)
            area = cache + (place // PER_BLOCK).to(tl.int64) * stride_block + head * stride_head
            area += BLOCK_SIZE * 2 * DIM + (place % PER_BLOCK) * (GROUP * DIM)
            tl.store(area + member[:, None] * DIM + dim[None, :], b_q.to(element), mask=mask)


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
) -> None:
    """Same contract as :func:`vllm_sparse.kernels.reference.append.append_tokens`.

    With ``parked`` also that of :func:`vllm_sparse.kernels.reference.append.park_queries`.

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
        query: Channels contiguous; needed with ``parked``, which needs ``replays=False``.
        parked: int32.
        per_block: Window queries that a block has room for.
    """
    rows, kv_heads, dim = key.shape
    assert key.stride(-1) == value.stride(-1) == block_table.stride(-1) == 1
    assert cache.stride(-1) == 1
    assert cache.stride(-2) == cache.shape[-1], "a page must be one contiguous run"
    assert parked is None or not replays
    if not rows:
        return
    if query is None or parked is None:
        query, parked, per_block = key, lengths, 0  # unused
    group = query.shape[1] // kv_heads
    for write_row, write_extrema in ((True, False), (False, True)) if replays else ((True, True),):
        _append_kernel[(rows, kv_heads)](
            cache,
            query,
            key,
            value,
            block_table,
            lengths,
            final_lengths,
            top_r,
            parked,
            cache.stride(0),
            cache.stride(1),
            query.stride(0),
            query.stride(1),
            key.stride(0),
            key.stride(1),
            value.stride(0),
            value.stride(1),
            block_table.stride(0),
            GROUP=group,
            DIM=dim,
            BLOCK_SIZE=layout.block_size,
            PAGE=layout.page_size,
            BLOCK_M=triton.next_power_of_2(group),
            BLOCK_D=dim_block(dim),
            WRITE_ROW=write_row,
            WRITE_EXTREMA=write_extrema,
            PER_BLOCK=per_block,
            num_warps=1,
            num_stages=1,
        )
