# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The adapters to vLLM. ``vllm_sparse.backends.NAME`` is the class for the platform at hand."""

from __future__ import annotations

from functools import cache
from typing import Any

from vllm_sparse.registry import entries, load


def __getattr__(name: str) -> Any:
    """Resolve what :func:`vllm_sparse.registry.backend_path` names, when vLLM asks for it."""
    if name not in entries():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _backend(name, _on_gpu(name.lower()))


@cache
def _backend(name: str, on_gpu: bool) -> type:
    """One name's class: vLLM asks a backend for its name, and several names share an adapter."""
    entry = entries()[name]
    adapter = load(entry.gpu if on_gpu else entry.cpu)
    described = {"get_name": staticmethod(lambda: name), "__doc__": adapter.__doc__}
    return type(name, (adapter,), {**described, "__module__": __name__, "__qualname__": name})


def _on_gpu(algorithm: str) -> bool:
    from vllm.config import get_current_vllm_config_or_none
    from vllm.platforms import current_platform

    from vllm_sparse.config import load_settings

    if not current_platform.is_cpu():
        return True
    config = get_current_vllm_config_or_none()
    if config is None:
        return False
    return bool(load_settings(config.additional_config, algorithm).kernels == "triton")
