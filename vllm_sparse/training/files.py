# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Safetensors files of training: the Forecast that the server reads, and tensors in general."""

from __future__ import annotations

import tempfile
from typing import TYPE_CHECKING, Protocol

import torch
from safetensors.torch import save_file

from vllm_sparse.errors import ConfigError
from vllm_sparse.forecast.file import (
    BIAS,
    FORMAT_VERSION,
    SIZE_KEYS,
    canonical_name,
    serving,
    whole_number,
)
from vllm_sparse.forecast.reading import open_safetensors
from vllm_sparse.forecast.weights import load_forecast
from vllm_sparse.paths import atomic_path
from vllm_sparse.training.forecast import Forecast
from vllm_sparse.training.geometry import BlockGeometry

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor


def require_writable(folder: Path) -> None:
    """Makes a folder, and makes sure that files can be made in it.

    Raises:
        ConfigError: They cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"{folder}: no files can be written there ({error.strerror}); choose another folder"
        ) from error


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a safetensors file that is whole or not there."""
    with atomic_path(path) as target:
        save_file({name: value.contiguous() for name, value in tensors.items()}, target, metadata)


def load_tensors(
    path: Path, device: torch.device | str = "cpu"
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads the tensors and the metadata of a safetensors file.

    Raises:
        ConfigError: There is no such file, or it is of another kind.
    """
    with open_safetensors(path, device) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def export_forecast(
    path: Path,
    forecast: Forecast,
    geometry: BlockGeometry,
    base_model: str,
    history: Mapping[str, object] | None = None,
) -> None:
    """Writes a Forecast as bfloat16, with the metadata that the server checks.

    Args:
        path: The safetensors file.
        forecast: What was trained.
        geometry: The blocks it was trained for.
        base_model: The model it was trained on.
        history: How it was trained, for whoever reads the file; the server reads of it whether the
            prompts were sparse.

    Raises:
        ConfigError: Some weight is not finite.
    """
    tensors = {}
    for layer, projection in enumerate(forecast.projections):
        at, kind = serving(layer)
        for name, parameter in projection.named_parameters():
            value = parameter.detach().to(torch.bfloat16).cpu()
            if not bool(value.isfinite().all()):
                raise ConfigError(f"{path}: {name} of layer {layer} is not finite; not written")
            tensors[canonical_name(at, kind + (BIAS if name == "bias" else ""))] = value
    metadata = {
        "base_model": base_model,
        **{name: str(getattr(geometry, name)) for name in SIZE_KEYS},
        **{f"trained_{name}": str(value) for name, value in (history or {}).items()},
        "version": FORMAT_VERSION,
    }
    save_tensors(path, tensors, metadata)


class Sizes(Protocol):
    """A model's sizes: layers, width of what they see, KV heads, size of a head."""

    @property
    def num_layers(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...


def import_forecast(path: Path, backbone: Sizes) -> tuple[Forecast, BlockGeometry]:
    """Reads a Forecast of a model.

    Args:
        path: File written by :func:`export_forecast`, or converted.
        backbone: Its model, or only that model's sizes.

    Returns:
        The Forecast in float32 and its geometry.

    Raises:
        ConfigError: The file is not this model's, or does not say which blocks it was trained for.
    """
    heads, dim, hidden = backbone.num_kv_heads, backbone.head_dim, backbone.hidden_size
    future, current, metadata, future_bias, current_bias, _ = load_forecast(
        path, backbone.num_layers, heads, dim, hidden
    )
    missing = [name for name in SIZE_KEYS if name not in metadata]
    if missing:
        raise ConfigError(
            f"{path}: its metadata lacks {', '.join(missing)}, so it is unknown which blocks it "
            "was trained for. Write it with train-forecast, or convert it"
        )
    forecast = Forecast(backbone.num_layers, hidden, heads, dim, current_bias is not None)
    parts = {"weight": [current, *future]}
    if current_bias is not None:
        parts["bias"] = [current_bias, *(future_bias or [])]
    forecast.load_state_dict(
        {
            f"projections.{layer}.{name}": value.float()
            for name, values in parts.items()
            for layer, value in enumerate(values)
        }
    )
    sizes = {name: whole_number(metadata, name) for name in SIZE_KEYS if name != "kernel_size"}
    return forecast, BlockGeometry(**sizes)
