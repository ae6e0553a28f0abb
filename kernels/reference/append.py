# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Storing the newest tokens of decode rows, in PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor
    from vllm_sparse.kernels.layout import PageLayout


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
    """Write each row's newest token and refresh the extrema of the page it falls into.

    Args:
        cache: ``[blocks, G, block_size, C]``, modified.
        key: ``[T, G, D]``.
        value: ``[T, G, D]``.
        block_table: Physical blocks of each row, ``[T, max_blocks]``.
        lengths: Tokens of each row including its own, ``[T]``; 0 marks a padding row.
        final_lengths: Length of the row's request after this step, ``[T]``.
        top_r: ``[T]``; rows with 0 read everything, so that nobody needs their extrema.
        layout: Page geometry.
        replays: A request may have several rows; false promises that ``final_lengths`` equals
            ``lengths``.
        query: ``[T, H, D]``; needed with ``parked``.
        parked: Where queries wait for their prompt's compaction, as ``block * per_block + place``,
            int32 ``[T]``; -1 for none.
        per_block: Window queries that a block has room for; needed with ``parked``.
    """
    if query is not None and parked is not None:
        park_queries(cache, query, parked, layout, per_block)
    tokens, extrema = layout.tokens(cache), layout.extrema(cache)
    active = lengths > 0
    rows = block_table[active].long()
    slot = (lengths[active] - 1).long()
    block = rows.gather(1, (slot // layout.block_size)[:, None])[:, 0]
    tokens[block, :, slot % layout.block_size] = torch.cat((key, value), -1)[active].to(cache.dtype)

    # Only the last token that this step writes to a page stores the page's extrema, so that no
    # two rows write different values to one place.
    closes = (lengths == final_lengths)[active] | ((slot + 1) % layout.page_size == 0)
    closes &= top_r[active] > 0
    block, slot = block[closes], slot[closes]
    in_block = slot % layout.block_size
    page = in_block // layout.page_size
    member = page[:, None] * layout.page_size + torch.arange(layout.page_size, device=cache.device)
    keys = tokens[block[:, None], :, member, : layout.head_dim].transpose(1, 2)
    absent = (member > in_block[:, None])[:, None, :, None]
    low = keys.masked_fill(absent, torch.inf).amin(2)
    high = keys.masked_fill(absent, -torch.inf).amax(2)
    extrema[block, :, :, page] = torch.cat((low, high), -1)


def park_queries(
    cache: Tensor, query: Tensor, parked: Tensor, layout: PageLayout, per_block: int
) -> None:
    """Put window queries where the extrema of their prompt's tail will be.

    Args:
        cache: ``[blocks, G, block_size, C]``, modified.
        query: ``[R, H, D]``.
        parked: ``block * per_block + place`` of each row's query, int32 ``[R]``; -1 for none.
        layout: Page geometry.
        per_block: Window queries that a block has room for.
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
