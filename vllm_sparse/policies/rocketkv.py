# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""RocketKV (arXiv 2502.14051): which prompt tokens to keep, which kept tokens to read.

Notation: H query heads, G KV heads, D head size, n tokens, w observation window.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence


class RocketKVPlan(NamedTuple):
    """How one request's token budget is split between the two stages.

    Attributes:
        capacity: Tokens held after stage 1, the tokens still to be generated included.
        prompt_budget: Tokens kept from the prompt.
        page_size: Consecutive kept tokens that share one pair of key extrema.
        top_r: Channels of the head that stage 2 reads.
        top_k: Tokens that each KV head attends to in a decode step.
        dense: Nothing to evict: the prompt fits its budget.
    """

    capacity: int
    prompt_budget: int
    page_size: int
    top_r: int
    top_k: int
    dense: bool


def plan(
    prompt_len: int,
    max_new_tokens: int,
    token_budget: int,
    head_dim: int,
    window: int = 32,
    page_sizes: Sequence[int] | None = None,
) -> RocketKVPlan:
    """Split a token budget between the stages (section 3.5, "adaptive compression decomposition").

    With ``S`` planned tokens and ratio ``c = S / token_budget``, stage 1 compresses by
    ``c ** rho``, ``rho = min(0.2 + 0.06 * log2(c), 0.8)``, and stage 2 by the rest.

    Args:
        prompt_len: Prompt tokens.
        max_new_tokens: Tokens reserved for generation; they count towards the capacity.
        token_budget: KV pairs read per KV head and decode step, half of them as estimates.
        head_dim: D.
        window: Observation window, always kept.
        page_sizes: Allowed page sizes, ascending. The paper's page size is rounded up to one of
            them (the largest if none is as large) and ``top_r`` is recomputed so that the
            estimate still reads ``token_budget / 2`` pairs. ``None`` uses the paper's value.

    Returns:
        The plan. ``top_k`` is ``token_budget // 2``.
    """
    planned = prompt_len + max_new_tokens
    ratio = max(1.0, planned / token_budget)
    rho = min(0.2 + 0.06 * math.log2(ratio), 0.8)
    capacity = max(math.floor(planned / ratio**rho), min(2 * max_new_tokens, planned))
    prompt_budget = min(max(capacity - max_new_tokens, window), prompt_len)
    return RocketKVPlan(
        capacity,
        prompt_budget,
        *stage2_geometry(capacity, token_budget, head_dim, page_sizes),
        top_k=token_budget // 2,
        dense=prompt_budget >= prompt_len,
    )


def stage2_geometry(
    held_tokens: int, token_budget: int, head_dim: int, page_sizes: Sequence[int] | None = None
) -> tuple[int, int]:
    """Page size and channel count with which stage 2 reads ``token_budget / 2`` pairs.

    Args:
        held_tokens: Tokens that stage 2 scores.
        token_budget: See :func:`plan`.
        head_dim: D.
        page_sizes: See :func:`plan`.

    Returns:
        ``(page_size, top_r)``.
    """
    ratio = max(1.0, held_tokens / token_budget)
    page_size = math.ceil(math.sqrt(ratio))
    if page_size > ratio:
        page_size = 1
    if page_sizes is not None:
        page_size = next((size for size in page_sizes if size >= page_size), max(page_sizes))
    return page_size, min(max(math.floor(head_dim * page_size / ratio), 1), head_dim)


