# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Exact attention over a list of slots: split over programs, then merged by log-sum-exp."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from vllm_sparse.kernels.triton.launch import (
    LOG2_E,
    MOST_SHARES,
    dim_block,
    row_block,
    split_kernel,
)
from vllm_sparse.kernels.triton.ops import attend_tile, share_of

if TYPE_CHECKING:
    from vllm_sparse.kernels.layout import PageLayout


@triton.jit
def store_share(partial, lse_out, at, inside, mask, peak, mass, b_o, DIM: tl.constexpr):
    """Stores the attention over one share of a row's tokens, for merging.

    Args:
        partial: Output of each share, float32 ``[shares, D]`` of all rows and heads.
        lse_out: Log-sum-exp of each share, base 2.
        at: Index of the share, ``[M]``.
        inside: Entries that exist, ``[M]``.
        mask: Channels that exist, ``[M, D]``.
        peak: Largest logit so far, base 2, ``[M]``.
        mass: Sum of weights relative to it, ``[M]``.
        b_o: Weighted sum of values, ``[M, D]``.
        DIM: Head size.
    """
    dim = tl.arange(0, b_o.shape[1])
    tl.store(lse_out + at, peak + tl.log2(mass), mask=inside)
    tl.store(partial + at[:, None] * DIM + dim[None, :], b_o / mass[:, None], mask=mask)


# How wide a table is changes from step to step, which must not compile variants.
@triton.jit(do_not_specialize=["capacity", "least", "stride_table"])
def _attend_kernel(
    cache,
    query,
    slots,
    table,
    lengths,
    top_r,
    partial,
    lse_out,
    top_k,
    capacity,
    least,
    scale_log2,
    stride_block,
    stride_head,
    stride_query_row,
    stride_query_head,
    stride_table,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    READ_ALL: tl.constexpr,
):
    """All query heads of one KV head against one share of its tokens."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    length = tl.load(lengths + row)
    if length <= 0:
        return
    everything = READ_ALL | (tl.load(top_r + row) <= 0)
    count = tl.where(everything, length, tl.minimum(length, top_k))
    begin, end = share_of(count, least, 2, BLOCK_N)
    member = tl.arange(0, BLOCK_M)
    query_head = head * GROUP + member
    at = (row * (HEADS * GROUP) + query_head) * tl.num_programs(2) + tl.program_id(2)
    if begin >= end:
        tl.store(lse_out + at, tl.full([BLOCK_M], float("-inf"), tl.float32), mask=member < GROUP)
        return
    dim = tl.arange(0, BLOCK_D)
    dim_inside = dim < DIM
    mask = (member < GROUP)[:, None] & dim_inside[None, :]
    b_q = tl.load(
        query + row * stride_query_row + query_head[:, None] * stride_query_head + dim[None, :],
        mask=mask,
        other=0.0,
    )
    base = cache + head.to(tl.int64) * stride_head
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK_M], tl.float32)
    b_o = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(begin, end, BLOCK_N):
        rank = start + tl.arange(0, BLOCK_N)
        inside = rank < end
        # Both loads, one of them masked off: a branch would keep the loop from being pipelined.
        direct = inside & everything
        block = tl.load(table + row * stride_table + rank // BLOCK_SIZE, mask=direct, other=0)
        slot = rank % BLOCK_SIZE
        if not READ_ALL:
            physical = tl.load(
                slots + (row * HEADS + head) * capacity + rank, mask=inside & ~direct, other=0
            )
            block = tl.where(everything, block, physical // BLOCK_SIZE)
            slot = tl.where(everything, slot, physical % BLOCK_SIZE)
        source = base + block.to(tl.int64) * stride_block + slot * (2 * DIM)
        source = source[:, None] + dim[None, :]
        loaded = inside[:, None] & dim_inside[None, :]
        b_k = tl.load(source, mask=loaded, other=0.0)  # [BLOCK_N, BLOCK_D]
        b_v = tl.load(source + DIM, mask=loaded, other=0.0)
        peak, mass, b_o = attend_tile(b_q, b_k, b_v, inside[None, :], peak, mass, b_o, scale_log2)
    store_share(partial, lse_out, at, member < GROUP, mask, peak, mass, b_o, DIM)


@triton.jit(do_not_specialize=["shares"])
def _combine_kernel(
    partial,
    lse,
    lengths,
    unframed,
    output,
    shares,
    stride_output_row,
    stride_output_head,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MOST: tl.constexpr,
    UNFRAMED: tl.constexpr,
):
    """Merges the shares, up to ``MOST``, of one query head; padding rows become zero."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    dim = tl.arange(0, BLOCK_D)
    inside = dim < DIM
    target = output + row * stride_output_row + head * stride_output_head + dim
    length = tl.load(lengths + row)
    if UNFRAMED:
        length = tl.maximum(length, tl.load(unframed + row))
    if length <= 0:
        tl.store(target, tl.zeros([BLOCK_D], output.dtype.element_ty), mask=inside)
        return
    share = tl.arange(0, MOST)
    index = (row * HEADS + head) * shares + share
    b_lse = tl.load(lse + index, mask=share < shares, other=float("-inf"))
    used = b_lse != float("-inf")  # true for NaN, which must show
    weight = tl.exp2(b_lse - tl.max(b_lse, 0))
    b_o = tl.load(
        partial + index[:, None] * DIM + dim[None, :],
        mask=used[:, None] & inside[None, :],
        other=0.0,
    )
    merged = tl.sum(weight[:, None] * b_o, 0) / tl.sum(weight, 0)
    tl.store(target, merged.to(output.dtype.element_ty), mask=inside)


