# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Partial attention through PyTorch's CPU flash attention."""

from __future__ import annotations

import torch
from torch import Tensor
from vllm_sparse.kernels.reference.sparda_prefill import visible

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def attend_part(
    query: Tensor, keys: Tensor, values: Tensor, chosen: Tensor | None, causal: bool,
    scale: float, *, first_position: int = 0, block_size: int = 0, past_from: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Softmax attention over some of the keys; arguments as the reference explains them."""
    if not (query.numel() and keys.numel()):  # which the kernel does not survive
        return query.new_zeros(query.shape).float(), query.new_full(
            query.shape[:3], -torch.inf
        ).float()
    mask = None
    if not causal:
        mask = visible(query.shape[2], keys.shape[1], chosen, first_position, block_size, past_from)
    kv_heads, group, tokens, _ = query.shape
    if causal:
        # One query head after the other: the kernel wants as many key heads as query heads.
        wide = (x.unsqueeze(1).expand(-1, group, -1, -1).flatten(0, 1) for x in (keys, values))
        output, lse = _flash(
            query.flatten(0, 1)[None], *(x[None] for x in wide), 0.0, True, scale=scale
        )
    elif mask is None:
        flat = query.reshape(1, kv_heads, group * tokens, -1)
        output, lse = _flash(flat, keys[None], values[None], 0.0, False, scale=scale)
    else:
        blind = torch.where(mask, 0.0, float("-inf")).to(query.dtype)[None]
        both = keys[None], values[None]
        parts = [
            _flash(query[None, :, member], *both, 0.0, False, attn_mask=blind, scale=scale)
            for member in range(group)
        ]
        output = torch.stack([part[0][0] for part in parts], 1)
        lse = torch.stack([part[1][0] for part in parts], 1)
        # The kernel reports a sum of one where nothing was visible.
        lse = lse.masked_fill(~mask.any(-1).unsqueeze(1), float("-inf"))
    shape = (kv_heads, group, tokens)
    return output.reshape(*shape, -1).float(), lse.reshape(shape)
