# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Exact attention over a chosen set of tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def attend(
    query: Tensor, keys: Tensor, values: Tensor, token_index: Tensor, scale: float | None = None
) -> Tensor:
    """Softmax attention of one position over the selected tokens only.

    Args:
        query: Post-RoPE queries, ``[H, D]``.
        keys: Post-RoPE keys, ``[G, n, D]`` with ``H`` a multiple of ``G``.
        values: Values, ``[G, n, D]``.
        token_index: Selected tokens of each KV head, ``[G, k]``.
        scale: Logit scale, ``1 / sqrt(D)`` if omitted.

    Returns:
        The attention output ``[H, D]`` in the dtype of ``query``. There is no mean-value
        correction and no renormalisation by covered mass (RocketKV, section 3.4).
    """
    kv_heads, _, dim = keys.shape
    index = token_index.unsqueeze(-1).expand(-1, -1, dim)
    selected_keys = keys.gather(1, index).float()
    selected_values = values.gather(1, index).float()
    grouped = query.float().view(kv_heads, -1, dim)
    logits = grouped @ selected_keys.transpose(1, 2) * (dim**-0.5 if scale is None else scale)
    output = torch.softmax(logits, -1) @ selected_values
    return output.reshape_as(query).to(query.dtype)
