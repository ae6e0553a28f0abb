# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Votes of a prompt's last queries: which of its tokens each KV head keeps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


DIVERSE_KERNEL = 15  # width of the max pool over unlikeness, about a sentence's core


def select_prompt_tokens(
    query_window: Tensor,
    keys: Tensor,
    prompt_budget: int,
    kernel_size: int = 63,
    *,
    sinks: int = 0,
    diverse_share: float = 0.0,
) -> Tensor:
    """Stage 1: the prompt tokens that each KV head keeps (section 3.3, SnapKV per KV group).

    Attention probabilities of the last ``w`` prompt queries over all keys (causal, the window
    itself in the denominator) are summed over the window and the group, max-pooled along the
    sequence, and the top ``prompt_budget - w`` tokens before the window are kept with the window.

    With ``sinks`` or ``diverse_share`` the rule is no longer the paper's; ``docs/quality.md`` says
    what they are good for.

    Args:
        query_window: Post-RoPE queries of the last ``w`` prompt positions, ``[H, w, D]``.
        keys: Post-RoPE keys of the whole prompt, ``[G, n, D]``.
        prompt_budget: Tokens to keep, at least ``w``.
        kernel_size: Odd width of the max pool.
        sinks: First tokens that are kept without a vote. What a query gives the rest of the prompt
            is then scaled to one, so that a query whose attention rests on the sinks has as much
            of a say as any other.
        diverse_share: Share of the places before the window that the votes do not fill: they go
            to the tokens whose keys are least like the mean key (KeyDiff, arXiv 2504.15364).

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
        weight = probability.new_ones(len(probability))
        if sinks:
            weight = 1 / probability[:, sinks:prefix].sum(-1).clamp_min(torch.finfo().tiny)
        # A matrix-vector product sums rows faster than a reduction over the outer axes.
        score[head] = (weight @ probability)[:prefix]
    score[:, :sinks] = 0
    score = pooled(score, kernel_size)
    score[:, :sinks] = torch.inf
    places = prompt_budget - window
    diverse = int(places * diverse_share)
    kept = top_indices(score, places - diverse)
    if diverse:
        unlike = pooled(unlikeness(keys[:, :prefix]), DIVERSE_KERNEL)
        unlike.scatter_(-1, kept, -torch.inf)
        kept = torch.cat((kept, top_indices(unlike, diverse)), -1)
    return torch.cat((kept.sort(-1).values, everything[prefix:].expand(kv_heads, -1)), -1)


def pooled(score: Tensor, kernel_size: int) -> Tensor:
    """Max pool of odd width along the tokens, ``[G, n]``."""
    return torch.nn.functional.max_pool1d(
        score.unsqueeze(1), kernel_size, stride=1, padding=kernel_size // 2
    ).squeeze(1)


def unlikeness(keys: Tensor) -> Tensor:
    """Minus the cosine between each key and the mean of its head's unit keys.

    Args:
        keys: ``[G, n, D]``.

    Returns:
        float32 ``[G, n]``.
    """
    found = torch.empty(keys.shape[:2], dtype=torch.float32, device=keys.device)
    for head, own in enumerate(keys):  # one at a time, as they are in float32
        unit = torch.nn.functional.normalize(own.float(), dim=-1)
        found[head] = -(unit @ torch.nn.functional.normalize(unit.mean(0), dim=0))
    return found


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
