# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Forecast weights: reading, checking, converting.

A Forecast is one matrix ``[G * D, hidden]`` for every layer but the last (``q_future_proj``, which
speaks for the next layer) and one more for layer 0 (``q_curr_proj``, for itself). We serve them
from safetensors only; the official PyTorch checkpoints are converted without executing anything
they contain.

Notation: H query heads, G KV heads, D head size.
"""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from vllm_sparse.errors import ConfigError

if TYPE_CHECKING:
    from vllm_sparse.config import SpardaSettings

FUTURE, CURRENT = "q_future_proj", "q_curr_proj"
BIAS = ".bias"  # of a kind; the official format has none, ours may
FORMAT_VERSION = "1"
METADATA_KEYS = (
    "base_model",
    "block_size",
    "kernel_size",
    "kernel_stride",
    "local_blocks",
    "init_blocks",
    "top_k",
    "version",
)

_KEY = re.compile(rf"(?:^|\.)layers\.(\d+)\.self_attn\.({FUTURE}|{CURRENT})\.(weight|bias)$")
_WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "weights")
_TORCH_SUFFIXES = (".pt", ".pth", ".bin")
_SAFETENSORS_SUFFIX = ".safetensors"

TensorId = tuple[int, str]  # layer, FUTURE or CURRENT, with or without BIAS


class ForecastWeights(NamedTuple):
    """The weights of one model."""

    future: list[Tensor]
    """Of layers 0 to L - 2: what the next layer will look for, each ``[G * D, hidden]``."""
    current: Tensor
    """Of layer 0, for itself, ``[G * D, hidden]``."""
    metadata: dict[str, str]
    """What the file says of its training; any of ``METADATA_KEYS``."""
    future_bias: list[Tensor] | None = None
    """For each of ``future``, ``[G * D]``."""
    current_bias: Tensor | None = None
    """For ``current``, ``[G * D]``."""


class _Entry(NamedTuple):
    path: Path
    key: str
    shape: tuple[int, ...]
    floating: bool


def canonical_name(layer: int, kind: str) -> str:
    """Returns the name that a tensor has in our files."""
    return f"model.layers.{layer}.self_attn.{kind}{'' if kind.endswith(BIAS) else '.weight'}"


def inspect_forecast(
    path: str | Path, num_layers: int, num_kv_heads: int, head_size: int, hidden_size: int
) -> dict[str, str]:
    """Check a Forecast file against a model without reading its tensors.

    Args:
        path: A safetensors file, or a directory of such.
        num_layers: Layers of the model.
        num_kv_heads: KV heads of the model, G.
        head_size: D.
        hidden_size: Width of the layers' input.

    Returns:
        The file's metadata.

    Raises:
        ConfigError: No such file, or it is not this model's; every offending tensor is named.
    """
    _, metadata = _checked_index(path, num_layers, num_kv_heads, head_size, hidden_size)
    return metadata


def load_forecast(
    path: str | Path, num_layers: int, num_kv_heads: int, head_size: int, hidden_size: int
) -> ForecastWeights:
    """Read a Forecast for a model.

    Args:
        path: A safetensors file, or a directory of such.
        num_layers: Layers of the model.
        num_kv_heads: KV heads of the model, G.
        head_size: D.
        hidden_size: Width of the layers' input.

    Returns:
        The weights, on the CPU, in the dtype of the file.

    Raises:
        ConfigError: No such file, or it is not this model's; every offending tensor is named.
    """
    index, metadata = _checked_index(path, num_layers, num_kv_heads, head_size, hidden_size)
    wanted = [*_wanted(num_layers), *_wanted(num_layers, BIAS)]
    tensors = _read({name: entry for name, entry in index.items() if name in wanted})
    layers = range(num_layers - 1)
    has_bias = (0, CURRENT + BIAS) in tensors
    return ForecastWeights(
        [tensors[layer, FUTURE] for layer in layers],
        tensors[0, CURRENT],
        metadata,
        [tensors[layer, FUTURE + BIAS] for layer in layers] if has_bias else None,
        tensors[0, CURRENT + BIAS] if has_bias else None,
    )


def check_metadata(metadata: Mapping[str, str], settings: SpardaSettings) -> str | None:
    """Compare what a Forecast was trained for with what it is asked to serve.

    Args:
        metadata: Of the Forecast file; absent keys are not compared.
        settings: Of the backend.

    Returns:
        A warning where only the number of blocks differs, else None.

    Raises:
        ConfigError: The Forecast was trained on other blocks or compressed keys.
    """
    grid = {
        "block_size": settings.block_size,
        "kernel_stride": settings.kernel_stride,
        "kernel_size": 2 * settings.kernel_stride,
    }
    counts = {
        "local_blocks": settings.local_blocks,
        "init_blocks": settings.init_blocks,
        "top_k": settings.blocks_read,
    }
    wrong = _differences(metadata, grid)
    if wrong:
        raise ConfigError(
            f"the Forecast was trained on another grid than it would serve: {wrong}. Its scores "
            "mean nothing there; set block_size and kernel_stride to the trained values"
        )
    differing = _differences(metadata, counts)
    if differing:
        return (
            f"the Forecast was trained with other numbers of blocks: {differing}. It works, but "
            "its accuracy was measured with the trained values"
        )
    return None


def lookahead_weights(
    q_weight: Tensor, q_bias: Tensor | None, num_heads: int, num_kv_heads: int, head_size: int
) -> tuple[Tensor, Tensor | None]:
    """A Forecast without training: a layer's own query projection, averaged over each group.

    Args:
        q_weight: Query rows of the projection, ``[H * D, hidden]``.
        q_bias: ``[H * D]`` or None.
        num_heads: H.
        num_kv_heads: G.
        head_size: D.

    Returns:
        Weight ``[G * D, hidden]`` and bias ``[G * D]`` (or None) in the dtype of the arguments,
        averaged in float32. Its raw scores are the mean of the group's.
    """
    group = num_heads // num_kv_heads
    hidden = q_weight.shape[1]
    weight = q_weight.float().view(num_kv_heads, group, head_size, hidden).mean(1)
    weight = weight.reshape(-1, hidden).to(q_weight.dtype)
    if q_bias is None:
        return weight, None
    bias = q_bias.float().view(num_kv_heads, group, head_size).mean(1)
    return weight, bias.flatten().to(q_bias.dtype)


def shard_heads(weight: Tensor, num_kv_heads: int, rank: int, world_size: int) -> Tensor:
    """Rows of the KV heads that one tensor-parallel rank owns.

    Args:
        weight: ``[G * D, ...]``.
        num_kv_heads: G, a multiple of ``world_size``.
        rank: Of this process.
        world_size: Ranks.

    Returns:
        A view, ``[G / world_size * D, ...]``.
    """
    if num_kv_heads % world_size:
        raise ValueError(f"{num_kv_heads} KV heads cannot be split over {world_size} ranks")
    rows = weight.shape[0] // world_size
    return weight[rank * rows : (rank + 1) * rows]


# ---- reading safetensors -------------------------------------------------------------------------


def _wanted(num_layers: int, suffix: str = "") -> list[TensorId]:
    return [(0, CURRENT + suffix), *((layer, FUTURE + suffix) for layer in range(num_layers - 1))]


def _checked_index(
    path: str | Path, num_layers: int, num_kv_heads: int, head_size: int, hidden_size: int
) -> tuple[dict[TensorId, _Entry], dict[str, str]]:
    index, metadata = _index(_safetensors_files(Path(path)))
    problems = []
    biases = _wanted(num_layers, BIAS) if any(kind.endswith(BIAS) for _, kind in index) else []
    for layer, kind in [*_wanted(num_layers), *biases]:
        rows = num_kv_heads * head_size
        expected = (rows,) if kind.endswith(BIAS) else (rows, hidden_size)
        entry = index.get((layer, kind))
        if entry is None:
            problems.append(f"{canonical_name(layer, kind)} is missing (expected {list(expected)})")
        elif entry.shape != expected or not entry.floating:
            found = f"{list(entry.shape)}" + ("" if entry.floating else ", not floating point")
            problems.append(f"{entry.key}: expected {list(expected)}, got {found}")
    problems += [
        f"{entry.key}: the model has {num_layers} layers"
        for (layer, _), entry in sorted(index.items())
        if layer >= num_layers
    ]
    if problems:
        raise ConfigError(
            f"the Forecast in {path} does not fit this model: {'; '.join(problems)}. Use the file "
            "that was trained for it, or choose selector lookahead-query, query or previous"
        )
    return index, metadata


def _safetensors_files(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(path.glob(f"*{_SAFETENSORS_SUFFIX}"))
        if not files:
            raise ConfigError(f"forecast: the directory {path} holds no *{_SAFETENSORS_SUFFIX}")
        return files
    if path.suffix in _TORCH_SUFFIXES and path.is_file():
        raise ConfigError(
            f"forecast: {path} is a PyTorch file, which can run code when it is read. Convert it "
            f"once: vllm-sparse convert-forecast {path} {path.with_suffix(_SAFETENSORS_SUFFIX)}"
        )
    if not path.is_file():
        raise ConfigError(f"forecast: there is no file {path}; set it to a safetensors file")
    return [path]


def _safe_open(path: Path) -> Any:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ConfigError(
            f"Forecast files need the package safetensors ({error}): pip install safetensors"
        ) from error
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path} is not a readable safetensors file: {error}") from error


def _index(files: list[Path]) -> tuple[dict[TensorId, _Entry], dict[str, str]]:
    index: dict[TensorId, _Entry] = {}
    metadata: dict[str, str] = {}
    for path in files:
        with _safe_open(path) as file:
            metadata.update(
                {k: v for k, v in (file.metadata() or {}).items() if k in METADATA_KEYS}
            )
            for key in file.keys():  # noqa: SIM118, this is no dict
                name = _tensor_id(key)
                if name is None:
                    continue
                piece = file.get_slice(key)
                entry = _Entry(
                    path,
                    key,
                    tuple(piece.get_shape()),
                    piece.get_dtype() in ("F64", "F32", "F16", "BF16"),
                )
                _refuse_second(index.get(name), entry)
                index[name] = entry
    return index, metadata


def _tensor_id(key: str) -> TensorId | None:
    found = _KEY.search(key)
    return (int(found[1]), found[2] + (BIAS if found[3] == "bias" else "")) if found else None


def _refuse_second(first: _Entry | None, second: _Entry) -> None:
    if first is not None:
        raise ConfigError(
            f"two tensors are for the same layer: {first.key} in {first.path.name} and "
            f"{second.key} in {second.path.name}. Name the one file to use"
        )


def _read(index: Mapping[TensorId, _Entry]) -> dict[TensorId, Tensor]:
    tensors = {}
    for path in {entry.path for entry in index.values()}:
        with _safe_open(path) as file:
            for name, entry in index.items():
                if entry.path == path:
                    tensors[name] = file.get_tensor(entry.key)
    return tensors


def _number(metadata: Mapping[str, Any], key: str) -> int:
    try:
        return int(metadata[key])
    except (TypeError, ValueError):
        raise ConfigError(
            f"the Forecast's {key} should be a whole number, got {metadata[key]!r}"
        ) from None


def _differences(metadata: Mapping[str, str], expected: Mapping[str, int]) -> str:
    return ", ".join(
        f"{key} {metadata[key]} (here {value})"
        for key, value in expected.items()
        if key in metadata and _number(metadata, key) != value
    )


# ---- official checkpoints ------------------------------------------------------------------------


class _Official(NamedTuple):
    tensors: dict[TensorId, Tensor]
    metadata: dict[str, str]


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
    with _written_at_once(Path(target)) as partial:
        save_file(named, partial, metadata=metadata)


def export_official(source: str | Path, target: str | Path) -> None:
    """Write a checkpoint that the official SparDA code loads.

    Args:
        source: Our safetensors file, or a directory of such, with complete metadata.
        target: The .pt file to write.

    Raises:
        ConfigError: Tensors or metadata are missing.
    """
    index, metadata = _index(_safetensors_files(Path(source)))
    if any(kind.endswith(BIAS) for _, kind in index):
        raise ConfigError(
            f"{source} has biases, for which the official format has no place; train with "
            "--bias false to export"
        )
    tensors = _read(index)
    _check_complete(tensors, source)
    missing = [
        key for key in METADATA_KEYS if key not in ("base_model", "version", *metadata.keys())
    ]
    if missing:
        raise ConfigError(
            f"{source} does not say {', '.join(missing)}, which the official format records; "
            "save the file with these metadata"
        )
    value = {
        key: _number(metadata, key) for key in METADATA_KEYS if key not in ("base_model", "version")
    }
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
    with _written_at_once(Path(target)) as partial:
        torch.save(content, partial)


@contextmanager
def _written_at_once(target: Path) -> Iterator[Path]:
    """A temporary name beside ``target``, which takes its place unless an error occurs."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        yield partial
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _check_complete(tensors: Mapping[TensorId, Tensor], source: str | Path) -> None:
    if not tensors:
        raise ConfigError(
            f"{source} holds no Forecast: no tensor's name ends in "
            f"layers.N.self_attn.{FUTURE}.weight or layers.0.self_attn.{CURRENT}.weight"
        )
    last = max((layer for layer, kind in tensors if kind == FUTURE), default=-1)
    needed = [(0, CURRENT), *((layer, FUTURE) for layer in range(last + 1))]
    missing = [canonical_name(*name) for name in needed if name not in tensors]
    if missing:
        raise ConfigError(f"{source} is incomplete; missing: {', '.join(missing)}")
    shapes = {tuple(tensor.shape) for tensor in tensors.values()}
    if len(shapes) > 1 or len(next(iter(shapes))) != 2:
        listed = ", ".join(
            f"{canonical_name(*name)} {list(tensor.shape)}" for name, tensor in tensors.items()
        )
        raise ConfigError(f"{source}: expected matrices of one shape, got {listed}")


