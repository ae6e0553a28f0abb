# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Reading Forecast files: safetensors, or what ``torch.save`` wrote, under any prefix."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from vllm_sparse.errors import ConfigError
from vllm_sparse.forecast.file import METADATA_KEYS, SAFETENSORS_SUFFIX, TORCH_SUFFIXES, tensor_id
from vllm_sparse.forecast.torch_file import read_torch_file

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor, device

    from vllm_sparse.forecast.file import TensorId


class Entry(NamedTuple):
    """A tensor of a Forecast in some file."""

    path: Path
    key: str
    shape: tuple[int, ...]
    floating: bool


def forecast_files(path: Path) -> list[Path]:
    """Returns a file, or those of a directory: its safetensors files, else its PyTorch files.

    Raises:
        ConfigError: There is none.
    """
    try:
        found = path.is_dir() or path.is_file()
    except OSError as error:  # such as a name that is too long
        raise ConfigError(f"forecast: {path} cannot be looked at: {error}") from error
    if path.is_dir():
        files = sorted(path.glob(f"*{SAFETENSORS_SUFFIX}")) or sorted(
            file for suffix in TORCH_SUFFIXES for file in path.glob(f"*{suffix}")
        )
        if not files:
            listed = ", ".join((SAFETENSORS_SUFFIX, *TORCH_SUFFIXES))
            raise ConfigError(f"forecast: the directory {path} holds no file of {listed}")
        return files
    if not found:
        raise ConfigError(f"forecast: there is no file {path}; name one, or a directory of such")
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
            f"vllm-sparse train-forecast; PyTorch files are known by {', '.join(TORCH_SUFFIXES)}"
        ) from error


def read_index(files: list[Path]) -> tuple[dict[TensorId, Entry], dict[str, str]]:
    """Read what a Forecast in some files consists of.

    Returns:
        The tensors and those metadata that are in ``METADATA_KEYS``.

    Raises:
        ConfigError: A file is not readable, or two tensors are for the same layer.
    """
    index: dict[TensorId, Entry] = {}
    metadata: dict[str, str] = {}
    for path in files:
        if path.suffix in TORCH_SUFFIXES:
            tensors, found = read_torch_file(path)
            metadata.update(found)
            for key, tensor in tensors.items():
                floating = tensor.is_floating_point()
                _add_entry(index, Entry(path, key, tuple(tensor.shape), floating))
            continue
        with open_safetensors(path) as file:
            metadata.update(
                {k: v for k, v in (file.metadata() or {}).items() if k in METADATA_KEYS}
            )
            for key in file.keys():  # noqa: SIM118, this is no dict
                piece = file.get_slice(key)
                floating = piece.get_dtype() in ("F64", "F32", "F16", "BF16")
                _add_entry(index, Entry(path, key, tuple(piece.get_shape()), floating))
    return index, metadata


def read_tensors(index: Mapping[TensorId, Entry]) -> dict[TensorId, Tensor]:
    """Read the tensors of an index, on the CPU."""
    tensors = {}
    for path in {entry.path for entry in index.values()}:
        wanted = {name: entry.key for name, entry in index.items() if entry.path == path}
        if path.suffix in TORCH_SUFFIXES:
            content, _ = read_torch_file(path)
            tensors.update({name: content[key] for name, key in wanted.items()})
            continue
        with open_safetensors(path) as file:
            tensors.update({name: file.get_tensor(key) for name, key in wanted.items()})
    return tensors


def _add_entry(index: dict[TensorId, Entry], entry: Entry) -> None:
    """Enter a tensor by what it means, unless it is none of a Forecast."""
    name = tensor_id(entry.key)
    if name is None:
        return
    first = index.setdefault(name, entry)
    if first is not entry:
        raise ConfigError(
            f"two tensors are for the same layer: {first.key} in {first.path.name} and "
            f"{entry.key} in {entry.path.name}. Name the one file to use"
        )
