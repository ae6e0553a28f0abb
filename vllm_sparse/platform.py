# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The platforms: ``--attention-backend`` honoured on CPUs, configurations checked everywhere."""

from __future__ import annotations

from typing import Any

from vllm.platforms import cpu_platform_plugin
from vllm.platforms.interface import PlatformEnum
from vllm.utils.import_utils import resolve_obj_by_qualname

from vllm_sparse.backends.refusals import check_windows
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
            check_windows(selected_backend.name, cls._enum == PlatformEnum.CUDA)
            # Sliding-window layers have nothing to evict and stay stock.
            selected_backend = None
        elif cls._enum == PlatformEnum.CPU:  # where the stock platform would not listen
            return backend_path(selected_backend.name)
    choose, _ = cls._vllm_sparse_stock
    return choose(selected_backend, attn_selector_config, num_heads)


def _check_and_update_config(cls: Any, vllm_config: Any) -> None:
    """Refuse at start-up what our backends cannot serve."""
    from vllm_sparse.startup import check_config

    _, check = cls._vllm_sparse_stock
    check(vllm_config)
    on_gpu = cls._enum == PlatformEnum.CUDA
    check_config(vllm_config, cls.get_device_total_memory if on_gpu else None)


class SparseCpuPlatform(_StockPlatform):  # type: ignore[misc]
    """vLLM's CPU platform (whichever would be active), extended by our backends."""

    _vllm_sparse_stock = _StockPlatform.get_attn_backend_cls, _StockPlatform.check_and_update_config
    get_attn_backend_cls = classmethod(_get_attn_backend_cls)
    check_and_update_config = classmethod(_check_and_update_config)


def patch_stock_platform() -> None:
    """Let an active stock platform choose our backends, where vLLM cannot be asked to use ours.

    It also refuses what they cannot serve, and prepares the rest, before vLLM sizes its cache.
    """
    from vllm.platforms import current_platform

    active = type(current_platform)
    if hasattr(active, "_vllm_sparse_stock"):
        return
    if current_platform.is_cpu() or current_platform.is_cuda():
        active._vllm_sparse_stock = active.get_attn_backend_cls, active.check_and_update_config
        active.check_and_update_config = classmethod(_check_and_update_config)
        active.get_attn_backend_cls = classmethod(_get_attn_backend_cls)
