# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""RocketKV's page scores and what they select, in PyTorch.

:func:`.decode.decode_attention` defines the step as a whole; this defines what its GPU kernels
hand to each other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vllm_sparse.policies.pages import page_tokens, select_pages
from vllm_sparse.policies.sinks import of_groups

if TYPE_CHECKING:
    from vllm_sparse.kernels.layout import PageLayout
    from vllm_sparse.kernels.types import Probes


def select_slots(
    cache: Tensor,
    probes: Probes,
    block_table: Tensor,
    lengths: Tensor,
    top_r: Tensor,
    *,
    layout: PageLayout,
    top_k: int,
    private: bool = False,
    final_lengths: Tensor | None = None,
    most_rows: int = 1,
    arrived: Tensor | None = None,
    out: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The tokens to attend to, as places in the cache.

    The newest page first, then pages by their estimated probability summed over the group, ties
    to the lower page; the lowest-ranked page may be taken in part.

    Args:
        cache: ``[blocks, G, block_size, C]``, the rows' newest tokens appended.
        probes: :func:`.append.probe_pages`.
        block_table: ``[T, max_blocks]``.
        lengths: ``[T]``; 0 marks a padding row.
        top_r: ``[T]``; rows with 0 read everything.
        layout: Page geometry.
        top_k: Tokens to select.
        private: Promises that of rows whose pages are scored only those of one request have blocks
            in common, which are ``most_rows`` at most and of consecutive lengths.
        final_lengths: Of the last of each row's request, ``[T]``; ``None``: it has no other.
        most_rows: Of a request.
        arrived: Zeros, int32 ``[T, G]``, for programs to count each other; changed.
        out: Written and returned if given.
        sinks: Learned attention sinks, a logit of each query head, any dtype ``[H]``.

    Returns:
        ``block * block_size + slot`` in ascending token order, int32
        ``[T, G, min(top_k, max_blocks * block_size)]``, of which the first ``min(top_k, length)``
        count; undefined for rows that read everything.
    """
    del private, final_lengths, most_rows, arrived
    rows, kv_heads, slots = len(lengths), cache.shape[1], out
    if slots is None:
        capacity = min(top_k, block_table.shape[1] * layout.block_size)
        slots = torch.zeros(rows, kv_heads, capacity, dtype=torch.int32, device=lengths.device)
    for row, length in enumerate(lengths.tolist()):
        if top_r[row] <= 0:
            continue
        if length <= top_k:
            token = torch.arange(max(length, 0), device=lengths.device).expand(kv_heads, -1)
            place = _places(token, block_table[row], layout)
        else:
            estimate = page_estimates(cache, probes, block_table, lengths, row, layout, sinks)
            place = best_slots(estimate, block_table[row], lengths[row], layout, top_k)
        slots[row, :, : place.shape[1]] = place
    return slots


def page_estimates(
    cache: Tensor,
    probes: Probes,
    block_table: Tensor,
    lengths: Tensor,
    row: int,
    layout: PageLayout,
    sinks: Tensor | None = None,
) -> Tensor:
    """Estimated probability of each page's tokens in a row, summed over the group.

    Args:
        cache: As of :func:`select_slots`, as the others.
        probes: Of all rows.
        block_table: ``[T, max_blocks]``.
        lengths: ``[T]``.
        row: Which one.
        layout: Page geometry.
        sinks: ``[H]``.

    Returns:
        float32 ``[G, pages]``.
    """
    kv_heads, size, length = cache.shape[1], layout.page_size, int(lengths[row])
    own = of_groups(sinks, kv_heads)
    pages, table = -(-length // size), block_table[row].long()
    bounds = layout.index(cache)[table].permute(1, 0, 3, 2).flatten(1, 2)[:, :pages]
    extreme, scale, newest = (
        part[row].unflatten(0, (kv_heads, -1))
        for part in (probes.extreme.flatten(1), probes.scale, probes.newest)
    )
    read = (extreme >= 0)[:, None]
    bounds = bounds.float().gather(2, extreme.clamp(min=0).long()[:, None].expand(-1, pages, -1))
    query = probes.query[row].float().unflatten(0, (kv_heads, -1))
    logit = query @ bounds.masked_fill(~read, 0.0).transpose(1, 2) * scale[..., None]
    logit[..., -1] = newest
    tokens = torch.full((pages,), size, device=lengths.device)
    tokens[-1] = length - (pages - 1) * size
    top = logit.amax(-1, keepdim=True)
    weight = (logit - top).exp()
    total = (weight * tokens).sum(-1, keepdim=True)
    if own is not None:
        total = total + (own[..., None] - top).exp()
    return (weight / total).sum(1)


def best_slots(
    estimate: Tensor, table: Tensor, length: Tensor, layout: PageLayout, top_k: int
) -> Tensor:
    """The places of a row's tokens with the largest estimates.

    Args:
        estimate: Of its pages, ``[G, pages]``.
        table: Its blocks, ``[max_blocks]``.
        length: Its tokens, a scalar; more than ``top_k``.
        layout: Page geometry.
        top_k: Tokens to select.

    Returns:
        Ascending by token, int32 ``[G, top_k]``.
    """
    page, taken = select_pages(estimate, length, layout.page_size, top_k)
    token = page_tokens(page, taken, layout.page_size)[:, :top_k]
    return _places(token, table, layout)


def _places(token: Tensor, table: Tensor, layout: PageLayout) -> Tensor:
    block = table.long()[token // layout.block_size]
    return (block * layout.block_size + token % layout.block_size).int()
