# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Counters of several processes, added up by another."""

from __future__ import annotations

import multiprocessing
from contextlib import contextmanager

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector

from vllm_sparse.metrics.published import Counters, folder, read


def _rank(target, speaks, ready, end):
    """A tensor-parallel rank of two."""
    counters = Counters()
    counters.add("decode_rows", 5)  # before anybody asks
    counters.publish_to(target, "SPARDA", speaks=speaks)
    counters.add("decode_rows", 2)
    counters.add("frame_misses", 3)
    counters.add("dense_fallbacks", 1, "shorter_than_dense_len")
    counters.set_gauge("slab_frames", 64)
    counters.add("slab_frames", 1)
    ready.set()
    end.wait(60)


@contextmanager
def _ranks(target):
    """Two forked processes, as vLLM's workers are."""
    context = multiprocessing.get_context("fork")
    end, ready = context.Event(), [context.Event() for _ in range(2)]
    ranks = [
        context.Process(target=_rank, args=(target, speaks, ready[speaks], end))
        for speaks in (True, False)
    ]
    for rank in ranks:
        rank.start()
    try:
        assert all(event.wait(60) for event in ready)
        yield
    finally:
        end.set()
        for rank in ranks:
            rank.join(60)


EXPECTED = {
    ("decode_rows", ""): 7,  # the same on both ranks
    ("frame_misses", ""): 6,  # one share each
    ("dense_fallbacks", "shorter_than_dense_len"): 1,
    ("slab_frames", ""): 130,
    ("frame_hits", ""): 0,  # there from the beginning, so that a rate sees the first
}


def test_ranks_are_added_up_and_leave_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    target = folder("instance")
    with _ranks(target):
        found = read(target)
        assert {key: found[key] for key in EXPECTED} == EXPECTED
        assert ("visible_tokens", "") not in found, "a policy's"
        assert ("dense_fallbacks", "") not in found
    assert not target.exists()
    assert read(target) == {}


def test_vllms_folder_for_several_api_servers_is_used_and_kept(tmp_path, monkeypatch):
    """There, each API server and each engine has another name."""
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    assert folder("engine") == folder("front-end") == tmp_path
    with _ranks(folder("engine")):
        registry = CollectorRegistry()
        MultiProcessCollector(registry)  # as vLLM's get_prometheus_registry
        for (name, reason), value in EXPECTED.items():
            series = f"vllm:sparse_{name}{'' if name == 'slab_frames' else '_total'}"
            assert registry.get_sample_value(series, {"reason": reason} if reason else {}) == value
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("family", "there"), [("policies", "short_prompt"), ("SPARDA", None)])
def test_each_family_starts_with_its_own_at_zero(tmp_path, family, there):
    Counters().publish_to(tmp_path, family)
    reasons = {reason for name, reason in read(tmp_path) if name == "dense_fallbacks"}
    assert ("short_prompt" in reasons) == (there is not None)
    assert set(read(tmp_path).values()) == {0.0}
