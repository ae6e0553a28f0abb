# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Which blocks the tokens of a prompt read, in PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from vllm_sparse.kernels.reference.sparda_select import gather_windows, window_scores

from vllm_sparse.policies import windows

if TYPE_CHECKING:
    from torch import Tensor
    from vllm_sparse.kernels.types import Blocks, Ranking

# Tokens whose window scores exist at the same time.
_SCORED_AT_ONCE = 128


def choose_blocks(
    compressed: Tensor,
    vectors: Tensor,
    table: Tensor,
    positions: Tensor,
    ranking: Ranking,
    blocks: Blocks,
) -> Tensor:
    """The blocks that each token of one request reads, of any chunk of its tokens.

    Each token's choice depends on its position and what is before it, not on the chunk.

    Args:
        compressed: ``[blocks, G, windows per block, D]``.
        vectors: ``[T, H, D]`` for a softmax, else ``[T, G, D]``.
        table: Physical blocks of the request up to its last token here, ``[n]``.
        positions: Positions of the tokens, ``[T]``.
        ranking: How to score.
        blocks: What to take; see :func:`vllm_sparse.policies.windows.select_blocks`.

    Returns:
        bool ``[G, T, n]``.
    """
    keys = gather_windows(compressed, table.long())
    kv_heads, tokens = compressed.shape[1], len(positions)
    shape = (kv_heads, tokens, len(table) + 1)
    chosen = torch.zeros(shape, dtype=torch.bool, device=compressed.device)
    for first in range(0, tokens, _SCORED_AT_ONCE):
        here = slice(first, first + _SCORED_AT_ONCE)
        at = positions[here].long()
        scores = window_scores(
            vectors[here].transpose(0, 1), keys, at - ranking.lag, ranking, blocks
        )
        best = windows.select_blocks(scores, at, **blocks._asdict())
        # -1 marks the column beyond the last block, which is cut off.
        chosen[:, here].scatter_(2, best % shape[2], True)
    return chosen[..., :-1]
