# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Forecasts in PyTorch files, as trainers and other servers write them, executing nothing."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vllm_sparse.errors import ConfigError
from vllm_sparse.forecast.file import tensor_id, whole_number

if TYPE_CHECKING:
    from pathlib import Path

_WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "weights")
_NUMPY_KINDS = ("UInt8", "UInt32", "UInt64", "Int32", "Int64", "Float32", "Float64", "Bool")


def read_torch_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a Forecast's tensors under the names that they have there, at any depth of wrappers.

    Args:
        path: Written by ``torch.save``: a state dict, or one within a training checkpoint.

    Returns:
        The tensors (mapped from the file where its format allows) and what it says of the training.

    Raises:
        ConfigError: The file is not readable without executing code, or contradicts itself.
    """
    content = _load_without_executing(path)
    try:
        return _state_dict(content), _metadata(content)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


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


def _metadata(content: Any) -> dict[str, str]:
    if not isinstance(content, Mapping):
        return {}
    metadata = {}
    if isinstance(content.get("base_model_path"), str):
        metadata["base_model"] = content["base_model_path"]
    config = content.get("sparse_config")
    if not isinstance(config, Mapping):
        return metadata
    if config.get("use_nope"):
        raise ConfigError(
            "use_nope is true, so it was trained to score keys without positions, and here keys "
            "are compressed as they lie in the cache, with RoPE. Train one without, or choose "
            "selector query or previous"
        )
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
        try:
            zipped = zipfile.is_zipfile(path)
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
        except Exception as error:  # a damaged pickle raises anything: KeyError, struct.error, ...
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ConfigError(f"{path} is not a readable PyTorch file: {reason}") from error


def _not_allowed(path: Path, what: str) -> ConfigError:
    return ConfigError(
        f"{path} was not read, because it asks Python to call {what}, which is not needed for "
        "weights and could do anything. Save its model_state_dict alone (torch.save of a dict of "
        "tensors, or safetensors) where you trust it, and convert that"
    )
