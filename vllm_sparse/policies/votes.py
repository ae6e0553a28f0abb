# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Votes of a prompt's last queries: which of its tokens each KV head keeps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_sparse.policies import sinks as learned

if TYPE_CHECKING:
    from torch import Tensor


def select_prompt_tokens(
    query_window: Tensor,
    keys: Tensor,
    prompt_budget: int,
    kernel_size: int = 63,
    scale: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Stage 1: the prompt tokens that each KV head keeps (section 3.3, SnapKV per KV group).

    Attention probabilities of the last ``w`` prompt queries over all keys (causal, the window
    itself in the denominator) are summed over the window and the group, max-pooled along the
    sequence, and the top ``prompt_budget - w`` tokens before the window are kept with the window.
    Where heads have sinks, these are in the denominator: a head that mostly reads its own has less
    of a vote.

    Args:
        query_window: Post-RoPE queries of the last ``w`` prompt positions, ``[H, w, D]``.
        keys: Post-RoPE keys of the whole prompt, ``[G, n, D]``.
        prompt_budget: Tokens to keep, at least ``w``.
        kernel_size: Odd width of the max pool.
        scale: Logit scale, ``1 / sqrt(D)`` if omitted.
        sinks: Learned attention sinks, ``[H]``.

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
    scale = dim**-0.5 if scale is None else scale
    grouped = query_window.view(kv_heads, -1, window, dim)
    of_groups = learned.of_groups(sinks, kv_heads)
    score = torch.empty(kv_heads, prefix, dtype=torch.float32, device=keys.device)
    # One KV head at a time: [H, w, n] in float32 would be half a gigabyte at 128K tokens.
    for head in range(kv_heads):
        queries = grouped[head].reshape(-1, dim).float() * scale
        logits = (queries @ keys[head].float().T).view(-1, window, num_tokens)
        logits[..., prefix:].masked_fill_(future, -torch.inf)
        own = None if of_groups is None else of_groups[head, :, None]
        probability = learned.softmax(logits, own).view(-1, num_tokens)
        # A matrix-vector product sums rows faster than a reduction over the outer axes.
        score[head] = (probability.new_ones(len(probability)) @ probability)[:prefix]
    kept = top_indices(pooled(score, kernel_size), prompt_budget - window)
    return torch.cat((kept.sort(-1).values, everything[prefix:].expand(kv_heads, -1)), -1)


def pooled(score: Tensor, kernel_size: int) -> Tensor:
    """Max pool of odd width along the tokens, ``[G, n]``."""
    return torch.nn.functional.max_pool1d(
        score.unsqueeze(1), kernel_size, stride=1, padding=kernel_size // 2
    ).squeeze(1)


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
