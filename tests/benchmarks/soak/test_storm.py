# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""One round against a real server of each family, whose engine is killed in the end."""

from __future__ import annotations

import pytest

from benchmarks.soak import checkpoint, crash, serving, storm, traffic
from benchmarks.soak.client import Client

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.slow]

LONGEST = 2048
MUST_GROW = {
    "ROCKETKV": ("num_preemptions", "prefix_cache_hits", "sparse_blocks_evicted"),
    "SPARDA": ("num_preemptions", "prefix_cache_hits", "sparse_frame_misses"),
}


@pytest.mark.parametrize("backend", MUST_GROW)
def test_a_storm_changes_no_answer_and_leaves_nothing(backend, tmp_path):
    model = checkpoint.write(tmp_path / "model", LONGEST)
    findings = storm.Findings()
    with serving.server(model, tmp_path / "log", serving.subject(backend, LONGEST)) as server:
        target = storm.Target(Client(server.url, serving.NAME), server.metrics, LONGEST)
        storm.round_of(target, traffic.plan(2, 8, LONGEST), 16, findings)
        assert findings.faults == []
        for name in MUST_GROW[backend]:
            assert server.metrics()[f"vllm:{name}_total"] > 0, name
        assert findings.counts["hung up"]
        assert findings.counts["compared with alone"] >= 12
        crash.kill_amid_answers(target, server.pid, "engine", findings)
    assert findings.faults == []
    # Counters and gauges of engine and worker, and shared memory between them.
    assert findings.counts["files gone after kill -9 of the engine"] > 4
