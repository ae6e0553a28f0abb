# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Attention over a part of the keys, and the merging of parts, in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def attend_part(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Softmax attention over some of the keys.

    Args:
        query: ``[G, group, T, D]``.
        keys: ``[G, n, D]``.
        values: ``[G, n, D]``.
        mask: bool ``[G, T, n]``, true where a token may look; ``None`` allows all.
        causal: Token ``t`` sees keys up to ``t``; needs ``n == T`` and no mask.
        scale: Logit scale.

    Returns:
        float32 output ``[G, group, T, D]`` and log-sum-exp ``[G, group, T]``; zero and minus
        infinity where nothing is visible.
    """
    logits = query.float() @ keys.float().transpose(1, 2).unsqueeze(1) * scale
    if causal:
        mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=query.device).tril()[None]
    if mask is not None:
        logits = logits.masked_fill(~mask.unsqueeze(1), float("-inf"))
    lse = torch.logsumexp(logits, -1)
    weights = (logits - lse.unsqueeze(-1)).exp().nan_to_num(0.0)
    return weights @ values.float().unsqueeze(1), lse


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
