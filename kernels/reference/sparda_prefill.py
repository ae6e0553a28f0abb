# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Attention over a part of the keys, and the merging of parts, in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def attend_part(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    chosen: Tensor | None,
    scale: float,
    *,
    first_position: int = 0,
    block_size: int = 0,
    past_from: int | None = None,
    total: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over some of the keys.

    Args:
        query: ``[G, group, T, D]``.
        keys: ``[G, n, D]``, of consecutive positions; blocks that nobody chose may be garbage.
            Those of fp8 are read in the dtype of ``query``, their scale is the caller's.
        values: ``[G, n, D]``.
        chosen: Blocks that each token may read, bool ``[G, T, blocks]``; ``None`` allows all.
        scale: Logit scale.
        first_position: Position of the first key.
        block_size: Tokens per block; needed with ``chosen``.
        past_from: Position of the first query: no token sees keys of later positions. ``None``
            hides nothing.
        total: What is returned for other keys, to merge this part with, in place.

    Returns:
        ``total``, or new: float32 output ``[G, group, T, D]`` and log-sum-exp ``[G, group, T]``;
        zero and minus infinity where nothing is visible.
    """
    sizes = query.shape[2], keys.shape[1]
    mask = visible(*sizes, chosen, first_position, block_size, past_from, keys.device)
    keys, values = keys.float(), values.float()
    logits = query.float() @ keys.transpose(1, 2).unsqueeze(1) * scale
    if mask is not None:
        logits = logits.masked_fill(~mask.unsqueeze(1), float("-inf"))
        values = values.masked_fill(~mask.any(1).unsqueeze(-1), 0)
    lse = torch.logsumexp(logits, -1)
    weights = (logits - lse.unsqueeze(-1)).exp().nan_to_num(0.0)
    part = weights @ values.unsqueeze(1), lse
    if total is None:
        return part
    for place, merged in zip(total, merge_parts(*total, *part), strict=True):
        place.copy_(merged)
    return total


def visible(
    tokens: int,
    num_keys: int,
    chosen: Tensor | None,
    first_position: int,
    block_size: int,
    past_from: int | None,
    device: torch.device | None = None,
) -> Tensor | None:
    """The keys that tokens may read, token by token.

    Args:
        tokens: Query tokens.
        num_keys: Keys, of consecutive positions.
        chosen: Blocks that each token may read, bool ``[G, T, blocks]``; ``None`` allows all.
        first_position: Position of the first key.
        block_size: Tokens per block; needed with ``chosen``.
        past_from: Position of the first query, to hide later keys; ``None`` hides nothing.
        device: Where the mask is made, unless ``chosen`` says it.

    Returns:
        bool ``[G or 1, tokens, num_keys]``; ``None`` allows all.
    """
    device = device if chosen is None else chosen.device
    position = first_position + torch.arange(num_keys, device=device)
    mask = None
    if chosen is not None:
        mask = chosen[..., position // block_size].bool()
    if past_from is not None:
        own = past_from + torch.arange(tokens, device=device)
        past = (position <= own[:, None])[None]
        mask = past if mask is None else mask & past
    return mask


def merge_parts(
    output: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint parts.

    Args:
        output: float32 ``[..., D]`` of the first part.
        lse: ``[...]``; minus infinity where it was empty.
        part: The second part's output.
        part_lse: Its log-sum-exp.

    Returns:
        Output and log-sum-exp of both.
    """
    total = torch.logaddexp(lse, part_lse)
    first, second = ((x - total).exp().nan_to_num(0.0).unsqueeze(-1) for x in (lse, part_lse))
    return output * first + part * second, total
