# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The glue to vLLM. ``vllm_sparse.backends.NAME`` is the class for the platform at hand."""

from __future__ import annotations

import importlib
from typing import Any

_CLASSES = {"ROCKETKV": "RocketKV", "SPARDA": "Sparda"}


def __getattr__(name: str) -> Any:
    """Resolve what :data:`vllm_sparse.plugin.BACKENDS` points to, when vLLM asks for it."""
    if name not in _CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    device = "gpu" if _on_gpu(name.lower()) else "cpu"
    module = importlib.import_module(f"{__name__}.{name.lower()}_{device}")
    return getattr(module, f"{_CLASSES[name]}{device.capitalize()}Backend")


def _on_gpu(algorithm: str) -> bool:
    from vllm.config import get_current_vllm_config_or_none
    from vllm.platforms import current_platform

    from vllm_sparse.config import load_settings

    if not current_platform.is_cpu():
        return True
    config = get_current_vllm_config_or_none()
    if config is None:
        return False
    return load_settings(config.additional_config, algorithm).kernels == "triton"