def select_prompt_tokens(
    query_window: Tensor, keys: Tensor, prompt_budget: int, kernel_size: int = 63
) -> Tensor:
    """Stage 1: the prompt tokens that each KV head keeps (section 3.3, SnapKV per KV group).

    Attention probabilities of the last ``w`` prompt queries over all keys (causal, the window
    itself in the denominator) are summed over the window and the group, max-pooled along the
    sequence, and the top ``prompt_budget - w`` tokens before the window are kept with the window.

    Args:
        query_window: Post-RoPE queries of the last ``w`` prompt positions, ``[H, w, D]``.
        keys: Post-RoPE keys of the whole prompt, ``[G, n, D]``.
        prompt_budget: Tokens to keep, at least ``w``.
        kernel_size: Odd width of the max pool.

    Returns:
        Kept positions ``[G, min(prompt_budget, n)]``, int64, ascending; ties prefer the lower
        position.

    Raises:
        ValueError: ``prompt_budget`` is smaller than the window, or ``kernel_size`` is even.
    """
    kv_heads, num_tokens, dim = keys.shape
    window = query_window.shape[1]
    if prompt_budget < window:
        raise ValueError(f"prompt_budget={prompt_budget} is smaller than the window {window}")
    if kernel_size % 2 == 0:
        raise ValueError(f"kernel_size={kernel_size} must be odd")
    everything = torch.arange(num_tokens, device=keys.device)
    if prompt_budget >= num_tokens:
        return everything.expand(kv_heads, -1).contiguous()

    prefix = num_tokens - window
    future = torch.ones(window, window, dtype=torch.bool, device=keys.device).triu(1)
    grouped = query_window.view(kv_heads, -1, window, dim)
    score = torch.empty(kv_heads, prefix, dtype=torch.float32, device=keys.device)
    # One KV head at a time: [H, w, n] in float32 would be half a gigabyte at 128K tokens.
    for head in range(kv_heads):
        queries = grouped[head].reshape(-1, dim).float() * dim**-0.5
        logits = (queries @ keys[head].float().T).view(-1, window, num_tokens)
        logits[..., prefix:].masked_fill_(future, -torch.inf)
        probability = torch.softmax(logits, -1).view(-1, num_tokens)
        # A matrix-vector product sums rows faster than a reduction over the outer axes.
        score[head] = (probability.new_ones(len(probability)) @ probability)[:prefix]
    pooled = torch.nn.functional.max_pool1d(
        score.unsqueeze(1), kernel_size, stride=1, padding=kernel_size // 2
    ).squeeze(1)
    kept = top_indices(pooled, prompt_budget - window)
    return torch.cat((kept.sort(-1).values, everything[prefix:].expand(kv_heads, -1)), -1)


