# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Counters of what the backends really do, summed over processes into vLLM's ``/metrics``.

Scheduler and workers live in other processes than the API server, and vLLM offers no channel for
counters that belong to neither a KV connector nor itself. So every process writes its counters to a
memory-mapped file of prometheus_client's multi-process format, in a folder named after vLLM's
instance id, and the API server's registry merges the folder when it is scraped.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import tempfile
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector
from vllm.v1.metrics.loggers import StatLoggerBase

from vllm_sparse import leftovers

COUNTERS = {
    "visible_tokens": "Context tokens of sparse decode rows: what dense attention would read",
    "selected_tokens": "Context tokens that sparse decode rows attended to, per KV head and layer",
    "decode_rows": "Decode rows served by sparse attention",
    "dense_fallbacks": "Requests served by dense attention, by reason",
    "prompts_compacted": "Prompts whose KV cache was compacted after prefill",
    "blocks_evicted": "KV blocks given back to the pool after prefill",
    "visible_blocks": "Blocks of decode rows: what dense attention would read",
    "selected_blocks": "Blocks that decode rows read, per KV head and layer",
    "prompt_blocks_visible": "Blocks that sparse chunks of prompts see, per KV head and layer",
    "prompt_blocks_needed": "Blocks that some token of a sparse chunk read, per KV head and layer",
    "frame_hits": "Selected blocks of a KV head that were on the device",
    "frame_misses": "Selected blocks of a KV head that were fetched from the host",
    "prefetch_issued": "Fetches that were issued a layer ahead",
    "prefetch_late": "Fetches issued ahead that were not complete when their layer needed them",
    "prefetch_wasted": "Fetches issued ahead that no layer read",
    "host_to_device_bytes": "KV bytes fetched for decode, from the host to the device",
    "streamed_bytes": "KV bytes streamed back for prompts, from the host to the device",
    "device_to_host_bytes": "KV bytes written through to the host",
    "exposed_wait_seconds": "Time that layers waited for KV copies",
}

GAUGES = {
    "host_pool_bytes": "Host memory for keys and values",
    "slab_bytes": "Device memory for frames",
    "slab_frames": "Frames of the device slab",
    "slab_frames_in_use": "Frames that hold a block, of all layers",
}


def folder(instance_id: str) -> Path:
    """Where the processes of one vLLM instance leave their counters."""
    return Path(tempfile.gettempdir()) / f"vllm-sparse-{os.getuid()}-{instance_id}"


def _sweep_other_folders(own: Path) -> None:
    """Remove what instances left whose processes were killed."""
    for found in own.parent.glob(f"vllm-sparse-{os.getuid()}-*"):
        if found != own:
            leftovers.sweep(found)


class Counters:
    """This process's counters; they count in memory until :meth:`publish_to` names a folder."""

    def __init__(self) -> None:
        self._values: defaultdict[tuple[str, str], float] = defaultdict(float)
        self._gauges: dict[str, float] = {}
        self._files: dict[str, MmapedDict] = {}
        self._target: Path | None = None

    def add(self, name: str, amount: float, reason: str = "") -> None:
        """Increase a counter.

        Args:
            name: A key of :data:`COUNTERS`.
            amount: Non-negative.
            reason: Label of counters that have one.
        """
        key = (name, reason)
        self._values[key] += amount
        if self._files:
            self._write(key)

    def set_gauge(self, name: str, value: float) -> None:
        """Set a key of :data:`GAUGES`; the API server adds the ranks up."""
        self._gauges[name] = value
        if self._files:
            metric = f"vllm:sparse_{name}"
            key = mmap_key(metric, metric, [], [], GAUGES[name])
            self._files["gauge_livesum"].write_value(key, value, 0.0)

    def value(self, name: str, reason: str = "") -> float:
        """What this process has counted."""
        return self._values[name, reason]

    def publish_to(self, target: Path) -> None:
        """Mirror the counters to a file in ``target`` from now on."""
        target.mkdir(mode=0o700, exist_ok=True)
        if self._target == target:
            return
        self._target = target
        _sweep_other_folders(target)
        for kind in ("counter", "gauge_livesum"):
            path = target / f"{kind}_{os.getpid()}.db"
            leftovers.hold(path)
            self._files[kind] = MmapedDict(str(path))
            atexit.register(_remove, path)
        for name in COUNTERS:
            if name != "dense_fallbacks":
                self._values.setdefault((name, ""), 0.0)
        for key in self._values:
            self._write(key)
        for name, value in self._gauges.items():
            self.set_gauge(name, value)

    def _write(self, key: tuple[str, str]) -> None:
        self._files["counter"].write_value(_encoded(*key), self._values[key], 0.0)


@cache
def _encoded(name: str, reason: str) -> str:
    """A counter's key in a file."""
    metric = f"vllm:sparse_{name}"
    labels = {"reason": reason} if reason else {}
    names, values = list(labels), list(labels.values())
    return mmap_key(metric, f"{metric}_total", names, values, COUNTERS[name])


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # another process still counts
        path.parent.rmdir()


_counters = Counters()


def counters() -> Counters:
    """The counters of this process."""
    return _counters


class _FolderCollector(Collector):
    """Merges the counter files of one instance at every scrape."""

    def __init__(self, source: Path) -> None:
        self._source = source

    def collect(self) -> Any:
        if not self._source.is_dir():
            return []
        merged = MultiProcessCollector(CollectorRegistry(), path=str(self._source))
        return merged.collect()


class SparseStatLogger(StatLoggerBase):
    """Adds our counters to the registry that the API server serves.

    vLLM instantiates stat-logger plugins in the front-end process, which knows the instance id.
    """

    def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
        from vllm.v1.metrics.prometheus import get_prometheus_registry

        from vllm_sparse.registry import is_ours

        backend = vllm_config.attention_config.backend
        if not is_ours(backend) or engine_index:
            return
        registry = get_prometheus_registry()
        source = folder(vllm_config.instance_id)
        registry.register(_FolderCollector(source))
        # This process outlives engine and workers, which may be killed.
        atexit.register(leftovers.sweep, source, grace_s=0)

    def record(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: counters travel through files."""

    def log_engine_initialized(self) -> None:
        """Nothing to do: the workers print the start-up line."""