def _read_official(source: Path) -> _Official:
    if source.is_dir():
        files = sorted(source.glob(f"*{_SAFETENSORS_SUFFIX}")) or sorted(
            path for suffix in _TORCH_SUFFIXES for path in source.glob(f"*{suffix}")
        )
        if not files:
            raise ConfigError(f"the directory {source} holds no .safetensors, .pt or .bin file")
    elif source.is_file():
        files = [source]
    else:
        raise ConfigError(f"there is no file {source}")
    tensors: dict[TensorId, Tensor] = {}
    entries: dict[TensorId, _Entry] = {}
    metadata: dict[str, str] = {}
    for path in files:
        if path.suffix == _SAFETENSORS_SUFFIX:
            index, found = _index([path])
            content = {entry.key: tensor for entry, tensor in _pairs(index, _read(index))}
        else:
            loaded = _load_without_executing(path)
            content, found = _state_dict(loaded), _official_metadata(loaded)
        metadata.update(found)
        for key, tensor in content.items():
            name = _tensor_id(key)
            if name is None:
                continue
            entry = _Entry(path, key, tuple(tensor.shape), tensor.is_floating_point())
            _refuse_second(entries.get(name), entry)
            entries[name] = entry
            tensors[name] = tensor
    return _Official(tensors, metadata)


