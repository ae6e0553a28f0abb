# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""A decode step of any policy, in PyTorch: store, index, select, attend. Capturable in a graph."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_sparse.kernels.fp8 import FP8, UNSCALED, Scales, encode, readable
from vllm_sparse.policies.sinks import of_groups, softmax

if TYPE_CHECKING:
    from torch import Tensor

    from vllm_sparse.kernels.layout import PageLayout
    from vllm_sparse.kv.tail.codec import Reader
    from vllm_sparse.policies.protocol import Policy

# Bytes that the gathered index of some rows may take; it is as wide as the longest row may be.
MOST_INDEX_BYTES = 256 << 20
# Of an element of a key or value that is gathered: two indices, and a number.
_GATHERED_BYTES = 2 * 8 + 4


def store_tokens(
    cache: Tensor,
    key: Tensor,
    value: Tensor,
    block: Tensor,
    slot: Tensor,
    layout: PageLayout,
    scales: Scales = UNSCALED,
) -> None:
    """Write tokens as plain rows.

    Args:
        cache: ``[blocks, G, block_size, C]``, changed.
        key: ``[T, G, D]``.
        value: ``[T, G, D]``.
        block: int64 ``[T]``; padding rows write to vLLM's null block, which nobody reads.
        slot: Places in the block, int64 ``[T]``.
        layout: Page geometry.
        scales: Of an fp8 cache.
    """
    rows = [
        encode(part, cache.dtype, scale, scales.truncates)
        for part, scale in ((key, scales.key), (value, scales.value))
    ]
    layout.tokens(cache)[block, :, slot] = torch.cat(rows, -1)


def store_index(
    cache: Tensor,
    block: Tensor,
    slot: Tensor,
    *,
    policy: Policy,
    reader: Reader,
    layout: PageLayout,
) -> None:
    """Build the index of the pages that hold these tokens, as far as the tokens go.

    Args:
        cache: ``[blocks, G, block_size, C]``, changed.
        block: Blocks of the last token that is written to each page, int64 ``[n]``.
        slot: Their places in the block, int64 ``[n]``.
        policy: Builds the index.
        reader: Reads keys.
        layout: Page geometry.
    """
    size, kv_heads = layout.page_size, cache.shape[1]
    page = slot // size
    member = page[:, None] * size + torch.arange(size, device=slot.device)
    head = torch.arange(kv_heads, device=slot.device)[:, None]
    rows = readable(reader.at(cache, block[:, None, None], head, member[:, None]))
    index = policy.index(rows[..., : layout.head_dim], (member <= slot[:, None])[:, None])
    layout.index(cache)[block, :, :, page] = index.to(cache.dtype)


def rows_at_once(policy: Policy, kv_heads: int, pages: int) -> int:
    """How many rows with so many pages are scored together; without an index, nothing is scored."""
    scored = policy.index_width + policy.shape.group_size if policy.index_width else 0
    return _rows_within(4 * kv_heads * pages * scored)


def _rows_within(row_bytes: int) -> int:
    return max(1, MOST_INDEX_BYTES // max(1, row_bytes))


def select_tokens(
    cache: Tensor,
    query: Tensor,
    table: Tensor,
    lengths: Tensor,
    *,
    policy: Policy,
    reader: Reader,
    layout: PageLayout,
    scales: Scales = UNSCALED,
) -> Tensor:
    """The tokens that each KV head reads.

    Args:
        cache: ``[blocks, G, block_size, C]``.
        query: ``[R, H, D]``.
        table: Physical blocks, int64 ``[R, blocks]``.
        lengths: Tokens that each row sees, ``[R]``; 0 for padding rows.
        policy: Selects.
        reader: Reads keys.
        layout: Page geometry.
        scales: Of an fp8 cache.

    Returns:
        Positions, int64 ``[R, G, min(top_k, blocks * block_size)]``, ascending, of which the first
        ``min(top_k, length)`` count.
    """
    assert policy.top_k is not None
    held = table.shape[1] * layout.block_size
    width, kv_heads = min(policy.top_k, held), cache.shape[1]
    if cache.dtype == FP8:
        query = query.float() * scales.key
    grouped = query.unflatten(1, (kv_heads, -1))
    step = rows_at_once(policy, kv_heads, table.shape[1] * layout.pages_per_block)
    parts = []
    for first in range(0, len(table), step):
        here = slice(first, first + step)
        part = table[here], lengths[here].long()
        index = _index(cache, *part, policy, reader, layout) if policy.index_width else None
        parts.append(policy.select(grouped[here], index, part[1], layout.page_size, width))
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).clamp(max=held - 1)


