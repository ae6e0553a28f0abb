# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Pages of consecutive tokens: their extrema, their scores, and the best pages as tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def page_extrema(keys: Tensor, page_size: int) -> tuple[Tensor, Tensor]:
    """Element-wise minimum and maximum of each page of consecutive keys (RocketKV, section 3.4).

    Args:
        keys: ``[G, n, D]``; the last page may be partial.
        page_size: Tokens per page.

    Returns:
        ``key_min, key_max``, each ``[G, ceil(n / page_size), D]``.
    """
    kv_heads, num_tokens, dim = keys.shape
    pages = -(-num_tokens // page_size)
    # Repeating the last key fills the last page without changing its extrema.
    padding = keys[:, -1:].expand(-1, pages * page_size - num_tokens, -1)
    paged = torch.cat((keys, padding), 1).view(kv_heads, pages, page_size, dim)
    return paged.amin(2), paged.amax(2)


def extrema(keys: Tensor, present: Tensor) -> Tensor:
    """Minima and maxima of pages of which some tokens may be absent.

    Args:
        keys: ``[..., page_size, D]``.
        present: bool, broadcastable to ``[..., page_size]``.

    Returns:
        ``[..., 2 * D]``: minima, then maxima.
    """
    absent = ~present.unsqueeze(-1)
    low = keys.masked_fill(absent, torch.inf).amin(-2)
    high = keys.masked_fill(absent, -torch.inf).amax(-2)
    return torch.cat((low, high), -1)


def page_probabilities(
    query: Tensor,
    key_min: Tensor,
    key_max: Tensor,
    num_tokens: Tensor,
    page_size: int,
    top_r: Tensor,
    scale: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Approximate attention that each page's tokens receive, per token, summed over the group.

    RocketKV, section 3.4, steps 1 and 2: the ``top_r`` channels with the largest group magnitude,
    the maximum or minimum of a page by the sign of the group's sum, SparQ's temperature, and a
    softmax over tokens (every token has its page's score) before the group is summed. A head's sink
    is one more entry of its softmax, so that one that mostly reads it counts for less.

    Args:
        query: Post-RoPE queries, ``[..., G, H / G, D]``.
        key_min: ``[..., G, pages, D]``.
        key_max: ``[..., G, pages, D]``.
        num_tokens: Tokens of each row, ``[...]``; pages beyond them are ignored.
        page_size: Tokens per page.
        top_r: Channels of each row, ``[...]``.
        scale: Logit scale, ``1 / sqrt(D)`` if omitted, as in SparQ; the temperature divides it by
            the root of the share of the query that the channels hold.
        sinks: Learned attention sinks, ``[G, H / G]``.

    Returns:
        ``[..., G, pages]`` float32, zero for pages beyond ``num_tokens``.
    """
    query = query.float()
    dim = query.shape[-1]
    magnitude = query.abs().sum(-2)
    rank = magnitude.sort(dim=-1, descending=True, stable=True).indices.argsort(-1)
    kept = rank < top_r[..., None, None]
    selected = query * kept.unsqueeze(-2)
    norm = query.abs().sum(-1, keepdim=True)
    share = selected.abs().sum(-1, keepdim=True) / norm
    sharpness = (dim**-0.5 if scale is None else scale) / share.sqrt()
    # A head of which the channels hold nothing votes evenly.
    selected = torch.where(share > 0, selected * sharpness, selected)
    positive = (query.sum(-2, keepdim=True) > 0).transpose(-1, -2)
    upper = torch.where(positive.transpose(-1, -2), selected, 0.0)
    score = upper @ key_max.float().transpose(-1, -2)
    score += (selected - upper) @ key_min.float().transpose(-1, -2)

    pages = key_min.shape[-2]
    first_token = torch.arange(pages, device=query.device) * page_size
    tokens = (num_tokens[..., None] - first_token).clamp(0, page_size)[..., None, None, :]
    score = score.masked_fill(tokens == 0, -torch.inf)
    top = score.amax(-1, keepdim=True)
    weight = (score - top).exp()
    total = (weight * tokens).sum(-1, keepdim=True)
    if sinks is not None:
        total = total + (sinks.float().unsqueeze(-1) - top).exp()
    return (weight / total).sum(-2)


def select_pages(
    score: Tensor,
    num_tokens: Tensor,
    page_size: int,
    top_k: int,
    *,
    force_newest: bool = True,
) -> tuple[Tensor, Tensor]:
    """Top-k tokens as whole pages, the last of which may be taken in part.

    Args:
        score: ``[..., G, pages]``.
        num_tokens: ``[...]``.
        page_size: Tokens per page.
        top_k: Tokens to select.
        force_newest: Rank the page of the newest token first. RocketKV's paper does not; see
            ``docs/decisions.md``.

    Returns:
        ``page_index, taken``: ``[..., G, p]`` pages by falling rank, ties to the lower page, and
        how many of each page's first tokens belong to the selection (0 for padding).
    """
    pages = score.shape[-1]
    page = torch.arange(pages, device=score.device)
    newest = ((num_tokens - 1) // page_size)[..., None, None]
    score = torch.where(page <= newest, score, -torch.inf)
    if force_newest:
        score = torch.where(page == newest, torch.inf, score)
    count = min(-(-top_k // page_size) + 1, pages)
    order = score.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    in_page = (num_tokens[..., None, None] - order * page_size).clamp(0, page_size)
    before = in_page.cumsum(-1) - in_page
    return order, (top_k - before).clamp_min(0).minimum(in_page)


def page_tokens(pages: Tensor, taken: Tensor, page_size: int) -> Tensor:
    """The tokens behind :func:`select_pages`.

    Args:
        pages: ``[..., p]``.
        taken: First tokens of each page, ``[..., p]``.
        page_size: Tokens per page.

    Returns:
        Ascending positions, int64 ``[..., p * page_size]``; those not taken come last, as the
        largest int64.
    """
    offset = torch.arange(page_size, device=pages.device)
    index = pages.unsqueeze(-1) * page_size + offset
    index = index.masked_fill(offset >= taken.unsqueeze(-1), torch.iinfo(torch.int64).max)
    return index.flatten(-2).sort(-1).values
