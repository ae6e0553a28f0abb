# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Exact decode attention over frames: split over programs, the last of which merges the parts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from vllm_sparse.kernels.fp8 import FP8, UNSCALED, Scales
from vllm_sparse.kernels.triton.attention import (
    make_shares,
    merge_pair,
    merged_at_once,
    store_share,
)
from vllm_sparse.kernels.triton.counters import MOST_PAIRS, counters
from vllm_sparse.kernels.triton.grid import count_in
from vllm_sparse.kernels.triton.launch import (
    LOG2_E,
    MOST_SHARES,
    dim_block,
    row_block,
    split_kernel,
)
from vllm_sparse.kernels.triton.ops import attend_tile, share_of, shares_used

if TYPE_CHECKING:
    from torch import Tensor
    from vllm_sparse.kernels.types import Unframed


# How wide a table is, and with it the blocks of a row, changes from step to step, which must not
# compile variants, nor must the number of rows, on which it depends how often they are split.
@triton.jit(do_not_specialize=["count", "least", "stride_table"])
def _attend_frames_kernel(
    slab, query, output, frames, lengths, host, table, unframed, partial, lse_out, arrived, count,
    least, scale_log2, value_scale, stride_query_row, stride_query_head, stride_output_row,
    stride_output_head, stride_table, HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_G: tl.constexpr, MOST: tl.constexpr, CHUNK: tl.constexpr,
    UNFRAMED: tl.constexpr,
):  # fmt: skip
    """All query heads of one KV head against one share of its tokens; padding rows become zero.

    The last program of a row and KV head to be done merges what all of them have left.
    """
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    length = tl.load(lengths + row)
    memory = slab
    if UNFRAMED:
        whole = tl.load(unframed + row)
        length = tl.maximum(length, whole)
        memory = tl.where(whole > 0, host, slab)
        table += row * stride_table
    member = tl.arange(0, BLOCK_M)
    query_head = head * GROUP + member
    dim = tl.arange(0, BLOCK_D)
    dim_inside = dim < DIM
    mask = (member < GROUP)[:, None] & dim_inside[None, :]
    first_head = output + row * stride_output_row + head * GROUP * stride_output_head
    target = first_head + member[:, None] * stride_output_head + dim[None, :]
    element = output.dtype.element_ty
    if length <= 0:
        if tl.program_id(2) == 0:
            tl.store(target, tl.zeros([BLOCK_M, BLOCK_D], element), mask=mask)
        return
    begin, end = share_of(length, least, 2, BLOCK_N)
    if begin >= end:
        return
    frames += (row * HEADS + head) * count
    b_q = tl.load(
        query + row * stride_query_row + query_head[:, None] * stride_query_head + dim[None, :],
        mask=mask,
        other=0.0,
    )
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK_M], tl.float32)
    b_o = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(begin, end, BLOCK_N):
        token = start + tl.arange(0, BLOCK_N)
        inside = token < end
        number = token // BLOCK_SIZE
        framed = inside
        if UNFRAMED:
            framed = token < tl.where(whole > 0, 0, end)
        # A slab that was full left some without a frame; stay inside it all the same.
        piece = tl.maximum(tl.load(frames + number, mask=framed, other=0), 0).to(tl.int64)
        if UNFRAMED:
            block = tl.load(table + number, mask=token < tl.minimum(end, whole), other=0).to(
                tl.int64
            )
            piece = tl.where(whole > 0, block * HEADS + head, piece)
        slot = piece * BLOCK_SIZE + token % BLOCK_SIZE
        source = memory + (slot * (2 * DIM))[:, None] + dim[None, :]
        loaded = inside[:, None] & dim_inside[None, :]
        b_k = tl.load(source, mask=loaded, other=0.0)  # [BLOCK_N, BLOCK_D]
        b_v = tl.load(source + DIM, mask=loaded, other=0.0)
        b_k, b_v = b_k.to(b_q.dtype), b_v.to(b_q.dtype)
        peak, mass, b_o = attend_tile(b_q, b_k, b_v, inside[None, :], peak, mass, b_o, scale_log2)
    b_o *= value_scale
    used = shares_used(length, least, 2, BLOCK_N)
    if used == 1:
        tl.store(target, (b_o / mass[:, None]).to(element), mask=mask)
    else:
        pair = row * HEADS + head
        first = pair * tl.num_programs(2) * GROUP
        at = first + tl.program_id(2) * GROUP + member
        store_share(partial, lse_out, at, member < GROUP, mask, peak, mass, b_o, DIM)
        if count_in(arrived + pair, used):
            tl.store(arrived + pair, 0)  # for the next launch
            merge_pair(
                partial, lse_out, first, used, first_head, stride_output_head,
                GROUP, DIM, BLOCK_G, BLOCK_D, MOST, CHUNK,
            )  # fmt: skip


def attend_frames(
    slab: Tensor,
    query: Tensor,
    output: Tensor,
    frames: Tensor,
    lengths: Tensor,
    scale: float,
    unframed: Unframed | None = None,
    scales: Scales = UNSCALED,
) -> None:
    """Same contract as :func:`vllm_sparse.kernels.reference.sparda_attention.attend_frames`.

    One launch; those of one device must not run beside each other. Queries are rounded to the
    slab's dtype, unless that is fp8. Scratch: ``4 * T * H * D * splits`` bytes.

    Args:
        slab: ``[frames, block_size, 2 * D]``, contiguous.
        query: ``[T, H, D]``, channels contiguous.
        output: ``[T, H, D]``, channels contiguous.
        frames: int32 ``[T, G, K]``, contiguous; -1 beyond what a row uses.
        lengths: int32 ``[T]``.
        scale: Logit scale.
        unframed: Its pool is contiguous, and so are the entries of its table; int32.
        scales: Of an fp8 slab.
    """
    rows, heads, dim = query.shape
    kv_heads, count = frames.shape[1:]
    block_size, device = slab.shape[1], slab.device
    assert query.stride(-1) == output.stride(-1) == 1
    assert slab.is_contiguous()
    assert frames.is_contiguous()
    assert lengths.is_contiguous()
    if not rows:
        return
    host, table, whole = unframed or (slab, frames, lengths)
    if unframed:
        assert host.is_contiguous()
        assert host.dtype == slab.dtype
        assert table.stride(-1) == 1
        assert whole.is_contiguous()
    if slab.dtype != FP8:
        query = query.to(slab.dtype)
    (block, warps, stages), (shares, least) = split_kernel(
        "attend", rows * kv_heads, count * block_size, dim, query.dtype, device
    )
    assert rows * kv_heads <= MOST_PAIRS
    group = heads // kv_heads
    _attend_frames_kernel[(rows, kv_heads, shares)](
        slab, query, output, frames, lengths, host, table, whole, *make_shares(output, shares),
        counters(device).shares, count, least, scale * scales.key * LOG2_E, scales.value,
        query.stride(0), query.stride(1), output.stride(0), output.stride(1), table.stride(0),
        HEADS=kv_heads, GROUP=group, DIM=dim, BLOCK_SIZE=block_size, BLOCK_M=row_block(group),
        BLOCK_N=block, BLOCK_D=dim_block(dim), BLOCK_G=triton.next_power_of_2(group),
        MOST=MOST_SHARES, CHUNK=merged_at_once(group, dim), UNFRAMED=unframed is not None,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
