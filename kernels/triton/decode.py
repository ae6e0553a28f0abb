# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""A RocketKV decode step, composed of Triton kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from vllm_sparse.kernels.triton.append import append_tokens
from vllm_sparse.kernels.triton.attention import attend_slots
from vllm_sparse.kernels.triton.launch import split_kernel
from vllm_sparse.kernels.triton.pages import score_pages, select_slots

if TYPE_CHECKING:
    from torch import Tensor
    from vllm_sparse.kernels.layout import PageLayout

# Bytes that the scores of pages may take at a time. They are as wide as the longest row may be.
_MOST_SCORES = 256 << 20


def decode_attention(
    cache: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    final_lengths: Tensor,
    top_r: Tensor,
    *,
    layout: PageLayout,
    top_k: int,
    scale: float,
    read_all: bool = False,
    replays: bool = True,
    parked: Tensor | None = None,
    per_block: int = 0,
) -> None:
    """Same contract as :func:`vllm_sparse.kernels.reference.decode.decode_attention`.

    Capturable: grids and scratch depend on shapes only. The channel axes must be contiguous and
    so must a page of the cache; other strides are free. Integer tensors are int32. Queries are
    rounded to the cache's dtype. Scratch: see :func:`decode_scratch_bytes`; to bound it, pages
    are scored and selected for so many rows at a time.
    """
    append_tokens(
        cache,
        key,
        value,
        block_table,
        lengths,
        final_lengths,
        top_r,
        layout,
        replays=replays,
        query=query,
        parked=parked,
        per_block=per_block,
    )
    slots = None
    if not read_all:
        slots = _select(cache, query, block_table, lengths, top_r, layout, top_k)
    attend_slots(
        cache,
        query,
        output,
        slots,
        block_table,
        lengths,
        top_r,
        layout=layout,
        top_k=top_k,
        scale=scale,
    )


def decode_scratch_bytes(
    rows: int,
    max_blocks: int,
    *,
    layout: PageLayout,
    heads: int,
    kv_heads: int,
    top_k: int,
    dtype: torch.dtype,
    device: torch.device,
) -> int:
    """What :func:`decode_attention` holds at a time, at most, with any number of rows up to one.

    Its layers run one after the other and use the same memory. What an allocator rounds up is not
    counted.

    Args:
        rows: T, at most.
        max_blocks: Width of the block table.
        layout: Page geometry.
        heads: H.
        kv_heads: G.
        top_k: Tokens to attend to per KV head.
        dtype: Of the cache.
        device: Where.
    """
    dim, tokens = layout.head_dim, max_blocks * layout.block_size
    pages = max_blocks * layout.pages_per_block
    most = 0
    for count in range(1, rows + 1):
        part = min(_rows_at_once(count, heads, kv_heads, pages), count)
        _, split = split_kernel("score_pages", part * kv_heads, pages, dim, dtype, device)
        scores = part * (heads * (pages + 2 * split.shares) + kv_heads * pages)
        _, split = split_kernel("attend", count * kv_heads, tokens, dim, dtype, device)
        attended = count * heads * split.shares * (dim + 1)
        slots = count * kv_heads * min(top_k, tokens)
        most = max(most, 4 * (slots + max(scores, attended)))
    return most


def _rows_at_once(rows: int, heads: int, kv_heads: int, pages: int) -> int:
    """Rows to score together; a multiple of 4, so that what starts there is aligned as a whole."""
    parts = -(-rows * pages * 4 * (heads + kv_heads) // _MOST_SCORES)
    return -(-rows // max(parts, 1) // 4) * 4


def _select(
    cache: Tensor,
    query: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    top_r: Tensor,
    layout: PageLayout,
    top_k: int,
) -> Tensor:
    """Slots of all rows, see :func:`.pages.select_slots`."""
    (rows, heads, _), (max_blocks, kv_heads) = query.shape, (block_table.shape[1], cache.shape[1])
    capacity = min(top_k, max_blocks * layout.block_size)
    slots = torch.empty(rows, kv_heads, capacity, dtype=torch.int32, device=cache.device)
    step = _rows_at_once(rows, heads, kv_heads, max_blocks * layout.pages_per_block)
    for start in range(0, rows, max(step, 1)):
        part = slice(start, start + step)
        rest = block_table[part], lengths[part], top_r[part]
        # Nothing keeps the scores of one part while those of the next are made.
        select_slots(
            score_pages(cache, query[part], *rest, layout=layout, top_k=top_k),
            *rest,
            layout=layout,
            top_k=top_k,
            kv_heads=kv_heads,
            out=slots[part],
        )
    return slots
