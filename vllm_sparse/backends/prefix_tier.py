# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""``--kv-offloading-size``: what it needs, and the connector that serves it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_sparse.errors import ConfigError
from vllm_sparse.kv.host.geometry import GIB
from vllm_sparse.kv.host.memory import available_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

_MODULE, _CONNECTOR = "vllm_sparse.kv.tier", "PrefixTierConnector"


def unsupported_tier(config: Any, served: bool) -> Iterator[str]:
    """What speaks against a KV connector, or against a tier behind the prefix cache.

    Args:
        config: vLLM's configuration.
        served: The backend's blocks may be kept in such a tier.

    Yields:
        A reason and what to do.
    """
    cache, transfer = config.cache_config, config.kv_transfer_config
    whole = "KV connectors move whole prompts, but a compacted request has only its kept tokens; "
    if transfer is not None and not (served and transfer.kv_connector_module_path == _MODULE):
        yield whole + "remove --kv-transfer-config"
    if cache.kv_offloading_size is None:
        return
    if not served:
        yield whole + "remove --kv-offloading-size"
    elif cache.kv_offloading_backend != "native":
        yield whole + "remove --kv-offloading-backend"
    if not cache.enable_prefix_caching:
        yield "--kv-offloading-size keeps cached prefixes; remove it, or --no-enable-prefix-caching"
    if config.model_config.is_hybrid:
        yield "recurrent states cannot come back from host memory; remove --kv-offloading-size"
    if config.parallel_config.pipeline_parallel_size > 1:
        yield "stages of a pipeline have blocks of different sizes; remove --kv-offloading-size"


def prepare_tier(config: Any) -> None:
    """Let our connector serve ``--kv-offloading-size``, for which vLLM would choose one later.

    Args:
        config: vLLM's, without anything that :func:`unsupported_tier` names; changed.

    Raises:
        ConfigError: The machine has not that much memory.
    """
    gib = config.cache_config.kv_offloading_size
    if gib is None:
        return
    if gib * GIB > available_bytes():
        raise ConfigError(
            f"--kv-offloading-size {gib}: this machine has {available_bytes() / GIB:.2f} GiB "
            "available. Lower it"
        )
    from vllm.config import KVTransferConfig

    config.kv_transfer_config = KVTransferConfig(
        kv_connector=_CONNECTOR,
        kv_connector_module_path=_MODULE,
        kv_role="kv_both",
        kv_connector_extra_config={"cpu_bytes_to_use": int(gib * GIB)},
    )
    config.cache_config.kv_offloading_size = None
