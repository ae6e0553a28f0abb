# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Forecast files: the names of their tensors and metadata, and reading safetensors.

A Forecast is one matrix ``[G * D, hidden]`` for every layer but the last (``q_future_proj``, which
speaks for the next layer) and one more for layer 0 (``q_curr_proj``, for itself). Models whose
queries have a bias may have one ``[G * D]`` for each matrix.

Notation: G KV heads, D head size.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple

from vllm_sparse.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor, device

FUTURE, CURRENT = "q_future_proj", "q_curr_proj"
BIAS = ".bias"  # of a kind; the official format has none, ours may
FORMAT_VERSION = "1"
SIZE_KEYS = ("block_size", "kernel_size", "kernel_stride", "local_blocks", "init_blocks", "top_k")
METADATA_KEYS = ("base_model", *SIZE_KEYS, "version")
SAFETENSORS_SUFFIX = ".safetensors"
TORCH_SUFFIXES = (".pt", ".pth", ".bin")

_KEY = re.compile(rf"(?:^|\.)layers\.(\d+)\.self_attn\.({FUTURE}|{CURRENT})\.(weight|bias)$")

TensorId = tuple[int, str]  # layer, FUTURE or CURRENT, with or without BIAS


class Entry(NamedTuple):
    """A tensor of a Forecast in some file."""

    path: Path
    key: str
    shape: tuple[int, ...]
    floating: bool


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


def add_entry(index: dict[TensorId, Entry], entry: Entry) -> TensorId | None:
    """Enter a tensor by what it means, unless it is none of a Forecast.

    Raises:
        ConfigError: There is one for the same layer already.
    """
    name = tensor_id(entry.key)
    if name is None:
        return None
    first = index.setdefault(name, entry)
    if first is not entry:
        raise ConfigError(
            f"two tensors are for the same layer: {first.key} in {first.path.name} and "
            f"{entry.key} in {entry.path.name}. Name the one file to use"
        )
    return name


def safetensors_files(path: Path) -> list[Path]:
    """Returns a safetensors file, or those of a directory.

    Raises:
        ConfigError: There is none.
    """
    if path.is_dir():
        files = sorted(path.glob(f"*{SAFETENSORS_SUFFIX}"))
        if not files:
            raise ConfigError(f"forecast: the directory {path} holds no *{SAFETENSORS_SUFFIX}")
        return files
    if path.suffix in TORCH_SUFFIXES and path.is_file():
        raise ConfigError(
            f"forecast: {path} is a PyTorch file, which can run code when it is read. Convert it "
            f"once: vllm-sparse convert-forecast {path} {path.with_suffix(SAFETENSORS_SUFFIX)}"
        )
    if not path.is_file():
        raise ConfigError(f"forecast: there is no file {path}; set it to a safetensors file")
    return [path]


def open_safetensors(path: Path, device: device | str = "cpu") -> Any:
    """Open a safetensors file, a context manager.

    Raises:
        ConfigError: There is no such file, or it is of another kind.
    """
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt", device=str(device))
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"{path} is not a readable safetensors file: {error}. Forecasts are written by "
            "vllm-sparse train-forecast; official checkpoints are converted by convert-forecast"
        ) from error


def read_index(files: list[Path]) -> tuple[dict[TensorId, Entry], dict[str, str]]:
    """Read what a Forecast in some safetensors files consists of, without its tensors.

    Returns:
        The tensors and those metadata that are in ``METADATA_KEYS``.

    Raises:
        ConfigError: A file is not readable, or two tensors are for the same layer.
    """
    index: dict[TensorId, Entry] = {}
    metadata: dict[str, str] = {}
    for path in files:
        with open_safetensors(path) as file:
            metadata.update(
                {k: v for k, v in (file.metadata() or {}).items() if k in METADATA_KEYS}
            )
            for key in file.keys():  # noqa: SIM118, this is no dict
                piece = file.get_slice(key)
                floating = piece.get_dtype() in ("F64", "F32", "F16", "BF16")
                add_entry(index, Entry(path, key, tuple(piece.get_shape()), floating))
    return index, metadata


def read_tensors(index: Mapping[TensorId, Entry]) -> dict[TensorId, Tensor]:
    """Read the tensors of an index, on the CPU."""
    tensors = {}
    for path in {entry.path for entry in index.values()}:
        with open_safetensors(path) as file:
            for name, entry in index.items():
                if entry.path == path:
                    tensors[name] = file.get_tensor(entry.key)
    return tensors


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