class Shares(NamedTuple):
    """Where the shares of each row go.

    Attributes:
        partial: Attention over each share, float32 ``[T, H, shares, D]``.
        lse: Their log-sum-exp, base 2, float32 ``[T, H, shares]``; minus infinity where a row has
            no such share.
    """

    partial: Tensor
    lse: Tensor


def make_shares(output: Tensor, shares: int) -> Shares:
    """Scratch for so many shares of each row of ``output [T, H, D]``."""
    rows, heads, dim = output.shape
    partial = output.new_empty((rows, heads, shares, dim), dtype=torch.float32)
    lse = output.new_empty((rows, heads, shares), dtype=torch.float32)
    return Shares(partial, lse)


def merge_shares(
    scratch: Shares, lengths: Tensor, output: Tensor, unframed: Tensor | None = None
) -> None:
    """Merges the shares of each row into ``output [T, H, D]``.

    Args:
        scratch: The shares.
        lengths: Rows of length 0 become zero, int32 ``[T]``.
        output: Written.
        unframed: Unless they have a length here, int32 ``[T]``.
    """
    rows, heads, dim = output.shape
    _combine_kernel[(rows, heads)](
        scratch.partial,
        scratch.lse,
        lengths,
        lengths if unframed is None else unframed,
        output,
        scratch.partial.shape[2],
        output.stride(0),
        output.stride(1),
        HEADS=heads,
        DIM=dim,
        BLOCK_D=dim_block(dim),
        MOST=MOST_SHARES,
        UNFRAMED=unframed is not None,
        num_warps=4,
        num_stages=1,
    )


def attend_slots(
    cache: Tensor,
    query: Tensor,
    output: Tensor,
    slots: Tensor | None,
    block_table: Tensor,
    lengths: Tensor,
    top_r: Tensor,
    *,
    layout: PageLayout,
    top_k: int,
    scale: float,
) -> None:
    """Same contract as :func:`vllm_sparse.kernels.reference.attention.attend_slots`."""
    rows, heads, dim = query.shape
    kv_heads, device = cache.shape[1], cache.device
    assert query.stride(-1) == output.stride(-1) == block_table.stride(-1) == 1
    assert cache.stride(-1) == 1
    assert cache.stride(-2) == cache.shape[-1], "a page must be one contiguous run"
    if not rows:
        return
    assert slots is None or slots.is_contiguous()
    # Some rows may read everything. Programs that find nothing to read end at once.
    most = block_table.shape[1] * layout.block_size
    (block, warps, stages), (shares, least) = split_kernel(
        "attend", rows * kv_heads, most, dim, cache.dtype, device
    )
    query = query.to(cache.dtype)
    scratch = make_shares(output, shares)
    _attend_kernel[(rows, kv_heads, shares)](
        cache,
        query,
        lengths if slots is None else slots,
        block_table,
        lengths,
        top_r,
        *scratch,
        top_k,
        0 if slots is None else slots.shape[-1],
        least,
        scale * LOG2_E,
        cache.stride(0),
        cache.stride(1),
        query.stride(0),
        query.stride(1),
        block_table.stride(0),
        HEADS=kv_heads,
        GROUP=heads // kv_heads,
        DIM=dim,
        BLOCK_SIZE=layout.block_size,
        BLOCK_M=row_block(heads // kv_heads),
        BLOCK_N=block,
        BLOCK_D=dim_block(dim),
        READ_ALL=slots is None,
        num_warps=warps,
        num_stages=stages,
    )
    merge_shares(scratch, lengths, output)
