# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The platforms: ``--attention-backend`` honoured on CPUs, configurations and requests checked."""

from __future__ import annotations

from typing import Any

from vllm.exceptions import VLLMClientError
from vllm.platforms import cpu_platform_plugin
from vllm.platforms.interface import PlatformEnum
from vllm.utils.import_utils import resolve_obj_by_qualname

from vllm_sparse.backends.refusals import check_windows
from vllm_sparse.errors import RequestError
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
    choose, *_ = cls._vllm_sparse_stock
    return choose(selected_backend, attn_selector_config, num_heads)


def _check_and_update_config(cls: Any, vllm_config: Any) -> None:
    """Refuse at start-up what our backends cannot serve."""
    from vllm_sparse.startup import allowed_requests, check_config

    _, check, _ = cls._vllm_sparse_stock
    check(vllm_config)
    on_gpu = cls._enum == PlatformEnum.CUDA
    check_config(vllm_config, cls.get_device_total_memory if on_gpu else None)
    if vllm_config.model_config is not None:
        cls._vllm_sparse_allowed = allowed_requests(vllm_config, on_gpu)


class RefusedRequest(RequestError, VLLMClientError):  # type: ignore[misc]
    """As vLLM's API answers with status 400, and ``LLM`` raises as a ``ValueError``."""


def _validate_request(cls: Any, processed_inputs: Any, params: Any) -> None:
    """Refuse a request that asks for what cannot be had, before an engine knows of it."""
    *_, validate = cls._vllm_sparse_stock
    validate(processed_inputs, params)
    if cls._vllm_sparse_allowed is not None:
        try:
            cls._vllm_sparse_allowed.check(getattr(params, "extra_args", None))
        except RequestError as error:
            raise RefusedRequest(str(error)) from None


def _stock(platform: Any) -> tuple[Any, ...]:
    """The methods of a platform that ours go on from."""
    return (
        platform.get_attn_backend_cls,
        platform.check_and_update_config,
        platform.validate_request,
    )


class SparseCpuPlatform(_StockPlatform):  # type: ignore[misc]
    """vLLM's CPU platform (whichever would be active), extended by our backends."""

    _vllm_sparse_stock = _stock(_StockPlatform)
    # What requests may ask for, if this process's last configuration chose one of our backends.
    _vllm_sparse_allowed: Any = None
    get_attn_backend_cls = classmethod(_get_attn_backend_cls)
    check_and_update_config = classmethod(_check_and_update_config)
    validate_request = classmethod(_validate_request)


def patch_stock_platform() -> None:
    """Let an active stock platform choose our backends, where vLLM cannot be asked to use ours.

    It also refuses what they cannot serve, and prepares the rest, before vLLM sizes its cache.
    """
    from vllm.platforms import current_platform

    active = type(current_platform)
    if hasattr(active, "_vllm_sparse_stock"):
        return
    if current_platform.is_cpu() or current_platform.is_cuda():
        active._vllm_sparse_stock, active._vllm_sparse_allowed = _stock(active), None
        active.check_and_update_config = classmethod(_check_and_update_config)
        active.validate_request = classmethod(_validate_request)
        active.get_attn_backend_cls = classmethod(_get_attn_backend_cls)
