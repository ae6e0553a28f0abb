# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The Forecast file that the server reads, and writing files so that no half of one is left."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

from vllm_sparse.errors import ConfigError
from vllm_sparse.training.forecast import Forecast
from vllm_sparse.training.geometry import Geometry

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import torch
    from torch import Tensor

VERSION = "1"
_SIZES = ("block_size", "kernel_stride", "init_blocks", "local_blocks", "top_k")


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that replaces it if the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield scratch
        with scratch.open("rb+") as file:
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        scratch.chmod(0o666 & ~mask)  # safetensors lets only the owner read
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a safetensors file."""
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)


def load_tensors(
    path: Path, device: torch.device | str = "cpu"
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads the tensors and the metadata of a safetensors file.

    Raises:
        ConfigError: There is no such file, or it is of another kind.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"{path}: not a readable safetensors file ({error}). Forecasts are written by "
            "vllm-sparse train-forecast; official .pt checkpoints have to be converted first"
        ) from error


def tensor_name(layer: int) -> str:
    """Name of the projection that serves a layer, without ``.weight`` or ``.bias``."""
    if layer == 0:
        return "model.layers.0.self_attn.q_curr_proj"
    return f"model.layers.{layer - 1}.self_attn.q_future_proj"


def export_forecast(path: Path, forecast: Forecast, geometry: Geometry, base_model: str) -> None:
    """Writes a Forecast as bfloat16, with the metadata that the server checks."""
    import torch

    tensors = {}
    for layer, projection in enumerate(forecast.projections):
        for name, parameter in projection.named_parameters():
            value = parameter.detach().to(torch.bfloat16).cpu()
            tensors[f"{tensor_name(layer)}.{name}"] = value
    metadata = {
        "base_model": base_model,
        "kernel_size": str(geometry.kernel_size),
        **{name: str(getattr(geometry, name)) for name in _SIZES},
        "version": VERSION,
    }
    with atomic_path(path) as target:
        save_tensors(target, tensors, metadata)


def load_forecast(path: Path, head_dim: int) -> tuple[Forecast, Geometry, dict[str, str]]:
    """Reads a Forecast.

    Args:
        path: File written by :func:`export_forecast`.
        head_dim: Head size of its model.

    Returns:
        The Forecast in float32, its geometry and its metadata.

    Raises:
        ConfigError: A tensor or a metadata entry is missing or has an unexpected shape.
    """
    tensors, metadata = load_tensors(path)
    missing = [name for name in (*_SIZES, "base_model", "version") if name not in metadata]
    if missing:
        raise ConfigError(
            f"{path}: its metadata lacks {', '.join(missing)}, so it is no Forecast of "
            "vllm-sparse. Write it with train-forecast, or convert it"
        )
    if metadata["version"] != VERSION:
        raise ConfigError(
            f"{path}: is of version {metadata['version']}, this vllm-sparse reads {VERSION}; "
            "install a matching one or export the file again"
        )
    layers = sum(name.endswith(".weight") for name in tensors)
    absent = [
        f"{tensor_name(layer)}.weight"
        for layer in range(layers)
        if f"{tensor_name(layer)}.weight" not in tensors
    ]
    if absent or not layers:
        raise ConfigError(f"{path}: lacks {', '.join(absent) or 'all weights'}; export it again")
    rows, hidden = tensors[f"{tensor_name(0)}.weight"].shape
    if rows % head_dim:
        raise ConfigError(
            f"{path}: its projections have {rows} rows, no multiple of the head size {head_dim}; "
            f"it was trained for another model ({metadata['base_model']})"
        )
    bias = f"{tensor_name(0)}.bias" in tensors
    forecast = Forecast(layers, hidden, rows // head_dim, head_dim, bias)
    values = {}
    for layer, projection in enumerate(forecast.projections):
        for name, parameter in projection.named_parameters():
            found = tensors.get(f"{tensor_name(layer)}.{name}")
            if found is None or found.shape != parameter.shape:
                raise ConfigError(
                    f"{path}: {tensor_name(layer)}.{name} is "
                    f"{'missing' if found is None else list(found.shape)}, expected "
                    f"{list(parameter.shape)}; export it again"
                )
            values[f"projections.{layer}.{name}"] = found.float()
    forecast.load_state_dict(values)
    return forecast, Geometry(**{name: int(metadata[name]) for name in _SIZES}), metadata
