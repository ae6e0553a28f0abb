# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The largest entries of rows, in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_sparse.policies import votes


def top_indices(score: Tensor, sizes: Tensor, counts: Tensor, max_count: int) -> Tensor:
    """Indices of the largest scores per row, ties to the lower index.

    Args:
        score: float32 ``[R, G, n]``, free of NaN.
        sizes: Entries of each row that exist, int32 ``[R]``.
        counts: How many to take, at most ``sizes``; int32 ``[R]``.
        max_count: Width of the result.

    Returns:
        Ascending, int32 ``[R, G, max_count]``; -1 from ``counts`` on.
    """
    index = torch.full((*score.shape[:2], max_count), -1, dtype=torch.int32, device=score.device)
    for row, (size, count) in enumerate(zip(sizes.tolist(), counts.tolist(), strict=True)):
        if count > 0:
            index[row, :, :count] = votes.top_indices(score[row, :, :size], count).int()
    return index
