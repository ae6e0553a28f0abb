# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""``--kv-offloading-size``: the connector that serves it."""

from __future__ import annotations

from typing import Any

from vllm_sparse.backends.asked import TIER_MODULE
from vllm_sparse.errors import ConfigError
from vllm_sparse.kv.host.geometry import GIB
from vllm_sparse.kv.host.memory import available_bytes

_CONNECTOR = "PrefixTierConnector"


def prepare_tier(config: Any) -> None:
    """Let our connector serve ``--kv-offloading-size``, for which vLLM would choose one later.

    Args:
        config: vLLM's, of which nothing is refused; changed.

    Raises:
        ConfigError: The machine has not that much memory for each of its engines.
    """
    gib = config.cache_config.kv_offloading_size
    if gib is None:
        return
    engines = config.parallel_config.data_parallel_size_local  # each takes it whole
    if engines * gib * GIB > available_bytes():
        times = f" for each of {engines} engines" if engines > 1 else ""
        raise ConfigError(
            f"--kv-offloading-size {gib}{times}: this machine has "
            f"{available_bytes() / GIB:.2f} GiB available. Lower it"
        )
    from vllm.config import KVTransferConfig

    config.kv_transfer_config = KVTransferConfig(
        kv_connector=_CONNECTOR,
        kv_connector_module_path=TIER_MODULE,
        kv_role="kv_both",
        kv_connector_extra_config={"cpu_bytes_to_use": int(gib * GIB)},
    )
    config.cache_config.kv_offloading_size = None
