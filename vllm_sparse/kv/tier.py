# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""A tier in host memory behind the prefix cache: evicted prefixes return, nobody recomputes them.

vLLM's ``SimpleCPUOffloadConnector`` copies blocks that have a *published* hash, and our manager
publishes nothing that is rewritten. By default it stores what stands in a request's own row, so of
a tail nothing until another turn has it among its leading blocks. What is left to do here: hits end
where a request's own work must begin, and CPUs, which have no streams, copy at once. What is loaded
lands in blocks of the request's own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.simple_cpu_offload_connector import (
    SimpleCPUOffloadConnector,
)
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import FullAttentionSpec, replace_as
from vllm.v1.simple_kv_offload.worker import SimpleCPUOffloadWorker

from vllm_sparse.kv.requests import case_of
from vllm_sparse.kv.spec import PolicySpec

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor
    from vllm.v1.request import Request


class PrefixTierConnector(SimpleCPUOffloadConnector):
    """Keeps published blocks in host memory and brings back what a request may share."""

    worker_handler: Any

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        groups = kv_cache_config.kv_cache_groups
        self._specs = [g.kv_cache_spec for g in groups if isinstance(g.kv_cache_spec, PolicySpec)]
        if role == KVConnectorRole.SCHEDULER:
            kv_cache_config = _stock_groups(kv_cache_config)
        super().__init__(vllm_config, role, kv_cache_config)
        worker = self.worker_handler
        if worker is not None and current_platform.is_cpu():
            capacity = worker.cpu_capacity_bytes
            self.worker_handler = HostCopies(vllm_config, kv_cache_config, capacity)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Tokens to load beyond the local hit, none of those that the request must compute itself.

        A loaded token leaves no query, and the last ones' queries choose what the prompt keeps.
        Blocks are loaded whole.
        """
        ends = [
            num_computed_tokens + max(limit - num_computed_tokens, 0) // size * size
            for size, limit in self._limits(request)
        ]
        # A lookup for less, not less of a lookup: windows come back with what is before its end.
        shorter: Any = _Shorter(request, min([*(end + 1 for end in ends), request.num_tokens]))
        return super().get_num_new_matched_tokens(shorter, num_computed_tokens)

    def _limits(self, request: Request) -> Iterator[tuple[int, int]]:
        """Tokens of a block, and leading ones of the request that may come back, where it ends."""
        for spec in self._specs:
            limit = spec.hittable_tokens(*case_of(request))
            if limit is not None:
                yield spec.block_size, limit


class _Shorter:
    """A request as it would be with fewer tokens, of which a lookup leaves out the last."""

    def __init__(self, request: Request, num_tokens: int) -> None:
        self._request = request
        self.num_tokens = num_tokens

    def __getattr__(self, name: str) -> Any:
        return getattr(self._request, name)


class HostCopies(SimpleCPUOffloadWorker):
    """The worker's half on a CPU: copies between two pools in one memory, done when it returns."""

    def register_kv_caches(self, kv_caches: dict[str, Tensor]) -> None:
        """Take the device's blocks and make room for as many as the scheduler counts on."""
        config = self.kv_cache_config
        self._device_blocks = list(block_regions(kv_caches, config))
        size = config.kv_cache_tensors[0].size
        self.num_cpu_blocks = max(1, config.num_blocks * self.cpu_capacity_bytes // size)
        self._host_blocks = [
            torch.empty(self.num_cpu_blocks, region.shape[1], dtype=torch.uint8)
            for region in self._device_blocks
        ]

    def start_load_kv(self) -> None:
        """Bring blocks back; their requests wait for the next step."""
        step = self._connector_metadata
        if step is not None and step.load_cpu_blocks:
            for device, host in zip(self._device_blocks, self._host_blocks, strict=True):
                device[step.load_gpu_blocks] = host[step.load_cpu_blocks]
            self._load_hwm = step.load_event

    def wait_for_save(self) -> None:
        """Store blocks, after the step that may still have written to them."""
        step = self._connector_metadata
        if step is not None and step.store_gpu_blocks:
            for device, host in zip(self._device_blocks, self._host_blocks, strict=True):
                host[step.store_cpu_blocks] = device[step.store_gpu_blocks]
            self._store_hwm = step.store_event


def block_regions(kv_caches: dict[str, Tensor], config: Any) -> Iterator[Tensor]:
    """The bytes of a cache by block, each once, as views ``[num_blocks, bytes]``.

    Args:
        kv_caches: Tensors of the layers, views of what vLLM allocated.
        config: vLLM's ``KVCacheConfig``, which says where blocks lie.
    """
    seen = set()
    for placed in config.kv_cache_tensors:
        layer = next((name for name in placed.layers if name in kv_caches), None)
        if layer is None:
            continue
        storage = kv_caches[layer].untyped_storage()
        memory = torch.empty(0, dtype=torch.uint8).set_(storage)
        whole = placed.block_stride * config.num_blocks
        # One layer after the other: our backends allow no other layout.
        last = placed.offset + placed.layer_stride * len(placed.layers)
        for start in range(placed.offset, last, whole):
            key = storage.data_ptr() + start
            if key not in seen:
                seen.add(key)
                yield memory[start : start + whole].view(config.num_blocks, placed.block_stride)


def _stock_groups(config: Any) -> Any:
    """The same blocks without our rules, for lookups in host memory.

    These get a slice of a request's hashes, from which a prompt's length cannot be told, so the cap
    is the connector's. Nor does this pool say how many requests it serves.
    """

    def stock(group: Any) -> Any:
        spec = group.kv_cache_spec
        if isinstance(spec, PolicySpec):
            spec = replace_as(spec, FullAttentionSpec, drop=PolicySpec.added())
        return replace(group, kv_cache_spec=spec)

    return replace(config, kv_cache_groups=[stock(group) for group in config.kv_cache_groups])
