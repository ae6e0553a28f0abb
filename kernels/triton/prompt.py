# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Stage 1 scores: what the last queries of a prompt look at, in two passes over its keys."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from vllm_sparse.kernels.fp8 import FP8
from vllm_sparse.kernels.triton.launch import (
    FIXED,
    MOST_SHARES,
    dim_block,
    launch,
    row_block,
    splits,
)
from vllm_sparse.kernels.triton.ops import dot, share_of


@triton.jit
def _load_queries(query, head, row, row_inside, dim, dim_inside, stride_head, stride_token, WINDOW):
    """Queries ``[BLOCK_M, BLOCK_D]`` of rows (head of the group, window position)."""
    offset = (head + row // WINDOW) * stride_head + (row % WINDOW) * stride_token
    return tl.load(
        query + offset[:, None] + dim[None, :],
        mask=row_inside[:, None] & dim_inside[None, :],
        other=0.0,
    )


@triton.jit
def _load_keys(
    keys, table, column, inside, dim, dim_inside, block_size, stride_block, stride_token
):
    """Keys ``[BLOCK_N, BLOCK_D]`` at token positions ``column`` of a request."""
    block = tl.load(table + column // block_size, mask=inside, other=0).to(tl.int64)
    offset = block * stride_block + (column % block_size).to(tl.int64) * stride_token
    return tl.load(
        keys + offset[:, None] + dim[None, :],
        mask=inside[:, None] & dim_inside[None, :],
        other=0.0,
    )


# How wide a table is changes from prompt to prompt, which must not compile variants, nor must the
# place of a prompt's row in the step's table, which not every width aligns.
@triton.jit(
    do_not_specialize=["stride_query_row", "stride_table"],
    do_not_specialize_on_alignment=["table"],
)
def _normaliser_kernel(
    query,
    keys,
    table,
    prompt_lens,
    lse,
    scale,
    block_size,
    stride_query_row,
    stride_query_head,
    stride_query_token,
    stride_key_block,
    stride_key_head,
    stride_key_token,
    stride_table,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    WINDOW: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Log of each query's softmax denominator over one share of the keys."""
    request = (tl.program_id(2) // HEADS).to(tl.int64)
    head = tl.program_id(2) % HEADS
    length = tl.load(prompt_lens + request)
    if length <= 0:
        return
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_inside = row < GROUP * WINDOW
    dim = tl.arange(0, BLOCK_D)
    dim_inside = dim < DIM
    query += request * stride_query_row
    keys += head.to(tl.int64) * stride_key_head
    table += request * stride_table
    b_q = _load_queries(
        query, head * GROUP, row, row_inside, dim, dim_inside,
        stride_query_head, stride_query_token, WINDOW,
    )  # fmt: skip
    last_visible = length - WINDOW + row % WINDOW
    begin, end = share_of(length, 1, 0, BLOCK_N)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK_M], tl.float32)
    for start in range(begin, end, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        b_k = _load_keys(
            keys, table, column, column < end, dim, dim_inside,
            block_size, stride_key_block, stride_key_token,
        )  # fmt: skip
        logit = dot(b_q, tl.trans(b_k.to(b_q.dtype))) * scale  # [BLOCK_M, BLOCK_N]
        visible = (column[None, :] <= last_visible[:, None]) & (column < end)[None, :]
        logit = tl.where(visible, logit, float("-inf"))
        highest = tl.maximum(peak, tl.max(logit, 1))
        # A share may lie wholly behind a query.
        base = tl.where(highest == float("-inf"), 0.0, highest)
        mass = mass * tl.exp(peak - base) + tl.sum(tl.exp(logit - base[:, None]), 1)
        peak = highest
    value = peak + tl.log(tl.where(mass == 0.0, 1.0, mass))
    offset = (request * HEADS + head) * GROUP * WINDOW + row
    tl.store(lse + offset * tl.num_programs(0) + tl.program_id(0), value, mask=row_inside)


# Longer prompts have more shares, which must not compile variants either.
@triton.jit(do_not_specialize=["rows", "shares"])
def _merge_kernel(
    lse,
    sinks,
    merged,
    rows,
    shares,
    HEADS: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Each query's softmax denominator from those of the shares, and its head's sink if any."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    share = tl.arange(0, BLOCK_S)
    inside = (row < rows)[:, None] & (share < shares)[None, :]
    part = tl.load(lse + row[:, None] * shares + share[None, :], mask=inside, other=float("-inf"))
    highest = tl.max(part, 1)
    if sinks is not None:
        sink = tl.load(sinks + row // WINDOW % HEADS, mask=row < rows, other=0.0).to(tl.float32)
        highest = tl.maximum(highest, sink)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    mass = tl.sum(tl.exp(part - base[:, None]), 1)
    if sinks is not None:
        mass += tl.exp(sink - base)
    tl.store(merged + row, base + tl.log(mass), mask=row < rows)


@triton.jit(
    do_not_specialize=["width", "stride_query_row", "stride_table"],
    do_not_specialize_on_alignment=["table"],
)
def _score_kernel(
    query,
    keys,
    table,
    prompt_lens,
    lse,
    score,
    scale,
    block_size,
    width,
    stride_query_row,
    stride_query_head,
    stride_query_token,
    stride_key_block,
    stride_key_head,
    stride_key_token,
    stride_table,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    WINDOW: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Attention probability of a tile of keys, summed over the window and the group."""
    request = (tl.program_id(1) // HEADS).to(tl.int64)
    head = tl.program_id(1) % HEADS
    prefix = tl.load(prompt_lens + request) - WINDOW
    start = tl.program_id(0) * BLOCK_N
    if start >= prefix:
        return
    dim = tl.arange(0, BLOCK_D)
    dim_inside = dim < DIM
    column = start + tl.arange(0, BLOCK_N)
    inside = column < prefix
    query += request * stride_query_row
    keys += head.to(tl.int64) * stride_key_head
    table += request * stride_table
    b_k = _load_keys(
        keys, table, column, inside, dim, dim_inside,
        block_size, stride_key_block, stride_key_token,
    )  # fmt: skip
    b_k = tl.trans(b_k)
    lse += (request * HEADS + head) * GROUP * WINDOW
    total = tl.zeros([BLOCK_N], tl.float32)
    for first in range(0, GROUP * WINDOW, BLOCK_M):
        row = first + tl.arange(0, BLOCK_M)
        row_inside = row < GROUP * WINDOW
        b_q = _load_queries(
            query, head * GROUP, row, row_inside, dim, dim_inside,
            stride_query_head, stride_query_token, WINDOW,
        )  # fmt: skip
        normaliser = tl.load(lse + row, mask=row_inside, other=float("inf"))
        logit = dot(b_q, b_k.to(b_q.dtype)) * scale
        total += tl.sum(tl.exp(logit - normaliser[:, None]), 0)
    tl.store(score + tl.program_id(1).to(tl.int64) * width + column, total, mask=inside)


@triton.jit(do_not_specialize=["width"])
def _pool_kernel(
    score,
    prompt_lens,
    pooled,
    width,
    HEADS: tl.constexpr,
    WINDOW: tl.constexpr,
    KERNEL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    request = tl.program_id(1) // HEADS
    prefix = tl.load(prompt_lens + request) - WINDOW
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    base = tl.program_id(1).to(tl.int64) * width
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    for offset in range(-(KERNEL // 2), KERNEL // 2 + 1):
        neighbour = column + offset
        inside = (neighbour >= 0) & (neighbour < prefix)
        best = tl.maximum(best, tl.load(score + base + neighbour, mask=inside, other=float("-inf")))
    tl.store(pooled + base + column, tl.where(column < prefix, best, 0.0), mask=column < width)


def score_prompt(
    query_window: Tensor,
    keys: Tensor,
    block_table: Tensor,
    prompt_lens: Tensor,
    *,
    pool_kernel: int,
    scale: float,
    sinks: Tensor | None = None,
) -> Tensor:
    """Same contract as :func:`vllm_sparse.kernels.reference.prompt.score_prompt`."""
    requests, heads, window, dim = query_window.shape
    kv_heads, block_size = keys.shape[1:3]
    group = heads // kv_heads
    assert query_window.stride(-1) == keys.stride(-1) == block_table.stride(-1) == 1
    assert pool_kernel % 2
    device = keys.device
    width = block_table.shape[1] * block_size
    score = torch.empty(requests, kv_heads, width, dtype=torch.float32, device=device)
    if not score.numel():
        return score
    if keys.dtype != FP8:
        query_window = query_window.to(keys.dtype)
    dtype = query_window.dtype
    block, warps, stages = launch("prompt", device, dim, dtype)
    rows = min(row_block(group * window), 128 if dim * dtype.itemsize <= 256 else 64)
    row_tiles, tiles = -(-group * window // rows), -(-width // block)
    shares = splits(requests * kv_heads * row_tiles, tiles, device)
    strides = (
        *query_window.stride()[:3],
        keys.stride(0),
        keys.stride(1),
        keys.stride(2),
        block_table.stride(0),
    )
    shape = {
        "HEADS": kv_heads,
        "GROUP": group,
        "WINDOW": window,
        "DIM": dim,
        "BLOCK_M": rows,
        "BLOCK_N": block,
        "BLOCK_D": dim_block(dim),
        "num_warps": warps,
        "num_stages": stages,
    }
    lse = torch.empty(requests, kv_heads, group * window, shares, device=device)
    _normaliser_kernel[(shares, row_tiles, requests * kv_heads)](
        query_window,
        keys,
        block_table,
        prompt_lens,
        lse,
        scale,
        block_size,
        *strides,
        **shape,
    )
    if shares > 1 or sinks is not None:
        parts, lse = lse, torch.empty(lse.shape[:3], device=device)
        merged, merge_warps, merge_stages = FIXED["merge_normalisers"]
        _merge_kernel[(-(-lse.numel() // merged),)](
            parts,
            sinks,
            lse,
            lse.numel(),
            shares,
            HEADS=heads,
            WINDOW=window,
            BLOCK=merged,
            BLOCK_S=MOST_SHARES,
            num_warps=merge_warps,
            num_stages=merge_stages,
        )
    _score_kernel[(tiles, requests * kv_heads)](
        query_window,
        keys,
        block_table,
        prompt_lens,
        lse,
        score,
        scale,
        block_size,
        width,
        *strides,
        **shape,
    )
    pooled = torch.empty_like(score)
    block, warps, stages = launch("pool", device)
    _pool_kernel[(-(-width // block), requests * kv_heads)](
        score,
        prompt_lens,
        pooled,
        width,
        HEADS=kv_heads,
        WINDOW=window,
        KERNEL=pool_kernel,
        BLOCK=block,
        num_warps=warps,
        num_stages=stages,
    )
    return pooled
