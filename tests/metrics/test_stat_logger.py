# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What vLLM's API servers make of the counters; ``tests/test_serve.py`` asks a real one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from vllm_sparse.instance import Instance
from vllm_sparse.metrics.published import Counters, folder

stat_logger = pytest.importorskip("vllm_sparse.metrics.stat_logger", exc_type=ImportError)
pytestmark = pytest.mark.vllm


def config(name, rank=0, backend="ROCKETKV"):
    return SimpleNamespace(
        attention_config=SimpleNamespace(backend=backend and SimpleNamespace(name=backend)),
        compilation_config=SimpleNamespace(_vllm_sparse=Instance(name)),
        parallel_config=SimpleNamespace(_api_process_rank=rank),
    )


@pytest.fixture
def said(monkeypatch, tmp_path):
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    lines = []
    monkeypatch.setattr(stat_logger.logger, "info", lines.append)
    return lines


def counted(name, amount):
    counters = Counters()
    counters.publish_to(folder(name), "policies")
    counters.add("requests", amount)
    return counters


def scraped():
    registry, _ = stat_logger.SparseStatLogger._registered
    return registry.get_sample_value("vllm:sparse_requests_total")


def test_one_line_of_all_engines_and_only_if_something_was_counted(said):
    counters = counted("one", 3)
    logger = stat_logger.SparseStatLogger(config("one"), engine_indexes=[0, 1])
    logger.log()
    assert said == [], "it counts from its own start on"
    counters.add("requests", 2)
    logger.log()
    logger.log()
    assert said == ["ROCKETKV: Sparse: 2 reqs, Dense: 0 reqs"]
    assert scraped() == 5


def test_other_api_servers_are_silent(said):
    counters = counted("one", 3)
    logger = stat_logger.SparseStatLogger(config("one", rank=1), engine_indexes=[0])
    counters.add("requests", 2)
    logger.log()
    assert said == []


def test_an_engine_takes_the_place_of_the_one_before(said):
    """As vLLM's own metrics do; a registry refuses names that it has."""
    for instance, amount in (("first", 3), ("second", 4)):
        counted(instance, amount)
        stat_logger.SparseStatLogger(config(instance), engine_indexes=[0])
        assert scraped() == amount


def test_engines_that_are_not_the_first_are_served_alone(said):
    """Behind another load balancer, a front-end may have engine 1 only."""
    counted("alone", 6)
    stat_logger.SparseStatLogger(config("alone"), engine_indexes=[1])
    assert scraped() == 6


def test_servers_of_our_backends_alone_get_one(monkeypatch):
    """An entry point would switch vLLM's statistics on for servers of every backend."""
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.metrics.loggers import load_stat_logger_plugin_factories

    ours = stat_logger.SparseStatLogger
    assert ours not in load_stat_logger_plugin_factories()
    given = []

    def stock(self, vllm_config, executor_class, log_stats, log_requests=True, stat_loggers=None):
        given.append((executor_class, log_stats, stat_loggers))

    monkeypatch.setattr(AsyncLLM, "__init__", stock)
    for _ in range(2):  # start-up is asked several times
        stat_logger.watch_servers()
    AsyncLLM(config("stock", backend=None), "any", False)
    AsyncLLM(vllm_config=config("one"), executor_class="any", log_stats=False)
    others = [int]
    AsyncLLM(config("two"), "any", True, True, others)
    assert given == [("any", False, None), ("any", False, [ours]), ("any", True, [int, ours])]
    assert others == [int]


def test_stock_backends_get_nothing(said):
    before = stat_logger.SparseStatLogger._registered
    stat_logger.SparseStatLogger(config("stock", backend=None), engine_indexes=[0]).log()
    assert stat_logger.SparseStatLogger._registered is before
