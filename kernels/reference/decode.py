# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""RocketKV decode step on a paged cache, in PyTorch.

Any device, any dtype; the definition that the CPU and GPU kernels are tested against.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from vllm_sparse.kernels.fp8 import UNSCALED, Scales
from vllm_sparse.kernels.reference.append import append_tokens

from vllm_sparse.policies.pages import extrema as extrema_of
from vllm_sparse.policies.pages import page_probabilities, select_pages
from vllm_sparse.policies.sinks import of_groups, softmax

if TYPE_CHECKING:
    from vllm_sparse.kernels.layout import PageLayout


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
    most_rows: int | None = None,
    parked: Tensor | None = None,
    per_block: int = 0,
    scales: Scales = UNSCALED,
    sinks: Tensor | None = None,
) -> None:
    """Append the rows' tokens, select with hybrid sparse attention, attend exactly.

    Args:
        cache: ``[blocks, G, block_size, C]``, modified by the append.
        query: ``[T, H, D]``.
        key: ``[T, G, D]``.
        value: ``[T, G, D]``.
        output: ``[T, H, D]``, written; zero for padding rows.
        block_table: Physical blocks of each row from its first kept block, ``[T, max_blocks]``.
        lengths: Physical tokens of each row including its own, ``[T]``; 0 marks a padding row.
        final_lengths: Physical tokens of the row's request after this step, ``[T]``; larger than
            ``lengths`` when a preempted request replays several tokens at once.
        top_r: Channels to read for each row, ``[T]``; 0 attends to every token of the row.
        layout: Page geometry.
        top_k: Tokens to attend to per KV head.
        scale: Logit scale.
        read_all: Attend to every token (stage 2 off).
        replays: A request may have several rows; false promises that ``final_lengths`` equals
            ``lengths``.
        most_rows: Of a request that has several, whose lengths are consecutive; ``None``: unknown.
        parked: Where queries wait for their prompt's compaction, as ``block * per_block + place``,
            int32 ``[T]``; -1 for none.
        per_block: Window queries that a block has room for; needed with ``parked``.
        scales: Of an fp8 cache.
        sinks: Learned attention sinks, a logit of each query head, any dtype ``[H]``.
    """
    del most_rows
    append_tokens(
        cache, key, value, block_table, lengths, final_lengths, top_r, layout,
        replays=replays, query=query, parked=parked, per_block=per_block, scales=scales,
    )  # fmt: skip
    rows, heads, dim = query.shape
    kv_heads = cache.shape[1]
    page_size, per_block = layout.page_size, layout.pages_per_block
    table = block_table.long()
    held = table.shape[1] * layout.block_size
    tokens = layout.tokens(cache)[table].transpose(1, 2).reshape(rows, kv_heads, held, 2 * dim)
    keys, values = tokens.float().split(dim, -1)
    position = torch.arange(held, device=cache.device)
    # Stored keys are in a unit of their own, which queries take over.
    grouped = query.float().view(rows, kv_heads, -1, dim) * scales.key
    own = of_groups(sinks, kv_heads)

    visible = position < lengths[:, None]
    selected = visible[:, None].expand(-1, kv_heads, -1)
    if not read_all:
        extrema = layout.index(cache)[table]
        extrema = extrema.permute(0, 2, 1, 4, 3).reshape(rows, kv_heads, -1, 2 * dim)
        # The stored extrema of the newest page may already hold tokens that come later.
        newest = (lengths.clamp_min(1) - 1) // page_size
        member = newest[:, None] * page_size + torch.arange(page_size, device=cache.device)
        newest_keys = keys.gather(2, member[:, None, :, None].expand(-1, kv_heads, -1, dim))
        bounds = extrema_of(newest_keys, (member < lengths[:, None])[:, None])
        page = torch.arange(table.shape[1] * per_block, device=cache.device)
        is_newest = (page == newest[:, None])[:, None, :, None]
        extrema = torch.where(is_newest, bounds.unsqueeze(2), extrema.float())
        # Pages nobody has written may hold anything, NaN included.
        extrema = torch.where((page > newest[:, None])[:, None, :, None], 0.0, extrema)
        probability = page_probabilities(
            grouped, extrema[..., :dim], extrema[..., dim:], lengths, page_size, top_r, scale, own
        )
        pages, taken = select_pages(probability, lengths, page_size, top_k)
        offset = torch.arange(page_size, device=cache.device)
        index = (pages.unsqueeze(-1) * page_size + offset).flatten(2)
        chosen = (offset < taken.unsqueeze(-1)).flatten(2)
        mask = torch.zeros(rows, kv_heads, held, dtype=torch.bool, device=cache.device)
        mask = mask.scatter_(2, index, chosen) | (top_r <= 0)[:, None, None]
        selected = selected & mask
    # In float64, so that what kernels differ by is their own rounding.
    grouped, keys, values = grouped.double(), keys.double(), values.double()
    logits = grouped @ keys.transpose(-1, -2) * scale
    weights = softmax(logits.masked_fill(~selected.unsqueeze(2), -torch.inf), own)
    attended = weights @ values.masked_fill(~selected.unsqueeze(-1), 0.0) * scales.value
    attended = torch.where((lengths > 0)[:, None, None, None], attended, 0.0)
    output.copy_(attended.reshape(rows, heads, dim))