def _pairs(
    index: Mapping[TensorId, _Entry], tensors: Mapping[TensorId, Tensor]
) -> Iterator[tuple[_Entry, Tensor]]:
    for name, entry in index.items():
        yield entry, tensors[name]


def _state_dict(content: Any, depth: int = 3) -> dict[str, Tensor]:
    """Tensors of a checkpoint: its own items, or those of the wrapper that has Forecast weights."""
    if not isinstance(content, Mapping):
        return {}
    own = {
        key: value
        for key, value in content.items()
        if isinstance(key, str) and isinstance(value, Tensor) and _tensor_id(key)
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
            metadata[key] = str(_number(config, key))
    if "block_size" in config and "window_size" in config:
        block, window = _number(config, "block_size"), _number(config, "window_size")
        if block < 1 or window % block:
            raise ConfigError(f"window_size {window} is not a multiple of block_size {block}")
        metadata["local_blocks"] = str(window // block)
        if "topk" in config:
            # These checkpoints count the local window apart.
            metadata["top_k"] = str(_number(config, "topk") + window // block)
    return metadata


def _numpy_globals() -> list[Any]:
    """What numpy's random state and scalars need, under the names of numpy 1 and 2."""
    import numpy

    multiarray = numpy._core.multiarray
    names: list[Any] = [
        numpy.ndarray,
        numpy.dtype,
        *(getattr(numpy.dtypes, f"{kind}DType") for kind in _NUMPY_KINDS),
    ]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        names.append((multiarray._reconstruct, f"{module}._reconstruct"))
        names.append((multiarray.scalar, f"{module}.scalar"))
    return names


_NUMPY_KINDS = ("UInt8", "UInt32", "UInt64", "Int32", "Int64", "Float32", "Float64", "Bool")


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
