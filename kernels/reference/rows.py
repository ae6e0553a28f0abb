# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""A decode batch as the RocketKV kernels see it, from what vLLM knows of its rows, in PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from vllm_sparse.kernels.layout import PageLayout


class Rows(NamedTuple):
    """Decode rows, one token each.

    Attributes:
        block_table: Physical blocks from the first kept one, int32 ``[R, max_blocks]``.
        lengths: Physical tokens including the row's own, int32 ``[R]``; 0 marks a padding row.
        top_r: Channels to read, int32 ``[R]``; 0 reads every token.
        parked: Where the row's query waits for its prompt's compaction, as
            ``block * per_block + place``, int32 ``[R]``; -1 for rows outside a window.
    """

    block_table: Tensor
    lengths: Tensor
    top_r: Tensor
    parked: Tensor


def plan_rows(
    rows: Rows,
    seq_lens: Tensor,
    prompt_lens: Tensor,
    block_table: Tensor,
    rules: Tensor,
    counted: Tensor,
    *,
    block_size: int,
    window: int,
    per_block: int,
    top_k: int,
) -> None:
    """Fill ``rows`` for one step.

    A row inside its prompt (a chunk of one token) and a row of a request that stays dense read
    everything, by their logical blocks.

    Args:
        rows: Written.
        seq_lens: Tokens of each row after the step, int32 ``[R]``; 0 marks a padding row.
        prompt_lens: Prompt tokens of each row's request, int32 ``[R]``.
        block_table: Logical blocks, int32 ``[R, max_blocks]``.
        rules: By prompt length, int32 ``[lengths, 2]``: dropped blocks, and channels to read or 0
            if the request stays dense.
        counted: int64 ``[3]``, added to: sparse rows, their visible and their selected tokens.
        block_size: Tokens per block.
        window: Last prompt tokens whose queries are parked; 0 parks none.
        per_block: Window queries that a block has room for.
        top_k: Tokens that a sparse row reads at most.
    """
    dropped, top_r = rules[prompt_lens.clamp(0, len(rules) - 1).long()].unbind(-1)
    sparse = (top_r > 0) & (seq_lens > prompt_lens)
    gone = torch.where(sparse, dropped, 0)
    rows.lengths.copy_(seq_lens - gone * block_size)
    rows.top_r.copy_(torch.where(sparse, top_r, 0))
    column = gone[:, None] + torch.arange(block_table.shape[1], device=block_table.device)
    column = column.clamp(max=block_table.shape[1] - 1).long()
    rows.block_table.copy_(block_table.gather(1, column))

    index = seq_lens - 1 - (prompt_lens - window)
    parks = (top_r > 0) & (seq_lens > 0) & (seq_lens <= prompt_lens) & (index >= 0)
    column = torch.where(parks, dropped + index // per_block, 0).long()
    block = block_table.gather(1, column[:, None])[:, 0]
    rows.parked.copy_(torch.where(parks, block * per_block + index % per_block, -1))

    selected = rows.lengths.clamp(max=top_k)
    for i, amount in enumerate((sparse, seq_lens, selected)):
        counted[i] += torch.where(sparse, amount, 0).sum()


def park_queries(
    cache: Tensor, query: Tensor, parked: Tensor, layout: PageLayout, per_block: int
) -> None:
    """Put window queries where the extrema of their prompt's tail will be.

    Args:
        cache: ``[blocks, G, block_size, C]``, modified.
        query: ``[R, H, D]``.
        parked: See :class:`Rows`.
        layout: Page geometry.
        per_block: See :func:`plan_rows`.
    """
    kv_heads, group = cache.shape[1], query.shape[1] // cache.shape[1]
    there = parked >= 0
    grouped = query[there].unflatten(1, (kv_heads, group)).flatten(2).to(cache.dtype)
    place = parked[there].long()
    area = layout.extrema(cache).flatten(2)
    size = group * layout.head_dim
    column = (place % per_block)[:, None] * size + torch.arange(size, device=cache.device)
    block = (place // per_block)[:, None, None]
    head = torch.arange(kv_heads, device=cache.device)[:, None]
    area[block, head, column[:, None]] = grouped
