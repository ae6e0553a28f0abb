# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Pages of consecutive tokens: their extrema, and the best pages as tokens."""

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
