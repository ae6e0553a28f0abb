# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What kernels take and return, whichever implementation runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class Rows(NamedTuple):
    """Decode rows, one token each.

    Attributes:
        block_table: Physical blocks from the first kept one, int32 ``[R, max_blocks]``.
        lengths: Physical tokens including the row's own, int32 ``[R]``; 0 marks a padding row.
        top_r: Channels to read, int32 ``[R]``; 0 reads every token.
        parked: Where the row's query waits for its prompt's compaction, as
            ``block * per_block + place``, int32 ``[R]``; -1 for rows outside a window.
    """

    block_table: Tensor
    lengths: Tensor
    top_r: Tensor
    parked: Tensor


class PageScores(NamedTuple):
    """Estimated logits of pages, and what a softmax over their tokens needs.

    Attributes:
        logits: float32 ``[T, H, pages]``, temperature applied; anything from the newest page on.
        peak: Largest logit of each share of a row's pages, ``[T, H, shares]``.
        mass: Sum over the share's tokens of ``exp(logit - peak)``, ``[T, H, shares]``.
    """

    logits: Tensor
    peak: Tensor
    mass: Tensor
