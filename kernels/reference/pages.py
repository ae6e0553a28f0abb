# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""RocketKV's page scores and what they select, in PyTorch.

:func:`.decode.decode_attention` defines the step as a whole; these define what its GPU kernels
hand to each other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from vllm_sparse.kernels.types import PageScores

from vllm_sparse.policies.pages import page_tokens, select_pages

if TYPE_CHECKING:
    from vllm_sparse.kernels.layout import PageLayout


def score_pages(
    cache: Tensor,
    query: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    top_r: Tensor,
    *,
    layout: PageLayout,
    top_k: int,
) -> PageScores:
    """Estimate each page's logit from ``top_r`` channels of its extrema.

    The logits behind ``policies.rocketkv.page_probabilities``; the newest page's extrema come
    from its keys, of which the row may see fewer than are stored.

    Args:
        cache: ``[blocks, G, block_size, C]``, the rows' newest tokens appended.
        query: ``[T, H, D]``.
        block_table: ``[T, max_blocks]``.
        lengths: ``[T]``; 0 marks a padding row.
        top_r: ``[T]``; rows with 0 read everything.
        layout: Page geometry.
        top_k: Rows of at most this many tokens need no scores and may be left out.

    Returns:
        The scores, in one share; undefined for rows of at most ``top_k`` tokens and for those that
        read everything.
    """
    rows, heads, dim = query.shape
    kv_heads, page_size = cache.shape[1], layout.page_size
    width = block_table.shape[1] * layout.pages_per_block
    logits = torch.zeros(rows, heads, width, device=cache.device)
    peak = torch.zeros(rows, heads, 1, device=cache.device)
    mass = torch.ones(rows, heads, 1, device=cache.device)
    for row, length in enumerate(lengths.tolist()):
        if length <= max(top_k, 0) or top_r[row] <= 0:
            continue
        pages = -(-length // page_size)
        table = block_table[row].long()
        bounds = layout.extrema(cache)[table].permute(1, 0, 3, 2).flatten(1, 2)[:, :pages].float()
        keys = layout.tokens(cache)[table].transpose(0, 1).flatten(1, 2)[..., :dim].float()
        newest = keys[:, (pages - 1) * page_size : length]
        bounds = bounds.clone()
        bounds[:, -1] = torch.cat((newest.amin(1), newest.amax(1)), -1)
        grouped = query[row].float().view(kv_heads, -1, dim)
        order = grouped.abs().sum(1).sort(dim=-1, descending=True, stable=True).indices
        for head in range(kv_heads):
            q = grouped[head]
            channel = order[head, : int(top_r[row])]
            side = torch.where(q.sum(0) > 0, dim, 0)[channel] + channel
            norm = q.abs().sum(-1)
            temperature = (dim * q[:, channel].abs().sum(-1) / norm).sqrt()
            temperature = torch.where(norm > 0, temperature, 1.0)
            logit = q[:, channel] @ bounds[head][:, side].T / temperature[:, None]
            group = slice(head * len(q), (head + 1) * len(q))
            logits[row, group, :pages] = logit
            peak[row, group, 0] = logit.amax(-1)
            tokens = torch.full((pages,), page_size, device=cache.device)
            tokens[-1] = newest.shape[1]
            mass[row, group, 0] = ((logit - logit.amax(-1, keepdim=True)).exp() * tokens).sum(-1)
    return PageScores(logits, peak, mass)


def select_slots(
    scores: PageScores,
    block_table: Tensor,
    lengths: Tensor,
    top_r: Tensor,
    *,
    layout: PageLayout,
    top_k: int,
    kv_heads: int,
    out: Tensor | None = None,
) -> Tensor:
    """The tokens to attend to, as places in the cache.

    The newest page first, then pages by their probability summed over the group, ties to the
    lower page; the lowest-ranked page may be taken in part.

    Args:
        scores: :func:`score_pages`.
        block_table: ``[T, max_blocks]``.
        lengths: ``[T]``; 0 marks a padding row.
        top_r: ``[T]``; rows with 0 read everything.
        layout: Page geometry.
        top_k: Tokens to select.
        kv_heads: G.
        out: Written and returned if given.

    Returns:
        ``block * block_size + slot`` in ascending token order, int32
        ``[T, G, min(top_k, max_blocks * block_size)]``, of which the first ``min(top_k, length)``
        count; undefined for rows that read everything.
    """
    rows = len(lengths)
    capacity = min(top_k, block_table.shape[1] * layout.block_size)
    slots = out
    if slots is None:
        slots = torch.zeros(rows, kv_heads, capacity, dtype=torch.int32, device=lengths.device)
    for row, length in enumerate(lengths.tolist()):
        if top_r[row] <= 0:
            continue
        count = min(length, top_k)
        if length <= top_k:
            token = torch.arange(max(length, 0), device=lengths.device).expand(kv_heads, -1)
        else:
            pages = -(-length // layout.page_size)
            logit, peak, mass = (part[row].unflatten(0, (kv_heads, -1)) for part in scores)
            top = peak.amax(-1, keepdim=True)
            total = (mass * (peak - top).exp()).sum(-1, keepdim=True)
            probability = ((logit[..., :pages] - top).exp() / total).sum(1)
            page, taken = select_pages(probability, lengths[row], layout.page_size, top_k)
            token = page_tokens(page, taken, layout.page_size)[:, :count]
        block = block_table[row].long()[token // layout.block_size]
        slots[row, :, :count] = (block * layout.block_size + token % layout.block_size).int()
    return slots
