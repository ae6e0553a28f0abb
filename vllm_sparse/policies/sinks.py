# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Softmax with learned attention sinks (gpt-oss, arXiv 2508.10925).

A sink is a logit of each query head's own that takes part in every softmax and stands for no token:
a head that finds nothing to read gives its weight there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def softmax(logits: Tensor, sinks: Tensor | None) -> Tensor:
    """What tokens get of a softmax over the last axis.

    Args:
        logits: float32 or float64 ``[..., n]``.
        sinks: Logits beside them, broadcastable to ``[...]``; ``None`` where there are none.

    Returns:
        ``[..., n]``; sums to less than one where there is a sink.
    """
    if sinks is None:
        return logits.softmax(-1)
    total = torch.logaddexp(logits.logsumexp(-1), sinks.float())
    return (logits - total.unsqueeze(-1)).exp()


def of_groups(sinks: Tensor | None, kv_heads: int) -> Tensor | None:
    """Sinks ``[H]`` as ``[G, H / G]``, in float32."""
    return None if sinks is None else sinks.float().view(kv_heads, -1)
