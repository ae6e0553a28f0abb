# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Calls that no capture of a CUDA graph allows, by the names of functions and operators.

A capture records what is launched and runs nothing, so nothing can be read back. What the host
hands over is read again in every replay, when memory of a single step is long gone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

READS = {
    *("item", "tolist", "numpy", "cpu", "equal", "allclose", "nonzero", "masked_select"),
    *("bincount", "is_nonzero", "__bool__", "__int__", "__float__", "__index__", "__array__"),
    *("_local_scalar_dense", "unique", "_unique2", "unique_dim", "unique_consecutive"),
    "unique_dim_consecutive",
}
# What makes a tensor of numbers or memory of the host's, which is not pinned.
UPLOADS = {"tensor", "as_tensor", "from_numpy"}
_MASKS = torch.bool, torch.uint8


def reads_back(name: str, kwargs: Mapping[str, Any]) -> bool:
    """Whether the host has to know what is on the device to return from a call."""
    counted = name == "repeat_interleave" and kwargs.get("output_size") is None
    return counted or name in READS


def is_masked(index: Iterable[Any]) -> bool:
    """Whether an index has masks, of which the host asks how many elements are set."""
    return any(isinstance(part, torch.Tensor) and part.dtype in _MASKS for part in index)
