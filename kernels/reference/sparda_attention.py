# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Exact decode attention over frames, in PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from vllm_sparse.kernels.fp8 import UNSCALED, Scales

if TYPE_CHECKING:
    from vllm_sparse.kernels.types import Unframed


def attend_frames(
    slab: Tensor,
    query: Tensor,
    output: Tensor,
    frames: Tensor,
    lengths: Tensor,
    scale: float,
    unframed: Unframed | None = None,
    scales: Scales = UNSCALED,
) -> None:
    """Exact decode attention over the frames of each token and KV head.

    Args:
        slab: ``[frames, block_size, 2 * D]``.
        query: ``[T, H, D]``.
        output: ``[T, H, D]``, written; zero for tokens of length 0.
        frames: int32 ``[T, G, K]``; the last one in use may be partly filled.
        lengths: Tokens in each token's frames, the same for all KV heads, int32 ``[T]``.
        scale: Logit scale.
        unframed: Rows that have no frames; their entry of ``lengths`` is 0.
        scales: Of an fp8 slab, whose numbers are read in the dtype of ``query``.
    """
    block_size, width = slab.shape[1:]
    dim = width // 2
    kv_heads, count = frames.shape[1:]
    rows = slab[frames.clamp(min=0).long()].float().flatten(2, 3)
    hidden = torch.arange(count * block_size, device=slab.device) >= lengths[:, None]
    # Stale frames may hold anything, NaN included, which a zero weight would not silence.
    rows = rows.masked_fill(hidden[:, None, :, None], 0.0)
    grouped = query.float().unflatten(1, (kv_heads, -1))
    logits = grouped @ rows[..., :dim].transpose(2, 3) * (scale * scales.key)
    logits = logits.masked_fill(hidden[:, None, None], float("-inf"))
    weights = torch.softmax(logits, -1).nan_to_num(0.0)
    output.copy_((weights @ rows[..., dim:] * scales.value).reshape_as(output))
    if unframed is not None:
        for row, pieces in unframed_rows(unframed):
            here = slice(row, row + 1)
            attend_frames(
                unframed.host.flatten(0, 1), query[here], output[here], pieces,
                unframed.lengths[here], scale, scales=scales,
            )  # fmt: skip


def unframed_rows(unframed: Unframed) -> list[tuple[int, Tensor]]:
    """The rows that have no frames, and the pieces of each, int32 ``[1, G, blocks]``."""
    host, table, lengths = unframed
    kv_heads, block_size = host.shape[1:3]
    head = torch.arange(kv_heads, dtype=torch.int32, device=table.device)[:, None]
    return [
        (row, (table[row, : -(-length // block_size)] * kv_heads + head)[None])
        for row, length in enumerate(lengths.tolist())
        if length
    ]