def top_indices(score: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` largest entries of the last axis, ties to the lower index.

    ``torch.topk`` leaves ties open, and pooling makes plateaus of equal scores. The threshold
    comes from ``topk``; entries equal to it are taken from the left until ``count`` is reached.

    Args:
        score: ``[..., n]``, free of NaN.
        count: At most ``n``.

    Returns:
        Ascending indices ``[..., count]``, int64.
    """
    if count == 0:
        return torch.empty(*score.shape[:-1], 0, dtype=torch.int64, device=score.device)
    threshold = score.topk(count, -1).values[..., -1:]
    above = score > threshold
    room = count - above.sum(-1, keepdim=True)
    tied = score == threshold
    chosen = above | (tied & (tied.cumsum(-1) <= room))
    # Exactly `count` per row, so a stable sort of the mask brings them to the front in order.
    return chosen.byte().sort(dim=-1, descending=True, stable=True).indices[..., :count]


def page_extrema(keys: Tensor, page_size: int) -> tuple[Tensor, Tensor]:
    """Element-wise minimum and maximum of each page of consecutive keys (section 3.4).

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


def page_probabilities(
    query: Tensor,
    key_min: Tensor,
    key_max: Tensor,
    num_tokens: Tensor,
    page_size: int,
    top_r: Tensor,
) -> Tensor:
    """Approximate attention that each page's tokens receive, per token, summed over the group.

    Section 3.4, steps 1 and 2: the ``top_r`` channels with the largest group magnitude, the
    maximum or minimum of a page by the sign of the group's sum, SparQ's temperature, and a
    softmax over tokens (every token has its page's score) before the group is summed.

    Args:
        query: Post-RoPE queries, ``[..., G, H / G, D]``.
        key_min: ``[..., G, pages, D]``.
        key_max: ``[..., G, pages, D]``.
        num_tokens: Tokens of each row, ``[...]``; pages beyond them are ignored.
        page_size: Tokens per page.
        top_r: Channels of each row, ``[...]``.

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
    temperature = (dim * selected.abs().sum(-1, keepdim=True) / norm).sqrt()
    selected = torch.where(norm > 0, selected / temperature, selected)
    positive = (query.sum(-2, keepdim=True) > 0).transpose(-1, -2)
    upper = torch.where(positive.transpose(-1, -2), selected, 0.0)
    score = upper @ key_max.float().transpose(-1, -2)
    score += (selected - upper) @ key_min.float().transpose(-1, -2)

    pages = key_min.shape[-2]
    first_token = torch.arange(pages, device=query.device) * page_size
    tokens = (num_tokens[..., None] - first_token).clamp(0, page_size)[..., None, None, :]
    score = score.masked_fill(tokens == 0, -torch.inf)
    weight = (score - score.amax(-1, keepdim=True)).exp()
    return (weight / (weight * tokens).sum(-1, keepdim=True)).sum(-2)


def select_pages(
    probability: Tensor,
    num_tokens: Tensor,
    page_size: int,
    top_k: int,
    *,
    force_newest: bool = True,
) -> tuple[Tensor, Tensor]:
    """Top-k tokens as whole pages, the last of which may be taken in part.

    Args:
        probability: :func:`page_probabilities`, ``[..., G, pages]``.
        num_tokens: ``[...]``.
        page_size: Tokens per page.
        top_k: Tokens to select.
        force_newest: Rank the page of the newest token first. The paper does not; see
            ``docs/decisions.md``.

    Returns:
        ``page_index, taken``: ``[..., G, p]`` pages by falling rank, and how many of each page's
        first tokens belong to the selection (0 for padding).
    """
    pages = probability.shape[-1]
    page = torch.arange(pages, device=probability.device)
    newest = ((num_tokens - 1) // page_size)[..., None, None]
    visible = page <= newest
    score = torch.where(visible, probability, -1.0)
    if force_newest:
        score = torch.where(page == newest, torch.inf, score)
    count = min(-(-top_k // page_size) + 1, pages)
    order = score.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    in_page = (num_tokens[..., None, None] - order * page_size).clamp(0, page_size)
    before = in_page.cumsum(-1) - in_page
    return order, (top_k - before).clamp_min(0).minimum(in_page)


def select_decode_tokens(
    query: Tensor,
    key_min: Tensor,
    key_max: Tensor,
    num_tokens: int,
    page_size: int,
    top_r: int,
    top_k: int,
    *,
    force_newest: bool = True,
) -> Tensor:
    """Stage 2: the tokens that each KV head attends to in one step (section 3.4, HSA).

    Args:
        query: Post-RoPE queries of one position, ``[H, D]``.
        key_min: Page minima in kept order, ``[G, pages, D]``.
        key_max: Page maxima, ``[G, pages, D]``.
        num_tokens: Kept tokens, the current one included.
        page_size: Tokens per page.
        top_r: Channels to read.
        top_k: Tokens to select.
        force_newest: See :func:`select_pages`.

    Returns:
        ``[G, min(top_k, num_tokens)]`` int64, ascending.
    """
    kv_heads, _, dim = key_min.shape
    count = min(top_k, num_tokens)
    tokens = torch.tensor(num_tokens, device=query.device)
    probability = page_probabilities(
        query.view(kv_heads, -1, dim),
        key_min,
        key_max,
        tokens,
        page_size,
        torch.tensor(top_r, device=query.device),
    )
    pages, taken = select_pages(probability, tokens, page_size, count, force_newest=force_newest)
    offset = torch.arange(page_size, device=query.device)
    index = pages.unsqueeze(-1) * page_size + offset
    index = index.masked_fill(offset >= taken.unsqueeze(-1), torch.iinfo(torch.int64).max)
    return index.flatten(1).sort(-1).values[:, :count]
