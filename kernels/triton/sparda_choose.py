# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Which blocks the tokens of a prompt read: the selection of decode rows, a part at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from vllm_sparse.kernels.triton.sparda_select import select_blocks

if TYPE_CHECKING:
    from torch import Tensor
    from vllm_sparse.kernels.types import Blocks, Ranking

# Tokens whose scores exist at the same time, per head 4 bytes for each of their blocks or windows.
_SCORED_AT_ONCE = 256


def choose_blocks(
    compressed: Tensor, vectors: Tensor, table: Tensor, positions: Tensor, ranking: Ranking,
    blocks: Blocks,
) -> Tensor:  # fmt: skip
    """Same contract as :func:`vllm_sparse.kernels.reference.sparda_choose.choose_blocks`."""
    kv_heads, tokens, width = compressed.shape[1], len(positions), len(table)
    shape = (kv_heads, tokens, width + 1)
    chosen = torch.zeros(shape, dtype=torch.bool, device=compressed.device)
    rows = table.int().expand(_SCORED_AT_ONCE, -1)
    for first in range(0, tokens, _SCORED_AT_ONCE):
        here = slice(first, first + _SCORED_AT_ONCE)
        at = positions[here]
        best = select_blocks(compressed, vectors[here], rows[: len(at)], at, ranking, blocks).blocks
        # -1 marks the column beyond the last block, which is cut off.
        chosen[:, here].scatter_(2, best.transpose(0, 1).long() % shape[2], True)
    return chosen[..., :-1]
