# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Exact decode attention over frames: split over programs, then merged by log-sum-exp."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from vllm_sparse.kernels.triton.attention import _combine_kernel
from vllm_sparse.kernels.triton.launch import dim_block, launch, row_block, splits
from vllm_sparse.kernels.triton.ops import dot

if TYPE_CHECKING:
    from torch import Tensor


@triton.jit
def _attend_frames_kernel(
    slab,
    query,
    frames,
    lengths,
    output,
    lse_out,
    count,
    scale_log2,
    stride_query_row,
    stride_query_head,
    stride_output_row,
    stride_output_head,
    stride_output_split,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """All query heads of one KV head against one share of its tokens."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    split = tl.program_id(2)
    length = tl.load(lengths + row)
    member = tl.arange(0, BLOCK_M)
    dim = tl.arange(0, BLOCK_D)
    dim_inside = dim < DIM
    mask = (member < GROUP)[:, None] & dim_inside[None, :]
    query_head = head * GROUP + member
    target = (
        output
        + row * stride_output_row
        + query_head[:, None].to(tl.int64) * stride_output_head
        + split * stride_output_split
        + dim[None, :]
    )
    if length <= 0:
        if SPLITS == 1:
            tl.store(target, tl.zeros([BLOCK_M, BLOCK_D], output.dtype.element_ty), mask=mask)
        return
    frames += (row * HEADS + head) * count
    share = tl.cdiv(tl.cdiv(length, SPLITS), BLOCK_N) * BLOCK_N
    begin = split * share
    end = tl.minimum(begin + share, length)
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
        # A slab that was full left some without a frame; stay inside it all the same.
        frame = tl.maximum(tl.load(frames + token // BLOCK_SIZE, mask=inside, other=0), 0)
        slot = frame.to(tl.int64) * BLOCK_SIZE + token % BLOCK_SIZE
        source = slab + (slot * (2 * DIM))[:, None] + dim[None, :]
        loaded = inside[:, None] & dim_inside[None, :]
        b_k = tl.load(source, mask=loaded, other=0.0)  # [BLOCK_N, BLOCK_D]
        b_v = tl.load(source + DIM, mask=loaded, other=0.0)
        logit = dot(b_q, tl.trans(b_k)) * scale_log2
        logit = tl.where(inside[None, :], logit, float("-inf"))
        highest = tl.maximum(peak, tl.max(logit, 1))
        weight = tl.exp2(logit - highest[:, None])
        shrink = tl.exp2(peak - highest)
        mass = mass * shrink + tl.sum(weight, 1)
        b_o = b_o * shrink[:, None]
        b_o += dot(weight.to(b_v.dtype), b_v)
        peak = highest
    if SPLITS == 1:
        tl.store(target, (b_o / mass[:, None]).to(output.dtype.element_ty), mask=mask)
    else:
        empty = begin >= end
        lse = tl.where(empty, float("-inf"), peak + tl.log2(tl.where(empty, 1.0, mass)))
        index = (row * (HEADS * GROUP) + query_head) * SPLITS + split
        tl.store(lse_out + index, lse, mask=member < GROUP)
        if begin < end:
            tl.store(target, b_o / mass[:, None], mask=mask)


def attend_frames(
    slab: Tensor, query: Tensor, output: Tensor, frames: Tensor, lengths: Tensor, scale: float
) -> None:
    """Same contract as :func:`vllm_sparse.kernels.reference.paging.attend_frames`.

    Queries are rounded to the slab's dtype. Scratch: ``4 * T * H * D * splits`` bytes.

    Args:
        slab: ``[frames, block_size, 2 * D]``, contiguous.
        query: ``[T, H, D]``, channels contiguous.
        output: ``[T, H, D]``, channels contiguous.
        frames: int32 ``[T, G, K]``, contiguous; -1 beyond what a row uses.
        lengths: int32 ``[T]``.
        scale: Logit scale.
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
    block, warps, stages = launch("attend", device, dim)
    shares = splits(rows * kv_heads, -(-count * block_size // block), device)
    query = query.to(slab.dtype)
    partial, lse = output, lengths  # unused
    strides: tuple[int, ...] = (output.stride(0), output.stride(1), 0)
    if shares > 1:
        partial = torch.empty(rows, heads, shares, dim, dtype=torch.float32, device=device)
        lse = torch.empty(rows, heads, shares, dtype=torch.float32, device=device)
        strides = partial.stride()[:3]
    _attend_frames_kernel[(rows, kv_heads, shares)](
        slab,
        query,
        frames,
        lengths,
        partial,
        lse,
        count,
        scale * 1.4426950408889634,
        query.stride(0),
        query.stride(1),
        *strides,
        HEADS=kv_heads,
        GROUP=heads // kv_heads,
        DIM=dim,
        BLOCK_SIZE=block_size,
        BLOCK_M=row_block(heads // kv_heads),
        BLOCK_N=block,
        BLOCK_D=dim_block(dim),
        SPLITS=shares,
        num_warps=warps,
        num_stages=stages,
    )
    if shares > 1:
        _combine_kernel[(rows, heads)](
            partial,
            lse,
            lengths,
            output,
            output.stride(0),
            output.stride(1),
            HEADS=heads,
            DIM=dim,
            BLOCK_D=dim_block(dim),
            SPLITS=shares,
            num_warps=4,
            num_stages=1,
        )
