# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Storing the newest tokens of decode rows, in PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from vllm_sparse.kernels.fp8 import FP8, UNSCALED, Scales, as_slots, encode, readable
from vllm_sparse.kernels.types import Probes

from vllm_sparse.policies.pages import extrema

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
    probes: Probes | None = None,
    scale: float = 0.0,
    arrived: Tensor | None = None,
    scales: Scales = UNSCALED,
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
        query: ``[T, H, D]``; needed with ``parked`` and with ``probes``.
        parked: Where queries wait for their prompt's compaction, as ``block * per_block + place``,
            int32 ``[T]``; -1 for none.
        per_block: Window queries that a block has room for; needed with ``parked``.
        probes: Written, see :func:`probe_pages`.
        scale: Logit scale; needed with ``probes``.
        arrived: Counters of the launches that follow, int32; set to zero.
        scales: Of an fp8 cache.
    """
    if arrived is not None:
        arrived.zero_()
    if query is not None and parked is not None:
        park_queries(cache, query, parked, layout, per_block)
    tokens = layout.tokens(cache)
    active = lengths > 0
    table = block_table[active].long()
    slot = (lengths[active] - 1).long()
    block = table.gather(1, (slot // layout.block_size)[:, None])[:, 0]
    rows = [
        encode(part[active], cache.dtype, scale, scales.truncates)
        for part, scale in ((key, scales.key), (value, scales.value))
    ]
    tokens[block, :, slot % layout.block_size] = torch.cat(rows, -1)

    # Only the last token that this step writes to a page stores the page's extrema, so that no
    # two rows write different values to one place.
    closes = (lengths == final_lengths)[active] | ((slot + 1) % layout.page_size == 0)
    closes &= top_r[active] > 0
    block, slot = block[closes], slot[closes]
    in_block = slot % layout.block_size
    page = in_block // layout.page_size
    member = page[:, None] * layout.page_size + torch.arange(layout.page_size, device=cache.device)
    keys = readable(tokens[block[:, None], :, member, : layout.head_dim]).transpose(1, 2)
    of_pages = extrema(keys, (member <= in_block[:, None])[:, None])
    layout.index(cache)[block, :, :, page] = of_pages.to(cache.dtype)
    if query is not None and probes is not None:
        asked = scale * scales.key
        found = probe_pages(cache, query, block_table, lengths, top_r, layout, asked)
        for written, part in zip(probes, found, strict=True):
            written.copy_(part)


def probe_pages(
    cache: Tensor,
    query: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    top_r: Tensor,
    layout: PageLayout,
    scale: float,
) -> Probes:
    """What rows ask of pages; the first part of ``policies.pages.page_probabilities``.

    Args:
        cache: ``[blocks, G, block_size, C]``, the rows' newest tokens appended.
        query: ``[T, H, D]``.
        block_table: ``[T, max_blocks]``.
        lengths: ``[T]``; 0 marks a padding row.
        top_r: Channels to read, ``[T]``; rows with 0 read everything.
        layout: Page geometry.
        scale: Logit scale, that of an fp8 cache's keys included.

    Returns:
        What they ask, of new tensors.
    """
    (rows, heads, dim), kv_heads = query.shape, cache.shape[1]
    dtype = query.dtype if cache.dtype == FP8 else cache.dtype
    grouped = query.to(dtype).float().view(rows, kv_heads, -1, dim)
    order = grouped.abs().sum(2).sort(dim=-1, descending=True, stable=True).indices
    rank = order.argsort(-1)
    read = rank < top_r[:, None, None]
    upper = grouped.sum(2) > 0
    channel = torch.arange(dim, device=query.device)
    extreme = torch.where(read, channel + dim * upper, -1).int()
    chosen = torch.where(read[:, :, None], grouped, 0.0)
    norm = grouped.abs().sum(-1)
    share = chosen.abs().sum(-1) / norm
    factor = torch.where(share > 0, scale / share.sqrt(), 1.0)

    last = (lengths.clamp(min=1) - 1).long()
    member = last[:, None] // layout.page_size * layout.page_size
    member = member + torch.arange(layout.page_size, device=query.device)
    block = block_table.long().clamp(min=0, max=len(cache) - 1)
    block = block.gather(1, member // layout.block_size)
    keys = layout.tokens(cache)[block, :, member % layout.block_size, :dim].transpose(1, 2).float()
    low, high = extrema(keys, (member <= last[:, None])[:, None]).chunk(2, -1)
    bound = torch.where(upper, high, low)
    newest = (chosen * bound.unsqueeze(2)).sum(-1) * factor
    return Probes(
        chosen.view(rows, heads, dim).to(dtype),
        extreme,
        factor.view(rows, heads),
        newest.view(rows, heads),
    )


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
    grouped = as_slots(query[there].unflatten(1, (kv_heads, group)).flatten(2), cache.dtype)
    place = parked[there].long()
    area = layout.index(cache).flatten(2)
    size = grouped.shape[-1]
    column = (place % per_block)[:, None] * size + torch.arange(size, device=cache.device)
    block = (place // per_block)[:, None, None]
    head = torch.arange(kv_heads, device=cache.device)[:, None]
    area[block, head, column[:, None]] = grouped
