# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Counters of what the backends really do, in files that every process of a server can add up.

Scheduler and workers live in other processes than the API servers, and vLLM offers no channel for
counters that belong to neither a KV connector nor itself. So every process writes its counters to
memory-mapped files of prometheus_client's multi-process format.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections import defaultdict
from functools import cache
from multiprocessing.util import Finalize
from pathlib import Path
from typing import TYPE_CHECKING

from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.multiprocess import MultiProcessCollector

from vllm_sparse import leftovers
from vllm_sparse.metrics.definitions import METRICS, PREFIX, of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from prometheus_client import Metric

    from vllm_sparse.metrics.definitions import Family

# prometheus_client may have files of its own in the same folder, named after the process alone.
_SUFFIX = "-sparse.db"


def shared_folder() -> Path | None:
    """Where vLLM adds up the metrics of several API servers, ours included; else ``None``."""
    given = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    return Path(given) if given else None


def folder(instance: str) -> Path:
    """Where the processes of one instance leave their counters.

    Several API servers each have another name than the engines; the folder that vLLM makes for them
    is known to all.

    Args:
        instance: Its name, see :class:`vllm_sparse.instance.Instance`.
    """
    return shared_folder() or Path(tempfile.gettempdir()) / f"{_own_prefix()}{instance}"


def _own_prefix() -> str:
    return f"vllm-sparse-{os.getuid()}-"


def _sweep_other_folders(own: Path) -> None:
    """Remove what instances left whose processes were killed."""
    for found in Path(tempfile.gettempdir()).glob(f"{_own_prefix()}*"):
        if found != own:
            leftovers.sweep(found)


class Counters:
    """This process's counters; they count in memory until :meth:`publish_to` names a folder."""

    def __init__(self) -> None:
        self._values: defaultdict[tuple[str, str], float] = defaultdict(float)
        self._files: dict[bool, MmapedDict] = {}
        self._target: Path | None = None
        self._kept: set[str] = set()

    def add(self, name: str, amount: float, reason: str = "") -> None:
        """Increase a counter, or change a gauge.

        Args:
            name: A key of :data:`METRICS`.
            amount: Of a counter: not negative.
            reason: Label of metrics that have one.
        """
        key = (name, reason)
        self._values[key] += amount
        if self._files:
            self._write(key)

    def set_gauge(self, name: str, value: float) -> None:
        """Set a gauge; the API server adds the processes up."""
        self._values[name, ""] = value
        if self._files:
            self._write((name, ""))

    def value(self, name: str, reason: str = "") -> float:
        """What this process has counted."""
        return self._values[name, reason]

    def publish_to(self, target: Path, family: Family, *, speaks: bool = True) -> None:
        """Mirror the counters to files in ``target`` from now on.

        Args:
            target: See :func:`folder`.
            family: Its counters are there from the beginning, at zero.
            speaks: Off: other processes count the same, but for what each rank has of its own.
        """
        if self._target == target:
            return
        target.mkdir(mode=0o700, exist_ok=True)
        self._target = target
        _sweep_other_folders(target)
        self._kept = set() if speaks else {m.name for m in METRICS.values() if not m.per_rank}
        for gauge, kind in ((False, "counter"), (True, "gauge_livesum")):
            path = target / f"{kind}_{os.getpid()}{_SUFFIX}"
            leftovers.hold(path)
            self._files[gauge] = MmapedDict(str(path))
            # Not atexit, which processes that vLLM forks never come to.
            Finalize(None, _remove, (path,), exitpriority=0)
        for metric in of(family):
            for reason in [reason.value for reason in metric.reasons] or [""]:
                if not metric.gauge:
                    self._values.setdefault((metric.name, reason), 0.0)
        for key in self._values:
            self._write(key)

    def _write(self, key: tuple[str, str]) -> None:
        name, _ = key
        if name not in self._kept:
            self._files[METRICS[name].gauge].write_value(_encoded(*key), self._values[key], 0.0)


@cache
def _encoded(name: str, reason: str) -> str:
    """A metric's key in a file."""
    metric = METRICS[name]
    labels = {"reason": reason} if reason else {}
    names, values = list(labels), list(labels.values())
    return mmap_key(PREFIX + name, metric.series, names, values, metric.meaning)


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)
    if path.parent != shared_folder():  # which is vLLM's
        with contextlib.suppress(OSError):  # another process still counts
            path.parent.rmdir()


_counters = Counters()


def counters() -> Counters:
    """The counters of this process."""
    return _counters


def merged(source: Path) -> Iterable[Metric]:
    """The metrics in a folder, added up over processes."""
    files = [str(path) for path in source.glob(f"*{_SUFFIX}")]
    try:
        return MultiProcessCollector.merge(files)
    except FileNotFoundError:  # the engine is about to end
        return []


def read(source: Path) -> dict[tuple[str, str], float]:
    """Values of the metrics in a folder, by name without prefix and reason."""
    return {
        (metric.name.removeprefix(PREFIX), sample.labels.get("reason", "")): sample.value
        for metric in merged(source)
        for sample in metric.samples
    }
