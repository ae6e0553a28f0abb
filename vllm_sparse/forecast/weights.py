# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Forecast weights as they are served: checked against a model, split over ranks, or untrained.

Notation: H query heads, G KV heads, D head size.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from vllm_sparse.errors import ConfigError
from vllm_sparse.forecast.file import (
    BIAS,
    CURRENT,
    FORMAT_VERSION,
    FUTURE,
    SPARSE_FORWARD,
    TensorId,
    canonical_name,
    expected_tensors,
    whole_number,
)
from vllm_sparse.forecast.reading import Entry, forecast_files, read_index, read_tensors

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from vllm_sparse.policies.sparda import SpardaSettings


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
    unused: tuple[str, ...] = ()
    """Tensors of the file that no layer needs, as official files have for the last one."""


def load_forecast(
    path: str | Path, num_layers: int, num_kv_heads: int, head_size: int, hidden_size: int
) -> ForecastWeights:
    """Read a Forecast for a model.

    Args:
        path: A safetensors or PyTorch file, or a directory of such. Nothing in it is executed.
        num_layers: Layers of the model.
        num_kv_heads: KV heads of the model, G.
        head_size: D.
        hidden_size: Width of the layers' input.

    Returns:
        The weights, on the CPU, in the dtype of the file.

    Raises:
        ConfigError: No such file, or it is not this model's, or not finite; every offending tensor
            is named.
    """
    index, metadata = _checked_index(path, num_layers, num_kv_heads, head_size, hidden_size)
    wanted = [*expected_tensors(num_layers), *expected_tensors(num_layers, BIAS)]
    tensors = read_tensors({name: entry for name, entry in index.items() if name in wanted})
    spoilt = [index[name].key for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if spoilt:
        raise ConfigError(
            f"the Forecast in {path} has values that are no finite numbers, in "
            f"{', '.join(sorted(spoilt))}: its training diverged or the file is damaged. Use "
            "another checkpoint, or choose selector lookahead-query, query or previous"
        )
    layers = range(num_layers - 1)
    has_bias = (0, CURRENT + BIAS) in tensors
    return ForecastWeights(
        [tensors[layer, FUTURE] for layer in layers],
        tensors[0, CURRENT],
        metadata,
        [tensors[layer, FUTURE + BIAS] for layer in layers] if has_bias else None,
        tensors[0, CURRENT + BIAS] if has_bias else None,
        tuple(entry.key for name, entry in index.items() if name not in wanted),
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
    found = [_differences(metadata, counts)]
    if _chooses_in_prompts(settings) and settings.prompt_blocks_read != settings.blocks_read:
        prompts = _differences(metadata, {"top_k": settings.prompt_blocks_read})
        found.append(prompts and f"in prompts {prompts}")
    if differing := ", ".join(filter(None, found)):
        return (
            f"the Forecast was trained with other numbers of blocks: {differing}. It works, but "
            "its accuracy was measured with the trained values"
        )
    return None


def other_prompts(metadata: Mapping[str, str], settings: SpardaSettings) -> str | None:
    """Compare the prompts that a Forecast was trained on with those in which it will choose.

    Args:
        metadata: Of the Forecast file; nothing is said of one that does not tell.
        settings: Of the backend.

    Returns:
        A warning where it learnt from dense prompts and chooses in sparse ones, else None.
    """
    if metadata.get(SPARSE_FORWARD) != "False" or not _chooses_in_prompts(settings):
        return None
    return (
        "it was trained on dense prompts and will choose in sparse ones, whose tokens have other "
        "keys and values. Set prompt_selector to query, or train one with --sparse-forward true"
    )


def _chooses_in_prompts(settings: SpardaSettings) -> bool:
    return bool(settings.sparse_prefill) and settings.chosen_prompt_selector == "forecast"


def other_model(metadata: Mapping[str, str], served: str) -> str | None:
    """Compare the model that a Forecast was trained for with the one that is served.

    Args:
        metadata: Of the Forecast file.
        served: Name or path of the model; last parts are compared, in small letters.

    Returns:
        A warning where they differ, else None.
    """
    trained = metadata.get("base_model", "")
    if not trained or _last_part(trained) == _last_part(served):
        return None
    return (
        f"it fits the shape of {served}, but was trained for {trained}. If that is another model, "
        "its choices mean little: use the file that was trained for yours, or choose selector "
        "lookahead-query, query or previous"
    )


def _last_part(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].lower()


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


def scaled_by_norm(
    weight: Tensor, bias: Tensor | None, norm: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Let a projection stand for one whose output is normed per head.

    The norm's scale by head and token is positive and does not change the ranking of blocks much;
    its weight by channel does.

    Args:
        weight: ``[G * D, hidden]``.
        bias: ``[G * D]`` or None.
        norm: The norm's weight, ``[D]``.

    Returns:
        Both times the norm's weight, computed in float32, in the dtypes of the arguments.
    """
    gain = norm.float().repeat(weight.shape[0] // norm.shape[0])
    weight = (weight.float() * gain[:, None]).to(weight.dtype)
    return weight, None if bias is None else (bias.float() * gain).to(bias.dtype)


def shard_heads(weight: Tensor, num_kv_heads: int, rank: int, world_size: int) -> Tensor:
    """Rows of the KV heads that one tensor-parallel rank has.

    Of more ranks than KV heads, neighbours have the same head, as of keys and values.

    Args:
        weight: ``[G * D, ...]``.
        num_kv_heads: G, a multiple or a divisor of ``world_size``.
        rank: Of this process.
        world_size: Ranks.

    Returns:
        A view, ``[G / world_size * D, ...]``, of at least one head.

    Raises:
        ValueError: Neither divides the other.
    """
    shares = min(num_kv_heads, world_size)
    if num_kv_heads % shares or world_size % shares:
        raise ValueError(f"{num_kv_heads} KV heads cannot be split over {world_size} ranks")
    rows, share = weight.shape[0] // shares, rank * shares // world_size
    return weight[share * rows : (share + 1) * rows]


def _checked_index(
    path: str | Path, num_layers: int, num_kv_heads: int, head_size: int, hidden_size: int
) -> tuple[dict[TensorId, Entry], dict[str, str]]:
    index, metadata = read_index(forecast_files(Path(path)))
    version = metadata.get("version", FORMAT_VERSION)
    if version != FORMAT_VERSION:
        raise ConfigError(
            f"the Forecast in {path} is of version {version}, this vllm-sparse reads "
            f"{FORMAT_VERSION}; install a matching one or export the file again"
        )
    problems = []
    biases = (
        expected_tensors(num_layers, BIAS) if any(kind.endswith(BIAS) for _, kind in index) else []
    )
    for layer, kind in [*expected_tensors(num_layers), *biases]:
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
        trained_for = metadata.get("base_model", "an unnamed model")
        raise ConfigError(
            f"the Forecast in {path}, trained for {trained_for}, does not fit this model: "
            f"{'; '.join(problems)}. Use the file that was trained for it, or choose selector "
            "lookahead-query, query or previous"
        )
    return index, metadata


def _differences(metadata: Mapping[str, str], expected: Mapping[str, int]) -> str:
    return ", ".join(
        f"{key} {metadata[key]} (here {value})"
        for key, value in expected.items()
        if key in metadata and whole_number(metadata, key) != value
    )
