# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Exact attention over selected places of a paged cache, in PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from vllm_sparse.kernels.fp8 import UNSCALED, Scales

from vllm_sparse.policies.sinks import of_groups, softmax

if TYPE_CHECKING:
    from torch import Tensor
    from vllm_sparse.kernels.layout import PageLayout


def attend_slots(
    cache: Tensor,
    query: Tensor,
    output: Tensor,
    slots: Tensor | None,
    block_table: Tensor,
    lengths: Tensor,
    top_r: Tensor,
    *,
    layout: PageLayout,
    top_k: int,
    scale: float,
    arrived: Tensor | None = None,
    scales: Scales = UNSCALED,
    sinks: Tensor | None = None,
) -> None:
    """Exact attention over the selected tokens.

    Args:
        cache: ``[blocks, G, block_size, C]``.
        query: ``[T, H, D]``.
        output: ``[T, H, D]``, written; zero for padding rows.
        slots: :func:`select_slots`; ``None`` attends to every token.
        block_table: ``[T, max_blocks]``.
        lengths: ``[T]``; 0 marks a padding row.
        top_r: ``[T]``; rows with 0 read everything.
        layout: Page geometry.
        top_k: Tokens selected.
        scale: Logit scale.
        arrived: Zeros, int32 ``[T, G]``, for programs to count each other; changed.
        scales: Of an fp8 cache.
        sinks: Learned attention sinks, a logit of each query head, any dtype ``[H]``.
    """
    del arrived
    kv_heads, dim, size = cache.shape[1], layout.head_dim, layout.block_size
    tokens, own = layout.tokens(cache), of_groups(sinks, kv_heads)
    head = torch.arange(kv_heads, device=cache.device).unsqueeze(1)
    output.zero_()
    for row, length in enumerate(lengths.tolist()):
        if length <= 0:
            continue
        if slots is None or top_r[row] <= 0:
            token = torch.arange(length, device=cache.device)
            slot = block_table[row].long()[token // size] * size + token % size
            slot = slot.expand(kv_heads, -1)
        else:
            slot = slots[row, :, : min(length, top_k)].long()
        keys, values = tokens[slot // size, head, slot % size].float().split(dim, -1)
        grouped = query[row].float().view(kv_heads, -1, dim)
        weights = softmax(grouped @ keys.transpose(-1, -2) * (scale * scales.key), own)
        output[row] = (weights @ values * scales.value).reshape(-1, dim).to(output.dtype)
