# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Combinations that would give wrong answers are refused when vLLM starts.

What is refused, and why, stands in :mod:`vllm_sparse.features`; what is asked for is found in
:mod:`vllm_sparse.backends.asked`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_sparse.backends import asked
from vllm_sparse.backends.base import layers_that_attend
from vllm_sparse.config import load_settings
from vllm_sparse.errors import UnsupportedError
from vllm_sparse.features import POLICIES, reason, refuse
from vllm_sparse.registry import entries

if TYPE_CHECKING:
    from collections.abc import Iterable


def unsupported(config: Any, name: str, on_gpu: bool) -> list[str]:
    """Every reason why a backend cannot serve a configuration.

    Args:
        config: vLLM's complete configuration.
        name: Of the backend, in capitals.
        on_gpu: The path of GPUs, interpreted or not.
    """
    family, settings = entries()[name].family, load_settings(config.additional_config, name.lower())
    reasons = (
        reason(feature, family, on_gpu, backend=name, **facts)
        for feature, facts in asked.of_config(config, settings)
    )
    return [why for why in dict.fromkeys(reasons) if why]


def takes_gpu_path(settings: Any) -> bool:
    """Whether a worker's steps take a GPU's path, interpreted or not."""
    from vllm.platforms import current_platform

    return not current_platform.is_cpu() or settings.kernels == "triton"


def check_layer(name: str, on_gpu: bool, **layer: Any) -> None:
    """Refuse attention variants of a single layer.

    Args:
        name: Of the backend, in capitals.
        on_gpu: The path of GPUs, interpreted or not.
        **layer: See :func:`vllm_sparse.backends.asked.of_layer`.

    Raises:
        UnsupportedError: What the layer needs and why it cannot be had.
    """
    for feature, facts in asked.of_layer(**layer):
        if why := reason(feature, entries()[name].family, on_gpu, backend=name, **facts):
            raise UnsupportedError(
                f"this model cannot be served sparsely: {why}. Leave out --attention-backend"
            )


def check_windows(name: str, on_gpu: bool, config: Any = None) -> None:
    """Refuse sliding-window layers where they cannot stay stock.

    Args:
        name: Of the backend, in capitals.
        on_gpu: The path of GPUs, interpreted or not.
        config: vLLM's, if it is known.

    Raises:
        UnsupportedError: They cannot beside this backend, the drafter, or with one block table.
    """
    family = entries()[name].family
    refuse("windows", family, on_gpu, backend=name)
    if config is None:
        return
    if asked.has_layers(config.speculative_config):
        refuse("drafters-windows", family, on_gpu)
    for feature, facts in asked.of_managers(config):
        refuse(feature, family, on_gpu, **facts)


def check_stock_layers(layers: Iterable[Any], served: type) -> None:
    """Refuse stock layers of a GPU that mistake how we ask for prompt lengths.

    Args:
        layers: Of the model and of its drafter.
        served: What implements ours.

    Raises:
        UnsupportedError: They would take them for a model with windows of another kind.
    """
    for layer in layers:
        impl = getattr(layer, "impl", None)
        if impl is None or isinstance(impl, served):
            continue
        if getattr(impl, "vllm_flash_attn_version", None) == 4:
            refuse("flash-attention-4", POLICIES, True)
        if layer.get_attn_backend().get_name() == "TRITON_ATTN":
            refuse("triton-windows", POLICIES, True)


def check_sinks(name: str) -> None:
    """Refuse layers with learned attention sinks on GPUs whose FlashAttention has none.

    Args:
        name: Of the backend, in capitals.

    Raises:
        UnsupportedError: Nobody could read their prompts.
    """
    from vllm.v1.attention.backends import fa_utils

    if not fa_utils.flash_attn_supports_sinks():
        version = fa_utils.get_flash_attn_version()
        refuse("sinks-flash-attention", entries()[name].family, True, version=version)


def check_model(config: Any, on_gpu: bool) -> None:
    """Refuse a loaded model if it attends to whole contexts in layers that are not ours.

    Or if its states would end the engine. Layers with sliding windows, and those of drafters, are
    other rows' concern.

    Args:
        config: vLLM's, one of whose backends is ours.
        on_gpu: The path of GPUs, interpreted or not.

    Raises:
        UnsupportedError: It would be served densely, in full or in part, or not at all.
    """
    name = config.attention_config.backend.name
    ours, others = layers_that_attend(config.compilation_config)
    family, served = entries()[name].family, f"{len(ours)} of {len(ours) + len(others)}"
    for layer in others:
        backend, window = layer.get_attn_backend(), getattr(layer, "sliding_window", None)
        drafts = getattr(layer, "is_draft_layer", False)
        states = getattr(layer, "mamba_type", None)
        if getattr(states, "name", "") == "MAMBA2" and config.cache_config.enable_prefix_caching:
            refuse("states-cached", family, on_gpu)
        if window is None and not backend.is_ssm() and not drafts:
            facts = {"backend": name, "other": backend.get_name(), "served": served}
            refuse("own-backends", family, on_gpu, **facts)
        # A stage of a pipeline may have no others.
        if window is not None and not ours and config.parallel_config.pipeline_parallel_size == 1:
            refuse("windows-only", family, on_gpu, window=window)
    # So might a stage.
    if not ours and config.parallel_config.pipeline_parallel_size == 1:
        refuse("attention-free", family, on_gpu, backend=name)


def check_block_size(name: str, block_size: int) -> None:
    """Refuse blocks that SPARDA's kernels of GPUs have no tiles for.

    Raises:
        UnsupportedError: Not a power of two.
    """
    if block_size & (block_size - 1):
        refuse("odd-blocks", entries()[name].family, True, size=block_size)
