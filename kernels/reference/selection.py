# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""SparDA's block selection for decode rows over paged compressed keys, in PyTorch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vllm_sparse.policies import sparda


class Ranking(NamedTuple):
    """How vectors rank windows.

    Attributes:
        softmax: Softmax of each query head, summed over its group (InfLLM-v2); else the raw dot
            product of one vector per KV head (Forecast).
        scale: Logit scale of the softmax.
        lag: Windows are those complete this many positions before the token.
    """

    softmax: bool
    scale: float = 1.0
    lag: int = 0


class Blocks(NamedTuple):
    """Which blocks are read; see :func:`vllm_sparse.policies.sparda.select_blocks`."""

    block_size: int
    kernel_stride: int
    init_blocks: int
    local_blocks: int
    top_k: int


def gather_windows(compressed: Tensor, table: Tensor) -> Tensor:
    """Compressed keys of requests.

    A window is stored with the block of its last token, so the first slot of a request's first
    block is none and is left out.

    Args:
        compressed: ``[blocks, G, windows per block, D]``.
        table: Physical blocks, int64 ``[..., blocks]``.

    Returns:
        ``[..., G, windows, D]``; windows that are not complete yet hold anything.
    """
    return compressed[table].transpose(-3, -4).flatten(-3, -2)[..., 1:, :]


def select_blocks(
    compressed: Tensor,
    vectors: Tensor,
    table: Tensor,
    positions: Tensor,
    ranking: Ranking,
    blocks: Blocks,
) -> Tensor:
    """The blocks that each decode row reads.

    Args:
        compressed: ``[blocks, G, windows per block, D]``.
        vectors: ``[R, H, D]`` for a softmax, else ``[R, G, D]``.
        table: Physical blocks of each row, int64 ``[R, blocks]``.
        positions: Position of each row's token, int64 ``[R]``.
        ranking: How to score.
        blocks: What to take.

    Returns:
        Logical blocks, int64 ``[R, G, top_k]``, ascending, padded with -1.
    """
    keys = gather_windows(compressed, table)
    at = positions[:, None]
    if ranking.softmax:
        scores = sparda.query_scores(
            vectors.unsqueeze(2),
            keys,
            at - ranking.lag,
            kernel_size=2 * blocks.kernel_stride,
            kernel_stride=blocks.kernel_stride,
            scale=ranking.scale,
        )
    else:
        # A complete window never depends on a later token; others may hold anything.
        ends = torch.arange(keys.shape[2], device=keys.device) + 2
        hidden = ends * blocks.kernel_stride > at - ranking.lag + 1
        scores = sparda.forecast_scores(vectors.unsqueeze(2), keys)
        scores = scores.masked_fill(hidden[:, None, None], float("-inf"))
    chosen = sparda.select_blocks(
        scores,
        at,
        block_size=blocks.block_size,
        init_blocks=blocks.init_blocks,
        local_blocks=blocks.local_blocks,
        top_k=blocks.top_k,
        kernel_stride=blocks.kernel_stride,
    )
    return chosen.squeeze(2)
