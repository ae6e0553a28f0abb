# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Official SparDA checkpoints to our safetensors files and back, executing nothing in them."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_sparse.errors import ConfigError
from vllm_sparse.forecast.file import (
    BIAS,
    CURRENT,
    FORMAT_VERSION,
    FUTURE,
    SAFETENSORS_SUFFIX,
    SIZE_KEYS,
    TORCH_SUFFIXES,
    Entry,
    TensorId,
    add_entry,
    canonical_name,
    expected_tensors,
    read_index,
    read_tensors,
    safetensors_files,
    tensor_id,
    whole_number,
)
from vllm_sparse.paths import atomic_path

_WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "weights")
_NUMPY_KINDS = ("UInt8", "UInt32", "UInt64", "Int32", "Int64", "Float32", "Float64", "Bool")


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
    tensors, metadata = _read_official(Path(source))
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
    index, metadata = read_index(safetensors_files(Path(source)))
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
    missing = [canonical_name(*name) for name in needed if name not in tensors]
    if missing:
        raise ConfigError(f"{source} is incomplete; missing: {', '.join(missing)}")
    shapes = {tuple(tensor.shape) for tensor in tensors.values()}
    if len(shapes) > 1 or len(next(iter(shapes))) != 2:
        listed = ", ".join(
            f"{canonical_name(*name)} {list(tensor.shape)}" for name, tensor in tensors.items()
        )
        raise ConfigError(f"{source}: expected matrices of one shape, got {listed}")


def _read_official(source: Path) -> tuple[dict[TensorId, Tensor], dict[str, str]]:
    if source.is_dir():
        files = sorted(source.glob(f"*{SAFETENSORS_SUFFIX}")) or sorted(
            path for suffix in TORCH_SUFFIXES for path in source.glob(f"*{suffix}")
        )
        if not files:
            raise ConfigError(f"the directory {source} holds no .safetensors, .pt or .bin file")
    elif source.is_file():
        files = [source]
    else:
        raise ConfigError(f"there is no file {source}")
    tensors: dict[TensorId, Tensor] = {}
    entries: dict[TensorId, Entry] = {}
    metadata: dict[str, str] = {}
    for path in files:
        if path.suffix == SAFETENSORS_SUFFIX:
            index, found = read_index([path])
            read = read_tensors(index)
            content = {entry.key: read[name] for name, entry in index.items()}
        else:
            loaded = _load_without_executing(path)
            content, found = _state_dict(loaded), _official_metadata(loaded)
        metadata.update(found)
        for key, tensor in content.items():
            entry = Entry(path, key, tuple(tensor.shape), tensor.is_floating_point())
            name = add_entry(entries, entry)
            if name is not None:
                tensors[name] = tensor
    return tensors, metadata


def _state_dict(content: Any, depth: int = 3) -> dict[str, Tensor]:
    """Tensors of a checkpoint: its own items, or those of the wrapper that has Forecast weights."""
    if not isinstance(content, Mapping):
        return {}
    own = {
        key: value
        for key, value in content.items()
        if isinstance(key, str) and isinstance(value, Tensor) and tensor_id(key)
    }
    if own or not depth:
        return own
    for wrapper in _WRAPPERS:
        inner = _state_dict(content.get(wrapper), depth - 1)
        if inner:
            return inner
    return {}


def _official_metadata(content: Any) -> dict[str, str]:
    if not isinstance(content, Mapping):
        return {}
    metadata = {}
    if isinstance(content.get("base_model_path"), str):
        metadata["base_model"] = content["base_model_path"]
    config = content.get("sparse_config")
    if not isinstance(config, Mapping):
        return metadata
    for key in ("block_size", "kernel_size", "kernel_stride", "init_blocks"):
        if key in config:
            metadata[key] = str(whole_number(config, key))
    if "block_size" in config and "window_size" in config:
        block, window = whole_number(config, "block_size"), whole_number(config, "window_size")
        if block < 1 or window % block:
            raise ConfigError(f"window_size {window} is not a multiple of block_size {block}")
        metadata["local_blocks"] = str(window // block)
        if "topk" in config:
            # These checkpoints count the local window apart.
            metadata["top_k"] = str(whole_number(config, "topk") + window // block)
    return metadata


def _numpy_globals() -> list[Any]:
    """What numpy's random state and scalars need, under the names of numpy 1 and 2."""
    import numpy

    core: Any = numpy._core  # type: ignore[attr-defined]
    multiarray = core.multiarray
    names: list[Any] = [
        numpy.ndarray,
        numpy.dtype,
        *(getattr(numpy.dtypes, f"{kind}DType") for kind in _NUMPY_KINDS),
    ]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        names.append((multiarray._reconstruct, f"{module}._reconstruct"))
        names.append((multiarray.scalar, f"{module}.scalar"))
    return names


def _load_without_executing(path: Path) -> Any:
    """Read a PyTorch file with only tensors, plain containers and numpy arrays allowed in it."""
    with torch.serialization.safe_globals(_numpy_globals()):
        zipped = zipfile.is_zipfile(path)
        try:
            if zipped:  # only here can all names be had at once
                unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
                if unsafe:
                    raise _not_allowed(path, ", ".join(sorted(unsafe)))
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        except ConfigError:
            raise
        except pickle.UnpicklingError as error:
            named = re.search(r"GLOBAL (\S+)", str(error))
            raise _not_allowed(path, named[1] if named else str(error).splitlines()[0]) from error
        except (RuntimeError, ValueError, EOFError, OSError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ConfigError(f"{path} is not a readable PyTorch file: {reason}") from error


def _not_allowed(path: Path, what: str) -> ConfigError:
    return ConfigError(
        f"{path} was not read, because it asks Python to call {what}, which is not needed for "
        "weights and could do anything. Save its model_state_dict alone (torch.save of a dict of "
        "tensors, or safetensors) where you trust it, and convert that"
    )
