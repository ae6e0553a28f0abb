# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Forecast files: the names of their tensors and metadata.

A Forecast is one matrix ``[G * D, hidden]`` for every layer but the last (``q_future_proj``, which
speaks for the next layer) and one more for layer 0 (``q_curr_proj``, for itself). Models whose
queries have a bias may have one ``[G * D]`` for each matrix.

Notation: G KV heads, D head size.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from vllm_sparse.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

FUTURE, CURRENT = "q_future_proj", "q_curr_proj"
BIAS = ".bias"  # of a kind; the official format has none, ours may
FORMAT_VERSION = "1"
SIZE_KEYS = ("block_size", "kernel_size", "kernel_stride", "local_blocks", "init_blocks", "top_k")
SPARSE_FORWARD = "trained_sparse_forward"  # "True": on prompts that were read sparsely
METADATA_KEYS = ("base_model", *SIZE_KEYS, SPARSE_FORWARD, "version")
SAFETENSORS_SUFFIX = ".safetensors"
TORCH_SUFFIXES = (".pt", ".pth", ".bin")

_KEY = re.compile(rf"(?:^|\.)layers\.(\d+)\.self_attn\.({FUTURE}|{CURRENT})\.(weight|bias)$")

TensorId = tuple[int, str]  # layer, FUTURE or CURRENT, with or without BIAS


def canonical_name(layer: int, kind: str) -> str:
    """Returns the name that a tensor has in our files."""
    return f"model.layers.{layer}.self_attn.{kind}{'' if kind.endswith(BIAS) else '.weight'}"


def tensor_id(key: str) -> TensorId | None:
    """Returns the tensor that a name under any prefix means, None if it is none of a Forecast."""
    found = _KEY.search(key)
    return (int(found[1]), found[2] + (BIAS if found[3] == "bias" else "")) if found else None


def serving(layer: int) -> TensorId:
    """Returns the projection that says what a layer will read: its own in layer 0."""
    return (layer - 1, FUTURE) if layer else (0, CURRENT)


def expected_tensors(num_layers: int, suffix: str = "") -> list[TensorId]:
    """Returns the projections of a model, or their biases if ``suffix`` is ``BIAS``."""
    return [(at, kind + suffix) for at, kind in map(serving, range(num_layers))]


def whole_number(metadata: Mapping[str, Any], key: str) -> int:
    """Returns a number of the metadata.

    Raises:
        ConfigError: It is none.
    """
    try:
        return int(metadata[key])
    except (TypeError, ValueError):
        raise ConfigError(
            f"the Forecast's {key} should be a whole number, got {metadata[key]!r}"
        ) from None
