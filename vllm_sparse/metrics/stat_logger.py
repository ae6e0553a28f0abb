# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What the API server does with the counters: ``/metrics``, and a line in the log now and then."""

from __future__ import annotations

import atexit
import inspect
from typing import TYPE_CHECKING, Any, ClassVar

from prometheus_client.registry import Collector
from vllm.logger import init_logger
from vllm.v1.metrics.loggers import AggregateStatLoggerBase
from vllm.v1.metrics.prometheus import get_prometheus_registry

from vllm_sparse import leftovers
from vllm_sparse.instance import instance_of
from vllm_sparse.metrics import summary
from vllm_sparse.metrics.published import folder, merged, read, shared_folder
from vllm_sparse.registry import is_ours
from vllm_sparse.seams import replace_once

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from prometheus_client import CollectorRegistry, Metric

# A child of vLLM's logger: others have no handler in its processes.
logger = init_logger("vllm.sparse")


def watch_servers() -> None:
    """Have the API servers of this process serve our counters, if one of our backends is chosen.

    vLLM's entry points for loggers know no configuration, and one of any package switches its
    statistics on, also for who has switched them off.
    """
    from vllm.v1.engine.async_llm import AsyncLLM

    def make(stock: Any) -> Any:
        def __init__(self: Any, *arguments: Any, **named: Any) -> None:
            given = inspect.signature(stock).bind(self, *arguments, **named)
            if is_ours(given.arguments["vllm_config"].attention_config.backend):
                others = given.arguments.get("stat_loggers") or ()
                given.arguments["stat_loggers"] = [*others, SparseStatLogger]
            stock(*given.args, **given.kwargs)

        return __init__

    replace_once(AsyncLLM, "__init__", make)


class FolderCollector(Collector):
    """Adds the files of one instance up at every scrape.

    Args:
        source: Their folder.
    """

    def __init__(self, source: Path) -> None:
        self._source = source

    def collect(self) -> Iterable[Metric]:
        """See :class:`Collector`."""
        return merged(self._source)


class SparseStatLogger(AggregateStatLoggerBase):
    """Adds our counters to what the API server serves, and says in its log what they counted.

    vLLM makes one of these in every API server, whatever the number of engines behind it.

    Args:
        vllm_config: vLLM's configuration.
        engine_indexes: The engines; their files lie in one folder.
    """

    _registered: ClassVar[tuple[CollectorRegistry, FolderCollector] | None] = None

    def __init__(self, vllm_config: Any, engine_indexes: list[int]) -> None:
        self._source: Path | None = None
        backend = vllm_config.attention_config.backend
        if not is_ours(backend):
            return
        self._backend = backend.name
        source = folder(instance_of(vllm_config).name)
        if shared_folder() is None:  # else vLLM's own collector finds our files
            self._register(FolderCollector(source))
            # This process outlives engine and workers, which may be killed.
            atexit.register(leftovers.sweep_at_the_end, source)
        # All API servers read the same files; the first one speaks.
        if vllm_config.parallel_config._api_process_rank <= 0:
            self._source = source
            self._last = read(source)

    @classmethod
    def _register(cls, collector: FolderCollector) -> None:
        """In place of that of an engine before, whose counters have the same names."""
        if cls._registered is not None:
            registry, before = cls._registered
            registry.unregister(before)
        registry = get_prometheus_registry()
        registry.register(collector)
        cls._registered = registry, collector

    def record(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: counters travel through files."""

    def log_engine_initialized(self) -> None:
        """Nothing to do: the workers print the start-up line."""

    def log(self) -> None:
        """Called every ``VLLM_LOG_STATS_INTERVAL`` seconds, as vLLM's own line is."""
        if self._source is None:
            return
        now = read(self._source)
        if line := summary.line(self._backend, self._last, now):
            logger.info(line)
        self._last = now
