# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Exact attention over a list of slots: split over programs, then merged by log-sum-exp."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from vllm_sparse.kernels.fp8 import FP8, UNSCALED, Scales
from vllm_sparse.kernels.triton import launch as launches
from vllm_sparse.kernels.triton.grid import (
    count_in,
    grid_of,
    let_next_start,
    most_registers,
    programs_at_once,
    tiles_of_a_share,
    wait_for_previous,
)
from vllm_sparse.kernels.triton.launch import (
    LOG2_E,
    MOST_SHARES,
    dim_block,
    launch,
    overlaps,
    row_block,
)
from vllm_sparse.kernels.triton.ops import attend_tile

if TYPE_CHECKING:
    from vllm_sparse.kernels.layout import PageLayout
    from vllm_sparse.kernels.triton.grid import Grid

_LOG2_E = tl.constexpr(LOG2_E)

# Numbers of shares that are loaded at once when they are merged.
MERGED_AT_ONCE = 4096


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


@triton.jit
def merge_pair(
    partial, lse, first, used, target, stride_head,
    GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
    MOST: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Merges the shares of one row and KV head.

    Args:
        partial: Output of each share, float32 ``[shares, GROUP, D]`` of all pairs.
        lse: Log-sum-exp of each share, base 2, ``[shares, GROUP]`` of all pairs.
        first: The pair's first share, times ``GROUP``.
        used: Its shares, at most ``MOST``.
        target: Output of the group's first query head.
        stride_head: From one query head to the next.
        GROUP: Query heads.
        DIM: Head size.
        BLOCK_G: ``GROUP`` rounded up.
        BLOCK_D: ``DIM`` rounded up.
        MOST: Shares that a pair may have.
        CHUNK: Shares that are loaded at once.
    """
    member = tl.arange(0, BLOCK_G)
    dim = tl.arange(0, BLOCK_D)
    share = tl.arange(0, MOST)
    there = (share < used)[:, None] & (member < GROUP)[None, :]
    at = first + share[:, None] * GROUP + member[None, :]
    b_lse = tl.load(lse + at, mask=there, other=float("-inf"))  # [MOST, G]
    peak = tl.max(b_lse, 0)
    mass = tl.sum(tl.exp2(b_lse - peak[None, :]), 0)
    merged = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    for start in range(0, used, CHUNK):
        some = start + tl.arange(0, CHUNK)
        mask = (some < used)[:, None] & (member < GROUP)[None, :]
        index = first + some[:, None] * GROUP + member[None, :]
        weight = tl.exp2(tl.load(lse + index, mask=mask, other=float("-inf")) - peak[None, :])
        b_o = tl.load(
            partial + index[:, :, None] * DIM + dim[None, None, :],
            mask=mask[:, :, None] & (dim < DIM)[None, None, :],
            other=0.0,
        )  # [CHUNK, G, D]
        merged += tl.sum(weight[:, :, None] * b_o, 0)
    inside = (member < GROUP)[:, None] & (dim < DIM)[None, :]
    target += member[:, None] * stride_head + dim[None, :]
    merged = merged / mass[:, None]
    tl.store(target, merged.to(target.dtype.element_ty), mask=inside)


# How wide a table is and how many rows there are changes from step to step, which must not compile
# variants.
@triton.jit(do_not_specialize=["rows", "capacity", "shares", "stride_table"])
def _attend_kernel(
    cache,
    query,
    slots,
    table,
    lengths,
    top_r,
    sinks,
    partial,
    lse_out,
    arrived,
    output,
    rows,
    top_k,
    capacity,
    shares,
    scale_log2,
    value_scale,
    stride_block,
    stride_head,
    stride_query_row,
    stride_query_head,
    stride_output_row,
    stride_output_head,
    stride_table,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr,
    MOST: tl.constexpr,
    CHUNK: tl.constexpr,
    READ_ALL: tl.constexpr,
    SINKS: tl.constexpr,
    PDL: tl.constexpr,
):
    """All query heads of a KV head against shares of its tokens; the last one merges the pair's."""
    let_next_start(PDL)
    size, most = tiles_of_a_share(lengths, top_r, rows, HEADS, top_k, shares, BLOCK_N, READ_ALL)
    wait_for_previous(PDL)
    pairs = rows * HEADS
    member = tl.arange(0, BLOCK_M)
    dim = tl.arange(0, BLOCK_D)
    dim_inside = dim < DIM
    mask = (member < GROUP)[:, None] & dim_inside[None, :]
    for unit in range(tl.program_id(0), pairs * tl.maximum(most, 1), tl.num_programs(0)):
        share = unit // pairs
        pair = (unit % pairs).to(tl.int64)
        row = pair // HEADS
        head = pair % HEADS
        length = tl.load(lengths + row)
        everything = READ_ALL | (tl.load(top_r + row) <= 0)
        count = tl.maximum(tl.where(everything, length, tl.minimum(length, top_k)), 0)
        used = tl.maximum(tl.cdiv(tl.cdiv(count, BLOCK_N), size), 1)
        if share < used:
            begin = share * size * BLOCK_N
            end = tl.minimum(begin + size * BLOCK_N, count)
            query_head = head * GROUP + member
            source = query + row * stride_query_row + query_head[:, None] * stride_query_head
            b_q = tl.load(source + dim[None, :], mask=mask, other=0.0)
            base = cache + head * stride_head
            peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
            mass = tl.zeros([BLOCK_M], tl.float32)
            if SINKS:  # the first share begins with it, as with a token of no value
                sink = tl.load(sinks + query_head, mask=member < GROUP, other=0.0).to(tl.float32)
                peak = tl.where(share == 0, sink * _LOG2_E, peak)
                mass = tl.where(share == 0, 1.0, mass)
            b_o = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            for start in range(begin, end, BLOCK_N):
                rank = start + tl.arange(0, BLOCK_N)
                inside = rank < end
                # Both loads, one of them masked off: a branch would keep the loop from being
                # pipelined.
                direct = inside & everything
                block = tl.load(
                    table + row * stride_table + rank // BLOCK_SIZE, mask=direct, other=0
                )
                slot = rank % BLOCK_SIZE
                if not READ_ALL:
                    physical = tl.load(
                        slots + pair * capacity + rank, mask=inside & ~direct, other=0
                    )
                    block = tl.where(everything, block, physical // BLOCK_SIZE)
                    slot = tl.where(everything, slot, physical % BLOCK_SIZE)
                place = base + block.to(tl.int64) * stride_block + slot * (2 * DIM)
                place = place[:, None] + dim[None, :]
                loaded = inside[:, None] & dim_inside[None, :]
                b_k = tl.load(place, mask=loaded, other=0.0)  # [BLOCK_N, BLOCK_D]
                b_v = tl.load(place + DIM, mask=loaded, other=0.0)
                peak, mass, b_o = attend_tile(
                    b_q,
                    b_k.to(b_q.dtype),
                    b_v.to(b_q.dtype),
                    inside[None, :],
                    peak,
                    mass,
                    b_o,
                    scale_log2,
                )
            b_o *= value_scale
            target = output + row * stride_output_row + head * GROUP * stride_output_head
            if used == 1:
                # Padding rows become zero.
                b_o = tl.where(count > 0, b_o / mass[:, None], 0.0)
                whole = target + member[:, None] * stride_output_head + dim[None, :]
                tl.store(whole, b_o.to(output.dtype.element_ty), mask=mask)
            else:
                first = pair * shares * GROUP
                at = first + share * GROUP + member
                store_share(partial, lse_out, at, member < GROUP, mask, peak, mass, b_o, DIM)
                if count_in(arrived + pair, used):
                    merge_pair(
                        partial, lse_out, first, used, target, stride_output_head,
                        GROUP, DIM, BLOCK_G, BLOCK_D, MOST, CHUNK,
                    )  # fmt: skip


class Shares(NamedTuple):
    """Where the shares of each row and KV head go, undefined where there are fewer.

    Attributes:
        partial: Attention over each share, float32 ``[T, G, shares, H / G, D]`` in one run.
        lse: Their log-sum-exp, base 2, float32 ``[T, G, shares, H / G]`` in one run.
    """

    partial: Tensor
    lse: Tensor


def make_shares(output: Tensor, shares: int) -> Shares:
    """Scratch for so many shares of each row of ``output [T, H, D]``."""
    rows, heads, dim = output.shape
    partial = output.new_empty((rows, heads, shares, dim), dtype=torch.float32)
    lse = output.new_empty((rows, heads, shares), dtype=torch.float32)
    return Shares(partial, lse)


def merged_at_once(group: int, dim: int) -> int:
    """Shares of a pair that :func:`merge_pair` loads at once."""
    padded = triton.next_power_of_2(group) * dim_block(dim)
    return max(1, min(16, MERGED_AT_ONCE // padded))


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
    arrived: Tensor | None = None,
    scales: Scales = UNSCALED,
    sinks: Tensor | None = None,
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
    assert sinks is None or sinks.is_contiguous()
    if cache.dtype != FP8:
        query = query.to(cache.dtype)
    block, warps, stages = launch("attend", device, dim, query.dtype)
    held = block_table.shape[1] * layout.block_size  # some rows may read everything
    head_bytes = dim * query.element_size()
    programs, shares = attend_grid(
        rows * kv_heads, held, top_k, block, head_bytes, device, slots is None
    )
    group, overlapped = heads // kv_heads, overlaps(device)
    if arrived is None:
        arrived = torch.zeros(rows, kv_heads, dtype=torch.int32, device=device)
    _attend_kernel[(programs,)](
        cache,
        query,
        lengths if slots is None else slots,
        block_table,
        lengths,
        top_r,
        lengths if sinks is None else sinks,
        *make_shares(output, shares),
        arrived,
        output,
        rows,
        top_k,
        0 if slots is None else slots.shape[-1],
        shares,
        scale * scales.key * LOG2_E,
        scales.value,
        cache.stride(0),
        cache.stride(1),
        query.stride(0),
        query.stride(1),
        output.stride(0),
        output.stride(1),
        block_table.stride(0),
        HEADS=kv_heads,
        GROUP=group,
        DIM=dim,
        BLOCK_SIZE=layout.block_size,
        BLOCK_M=row_block(group),
        BLOCK_N=block,
        BLOCK_D=dim_block(dim),
        BLOCK_G=triton.next_power_of_2(group),
        MOST=MOST_SHARES,
        CHUNK=merged_at_once(group, dim),
        READ_ALL=slots is None,
        SINKS=sinks is not None,
        PDL=overlapped,
        num_warps=warps,
        num_stages=stages,
        maxnreg=most_registers("attend", head_bytes, warps),
        launch_pdl=overlapped,
    )


def attend_grid(
    pairs: int,
    held: int,
    top_k: int,
    block: int,
    head_bytes: int,
    device: torch.device,
    read_all: bool,
) -> Grid:
    """How :func:`attend_slots` is launched.

    Args:
        pairs: Rows times KV heads.
        held: Tokens that the longest row may have.
        top_k: Tokens that rows select.
        block: Tokens of a tile.
        head_bytes: Of a query of one head.
        device: Where.
        read_all: Every row reads everything.
    """
    read = held if read_all else min(top_k, held)
    multiprocessors = launches.multiprocessors(device)
    slots = programs_at_once("attend", head_bytes, multiprocessors)
    return grid_of(slots, pairs, read, held, block, multiprocessors)
