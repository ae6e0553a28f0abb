# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The platforms: ``--attention-backend`` honoured on CPUs, configurations checked."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from vllm.platforms import cpu_platform_plugin
from vllm.platforms.interface import PlatformEnum
from vllm.utils.import_utils import resolve_obj_by_qualname

from vllm_sparse.backends.allowed import watch_inputs
from vllm_sparse.backends.refusals import check_model, check_sinks, check_windows
from vllm_sparse.registry import backend_path, is_ours

_StockPlatform: Any = resolve_obj_by_qualname(
    cpu_platform_plugin() or "vllm.platforms.cpu.CpuPlatform"
)


def _get_attn_backend_cls(
    cls: Any, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
) -> str:
    """Path of our backend where it was chosen, else the stock choice."""
    if is_ours(selected_backend):
        if attn_selector_config.has_sliding_window:
            from vllm.config import get_current_vllm_config_or_none

            on_gpu = cls._enum == PlatformEnum.CUDA
            check_windows(selected_backend.name, on_gpu, get_current_vllm_config_or_none())
            # Sliding-window layers have nothing to evict and stay stock.
            selected_backend = None
        elif cls._enum == PlatformEnum.CPU:  # where the stock platform would not listen
            return backend_path(selected_backend.name)
        elif attn_selector_config.has_sink:
            check_sinks(selected_backend.name)
    stock = cls._vllm_sparse_stock
    return stock.get_attn_backend_cls(selected_backend, attn_selector_config, num_heads)


def _check_and_update_config(cls: Any, vllm_config: Any) -> None:
    """Refuse at start-up what our backends cannot serve."""
    from vllm_sparse.startup import check_config

    cls._vllm_sparse_stock.check_and_update_config(vllm_config)
    on_gpu = cls._enum == PlatformEnum.CUDA
    check_config(vllm_config, cls.get_device_total_memory if on_gpu else None)
    if is_ours(vllm_config.attention_config.backend):
        # Not above: vLLM asks for its platform while its own configuration is being imported.
        from vllm_sparse.metrics.stat_logger import watch_servers

        watch_inputs()
        watch_servers()


def _update_block_size_for_backend(cls: Any, vllm_config: Any) -> None:
    """Refuse a model that turns out not to be served by ours; it has just been loaded."""
    if vllm_config.model_config is not None and is_ours(vllm_config.attention_config.backend):
        on_gpu = cls._enum == PlatformEnum.CUDA
        check_model(vllm_config, on_gpu)
        if on_gpu:
            _prefer_our_blocks(cls, vllm_config)
    cls._vllm_sparse_stock.update_block_size_for_backend(vllm_config)


def _prefer_our_blocks(cls: Any, vllm_config: Any) -> None:
    """Blocks of the size that ours prefers, where other layers take it, too.

    vLLM asks for preferences only where all layers have one backend, which sliding windows do not.
    """
    from vllm.config import set_current_vllm_config

    cache = vllm_config.cache_config
    backends = cls._find_non_ssm_backends(vllm_config)
    if cache.user_specified_block_size or len(backends) < 2:
        return
    with set_current_vllm_config(vllm_config):
        size = max(each.get_preferred_block_size(cache.DEFAULT_BLOCK_SIZE) for each in backends)
        if all(each.supports_block_size(size) for each in backends):
            cache.block_size, cache.user_specified_block_size = size, True


_OURS = {
    "get_attn_backend_cls": classmethod(_get_attn_backend_cls),
    "check_and_update_config": classmethod(_check_and_update_config),
    "update_block_size_for_backend": classmethod(_update_block_size_for_backend),
}


def _extend(platform: Any, stock: Any) -> None:
    """Give a platform our methods, which go on from another's."""
    platform._vllm_sparse_stock = SimpleNamespace(**{name: getattr(stock, name) for name in _OURS})
    for name, method in _OURS.items():
        setattr(platform, name, method)


class SparseCpuPlatform(_StockPlatform):  # type: ignore[misc]
    """vLLM's CPU platform (whichever would be active), extended by our backends."""


_extend(SparseCpuPlatform, _StockPlatform)


def patch_stock_platform() -> None:
    """Let an active stock platform choose our backends, where vLLM cannot be asked to use ours.

    It also refuses what they cannot serve, and prepares the rest, before vLLM sizes its cache.
    """
    from vllm.platforms import current_platform

    active = type(current_platform)
    if hasattr(active, "_vllm_sparse_stock"):
        return
    if current_platform.is_cpu() or current_platform.is_cuda():
        _extend(active, active)
