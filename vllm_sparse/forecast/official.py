# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Official SparDA checkpoints to our safetensors files and back, executing nothing in them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vllm_sparse.errors import ConfigError
from vllm_sparse.forecast.file import (
    BIAS,
    CURRENT,
    FORMAT_VERSION,
    FUTURE,
    SIZE_KEYS,
    TensorId,
    canonical_name,
    expected_tensors,
    whole_number,
)
from vllm_sparse.forecast.reading import forecast_files, read_index, read_tensors
from vllm_sparse.paths import atomic_path

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


def convert_official(source: str | Path, target: str | Path, base_model: str | None = None) -> None:
    """Convert an official SparDA checkpoint to safetensors.

    Args:
        source: A .pt, .bin or .safetensors file, or a directory of such. Nothing in it is executed.
        target: The safetensors file to write.
        base_model: Recorded in the file; default: what the checkpoint says.

    Raises:
        ConfigError: The checkpoint is not readable without executing code, incomplete or
            ambiguous.
    """
    index, metadata = read_index(forecast_files(Path(source)))
    tensors = read_tensors(index)
    _check_complete(tensors, source)
    if base_model is not None:
        metadata["base_model"] = base_model
    metadata["version"] = FORMAT_VERSION
    from safetensors.torch import save_file

    named = {canonical_name(*name): tensor.contiguous() for name, tensor in sorted(tensors.items())}
    with atomic_path(Path(target)) as partial:
        save_file(named, partial, metadata=metadata)


def export_official(source: str | Path, target: str | Path) -> None:
    """Write a checkpoint that the official SparDA code loads.

    Args:
        source: Our safetensors file, or a directory of such, with complete metadata.
        target: The .pt file to write.

    Raises:
        ConfigError: Tensors or metadata are missing.
    """
    index, metadata = read_index(forecast_files(Path(source)))
    if any(kind.endswith(BIAS) for _, kind in index):
        raise ConfigError(
            f"{source} has biases, for which the official format has no place; train with "
            "--bias false to export"
        )
    tensors = read_tensors(index)
    _check_complete(tensors, source)
    missing = [key for key in SIZE_KEYS if key not in metadata]
    if missing:
        raise ConfigError(
            f"{source} does not say {', '.join(missing)}, which the official format records; "
            "save the file with these metadata"
        )
    value = {key: whole_number(metadata, key) for key in SIZE_KEYS}
    content: dict[str, Any] = {
        "model_state_dict": {canonical_name(*name): t for name, t in sorted(tensors.items())},
        "sparse_config": {
            "kernel_size": value["kernel_size"],
            "kernel_stride": value["kernel_stride"],
            "init_blocks": value["init_blocks"],
            "block_size": value["block_size"],
            "window_size": value["local_blocks"] * value["block_size"],
            "topk": value["top_k"] - value["local_blocks"],
        },
    }
    if "base_model" in metadata:
        content["base_model_path"] = metadata["base_model"]
    with atomic_path(Path(target)) as partial:
        torch.save(content, partial)


def _check_complete(tensors: Mapping[TensorId, Tensor], source: str | Path) -> None:
    if not tensors:
        raise ConfigError(
            f"{source} holds no Forecast: no tensor's name ends in "
            f"layers.N.self_attn.{FUTURE}.weight or layers.0.self_attn.{CURRENT}.weight"
        )
    last = max((layer for layer, kind in tensors if kind == FUTURE), default=-1)
    needed = expected_tensors(last + 2)
    if any(kind.endswith(BIAS) for _, kind in tensors):  # all have one, or none has
        needed += expected_tensors(last + 2, BIAS)
    missing = [canonical_name(*name) for name in needed if name not in tensors]
    if missing:
        raise ConfigError(f"{source} is incomplete; missing: {', '.join(missing)}")
    matrices, biases = (
        {tuple(tensor.shape) for (_, kind), tensor in tensors.items() if kind.endswith(BIAS) == of}
        for of in (False, True)
    )
    shape = next(iter(matrices))
    if len(matrices) > 1 or len(shape) != 2 or biases - {shape[:1]}:
        listed = ", ".join(
            f"{canonical_name(*name)} {list(tensor.shape)}" for name, tensor in tensors.items()
        )
        raise ConfigError(
            f"{source}: expected matrices of one shape, and biases of as many rows, got {listed}"
        )