def _index(
    cache: Tensor,
    table: Tensor,
    lengths: Tensor,
    policy: Policy,
    reader: Reader,
    layout: PageLayout,
) -> Tensor:
    """The index of each row's pages, ``[R, G, pages, index_width]``.

    The newest page's comes from its keys: the stored one may hold tokens that come later, where a
    preempted request computes several at once.
    """
    rows, kv_heads, size = len(table), cache.shape[1], layout.page_size
    index = (
        readable(layout.index(cache)[table])
        .permute(0, 2, 1, 4, 3)
        .reshape(rows, kv_heads, -1, layout.channels)
    )
    newest = (lengths - 1).clamp(min=0) // size
    member = newest[:, None] * size + torch.arange(size, device=lengths.device)
    block = table.gather(1, member // layout.block_size)
    head = torch.arange(kv_heads, device=lengths.device)[:, None]
    keys = readable(reader.at(cache, block[:, None], head, (member % layout.block_size)[:, None]))
    present = (member < lengths[:, None])[:, None]
    built = policy.index(keys[..., : layout.head_dim], present).to(index.dtype)
    place = newest[:, None, None, None].expand(-1, kv_heads, 1, layout.channels)
    return index.scatter(2, place, built.unsqueeze(2))


def attend_tokens(
    cache: Tensor,
    query: Tensor,
    output: Tensor,
    positions: Tensor,
    table: Tensor,
    lengths: Tensor,
    *,
    reader: Reader,
    layout: PageLayout,
    scale: float,
    scales: Scales = UNSCALED,
    sinks: Tensor | None = None,
) -> None:
    """Exact attention over selected tokens, wherever they lie.

    Args:
        cache: ``[blocks, G, block_size, C]``.
        query: ``[R, H, D]``.
        output: ``[R, H, D]``, written; zero for padding rows.
        positions: int64 ``[R, G, width]``, of which the first ``min(width, length)`` count.
        table: Physical blocks, int64 ``[R, blocks]``.
        lengths: Tokens that each row sees, ``[R]``.
        reader: Reads keys and values.
        layout: Page geometry.
        scale: Logit scale.
        scales: Of an fp8 cache.
        sinks: Learned attention sinks, ``[H]``.
    """
    kv_heads, width = positions.shape[1:]
    size, device = layout.block_size, table.device
    head, place = torch.arange(kv_heads, device=device)[:, None], torch.arange(width, device=device)
    step = _rows_within(_GATHERED_BYTES * kv_heads * width * 2 * layout.head_dim)
    for first in range(0, len(table), step):
        here = slice(first, first + step)
        token, seen = positions[here], lengths[here, None]
        block = table[here, None].expand(-1, kv_heads, -1).gather(2, token // size)
        rows = reader.at(cache, block, head, token % size).float()
        hidden = (place >= seen)[:, None, :, None]
        # What lies beyond a row may be NaN, which a weight of zero would not silence.
        keys, values = rows.masked_fill(hidden, 0.0).split(layout.head_dim, -1)
        grouped = query[here].float().unflatten(1, (kv_heads, -1))
        logits = (grouped @ keys.transpose(-1, -2) * (scale * scales.key)).masked_fill(
            hidden.transpose(-1, -2), -torch.inf
        )
        weights = softmax(logits, of_groups(sinks, kv_heads))
        attended = (weights @ values * scales.value).flatten(1, 2)
        output[here] = torch.where((seen > 0)[..., None], attended, 0.0)
