# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Vectors on a device that stay where they are."""

from __future__ import annotations

import torch
from torch import Tensor

_ALIGNED = 16  # bytes, by which Triton tells variants of a kernel apart


def vectors(count: int, length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros whose rows all begin where Triton expects a tensor of its own to begin.

    A kernel that was compiled for such would be compiled once more for another row.

    Args:
        count: Rows.
        length: Of each, at least.
        dtype: Of their elements.
        device: Where.

    Returns:
        ``[count, length]``, the length rounded up to 16 bytes.
    """
    each = _ALIGNED // dtype.itemsize
    return torch.zeros(count, -(-length // each) * each, dtype=dtype, device=device)
