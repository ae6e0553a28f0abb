# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""vLLM entry points: cheap, idempotent, inert unless one of our backends is chosen.

vLLM calls :func:`register` in every process (several times in some) and :func:`platform` when it
first needs to know the platform. Nothing here imports torch.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from vllm_sparse.forecast.routing import register_architectures
from vllm_sparse.registry import backend_path, entries
from vllm_sparse.versions import check_vllm_version


def register() -> None:
    """Make our names valid for ``--attention-backend``.

    Raises:
        UnsupportedError: vLLM is outside the supported version window.
    """
    check_vllm_version()
    for name in entries():
        _member(name)
    register_architectures()
    # Where vLLM has a platform of its own by now: on a GPU, or on a CPU if this setting made it
    # bypass platform plugins.
    if "vllm.platforms" in sys.modules or os.environ.get("VLLM_TARGET_DEVICE") == "cpu":
        from vllm_sparse.platform import patch_stock_platform

        patch_stock_platform()


def platform() -> str | None:
    """Our CPU platform where vLLM would use its own; ``None`` elsewhere.

    vLLM's CPU platform ignores ``--attention-backend``, so honouring it takes a subclass.
    """
    from vllm.platforms import cpu_platform_plugin

    return "vllm_sparse.platform.SparseCpuPlatform" if cpu_platform_plugin() else None


def _member(name: str) -> Any:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    member = AttentionBackendEnum.__members__.get(name)
    if member is None:
        member = AttentionBackendEnum.register(name, backend_path(name))
        # Spawned processes unpickle the vLLM config before plugins are loaded, where the enum does
        # not know the name yet. Pickle asks the instance how to rebuild it.
        member.__reduce_ex__ = lambda protocol: (_member, (name,))
    return member
