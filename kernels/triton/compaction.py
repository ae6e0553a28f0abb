# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Moves the kept tokens of prompts into their private tails.

Two kernels: the tail is both a source and the destination, so the first one reads all kept tokens
into a temporary before the second one writes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor
from vllm_sparse.kernels.stage1 import chained
from vllm_sparse.kernels.triton.launch import dim_block, launch
from vllm_sparse.kernels.triton.prompt import score_prompt
from vllm_sparse.kernels.triton.topk import top_indices

if TYPE_CHECKING:
    from vllm_sparse.kernels.layout import PageLayout


# What a prompt keeps changes from prompt to prompt, which must not compile variants, nor must the
# place of its row in the step's table, which not every width aligns, or where the prompts of a
# step have what they drop, behind their lengths.
@triton.jit(
    do_not_specialize=["max_chosen", "max_kept", "stride_table"],
    do_not_specialize_on_alignment=["table", "dropped_blocks"],
)
def _gather_kernel(
    keys,
    values,
    table,
    prompt_lens,
    dropped_blocks,
    chosen,
    rows_out,
    max_chosen,
    max_kept,
    stride_key_block,
    stride_key_head,
    stride_key_token,
    stride_value_block,
    stride_value_head,
    stride_value_token,
    stride_table,
    HEADS: tl.constexpr,
    WINDOW: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Rows (key, value) of a tile of one KV head's kept tokens, the window's last."""
    request = (tl.program_id(1) // HEADS).to(tl.int64)
    head = (tl.program_id(1) % HEADS).to(tl.int64)
    length = tl.load(prompt_lens + request)
    kept = length - tl.load(dropped_blocks + request) * BLOCK_SIZE
    start = tl.program_id(0) * BLOCK
    if start >= kept:
        return
    rank = start + tl.arange(0, BLOCK)
    inside = rank < kept
    before_window = kept - WINDOW
    pair = tl.program_id(1).to(tl.int64)
    token = tl.load(chosen + pair * max_chosen + rank, mask=rank < before_window, other=0)
    token = tl.where(rank < before_window, token, length - kept + rank)
    block = tl.load(table + request * stride_table + token // BLOCK_SIZE, mask=inside, other=0)
    block = block.to(tl.int64)
    slot = token % BLOCK_SIZE
    dim = tl.arange(0, BLOCK_D)
    mask = inside[:, None] & (dim < DIM)[None, :]
    source = block * stride_key_block + head * stride_key_head + slot * stride_key_token
    b_k = tl.load(keys + source[:, None] + dim[None, :], mask=mask, other=0.0)
    source = block * stride_value_block + head * stride_value_head + slot * stride_value_token
    b_v = tl.load(values + source[:, None] + dim[None, :], mask=mask, other=0.0)
    target = rows_out + (pair * max_kept + rank)[:, None] * (2 * DIM) + dim[None, :]
    tl.store(target, b_k, mask=mask)
    tl.store(target + DIM, b_v, mask=mask)


@triton.jit(
    do_not_specialize=["max_kept", "stride_table"],
    do_not_specialize_on_alignment=["table", "dropped_blocks"],
)
def _write_kernel(
    rows,
    cache,
    table,
    prompt_lens,
    dropped_blocks,
    max_kept,
    stride_block,
    stride_head,
    stride_table,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One block of one KV head: token rows and channel-major page extrema, zero where unused."""
    PAGES: tl.constexpr = BLOCK_SIZE // PAGE
    request = (tl.program_id(1) // HEADS).to(tl.int64)
    head = (tl.program_id(1) % HEADS).to(tl.int64)
    length = tl.load(prompt_lens + request)
    dropped = tl.load(dropped_blocks + request)
    kept = length - dropped * BLOCK_SIZE
    tail = tl.program_id(0)
    if tail * BLOCK_SIZE >= kept:
        return
    block = tl.load(table + request * stride_table + dropped + tail).to(tl.int64)
    base = cache + block * stride_block + head * stride_head
    page = tl.arange(0, PAGES)
    dim = tl.arange(0, BLOCK_D)
    dim_inside = (dim < DIM)[None, :]
    low = tl.full([PAGES, BLOCK_D], float("inf"), tl.float32)
    high = tl.full([PAGES, BLOCK_D], float("-inf"), tl.float32)
    for member in tl.static_range(PAGE):
        slot = page * PAGE + member
        rank = tail * BLOCK_SIZE + slot
        present = (rank < kept)[:, None]
        offset = tl.program_id(1).to(tl.int64) * max_kept + rank
        source = rows + offset[:, None] * (2 * DIM) + dim[None, :]
        b_k = tl.load(source, mask=present & dim_inside, other=0.0)
        b_v = tl.load(source + DIM, mask=present & dim_inside, other=0.0)
        target = base + slot[:, None] * (2 * DIM) + dim[None, :]
        tl.store(target, b_k, mask=dim_inside)
        tl.store(target + DIM, b_v, mask=dim_inside)
        low = tl.minimum(low, tl.where(present, b_k.to(tl.float32), float("inf")))
        high = tl.maximum(high, tl.where(present, b_k.to(tl.float32), float("-inf")))
    used = (tail * BLOCK_SIZE + page * PAGE < kept)[:, None]
    target = base + BLOCK_SIZE * 2 * DIM + dim[None, :] * PAGES + page[:, None]
    element = cache.dtype.element_ty
    tl.store(target, tl.where(used, low, 0.0).to(element), mask=dim_inside)
    tl.store(target + DIM * PAGES, tl.where(used, high, 0.0).to(element), mask=dim_inside)


def compact_tokens(
    cache: Tensor,
    keys: Tensor,
    values: Tensor,
    block_table: Tensor,
    prompt_lens: Tensor,
    dropped_blocks: Tensor,
    chosen: Tensor,
    *,
    layout: PageLayout,
    window: int,
) -> None:
    """Same contract as :func:`vllm_sparse.kernels.reference.compaction.compact_tokens`."""
    requests, kv_heads, max_chosen = chosen.shape
    dim, block_size = layout.head_dim, layout.block_size
    max_kept = max_chosen + window
    assert keys.stride(-1) == values.stride(-1) == block_table.stride(-1) == 1
    assert chosen.is_contiguous()
    _check_pages(cache)
    if not requests:
        return
    rows = torch.empty(
        requests, kv_heads, max_kept, 2 * dim, dtype=cache.dtype, device=cache.device
    )
    block, warps, stages = launch("compact", cache.device, dim, cache.dtype)
    _gather_kernel[(-(-max_kept // block), requests * kv_heads)](
        keys,
        values,
        block_table,
        prompt_lens,
        dropped_blocks,
        chosen,
        rows,
        max_chosen,
        max_kept,
        *keys.stride()[:3],
        *values.stride()[:3],
        block_table.stride(0),
        HEADS=kv_heads,
        WINDOW=window,
        DIM=dim,
        BLOCK_SIZE=block_size,
        BLOCK=block,
        BLOCK_D=dim_block(dim),
        num_warps=warps,
        num_stages=stages,
    )
    _write_kernel[(-(-max_kept // block_size), requests * kv_heads)](
        rows,
        cache,
        block_table,
        prompt_lens,
        dropped_blocks,
        max_kept,
        cache.stride(0),
        cache.stride(1),
        block_table.stride(0),
        HEADS=kv_heads,
        DIM=dim,
        BLOCK_SIZE=block_size,
        PAGE=layout.page_size,
        BLOCK_D=dim_block(dim),
        num_warps=warps,
        num_stages=stages,
    )


def _check_pages(cache: Tensor) -> None:
    assert cache.stride(-1) == 1
    assert cache.stride(-2) == cache.shape[-1], "a page must be one contiguous run"


compact_prompts = chained(score_prompt, top_indices, compact_tokens)
