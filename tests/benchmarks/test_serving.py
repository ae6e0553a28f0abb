# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Points of throughput and latency: what is asked of vLLM's client, what is kept, what is shown."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import arms, servers, serving


class StubServer:
    """Gauges that change with every look."""

    url = "http://127.0.0.1:1"

    def __init__(self, *looks):
        self.looks = list(looks)

    def metrics(self):
        return self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]

    def num_blocks(self):
        return 101

    def log_tail(self):
        return "  | its log"


def gauges(running, usage, preemptions, hits=0.0):
    return {
        servers.RUNNING: running, servers.USAGE: usage, servers.PREEMPTIONS: preemptions,
        servers.HITS: hits, servers.LOOKED_UP: 2 * hits,
    }  # fmt: skip


def test_a_watch_keeps_peaks_and_growth():
    looks = [gauges(0, 0, 7.0), gauges(3, 0.25, 7), gauges(2, 0.55, 8), gauges(0, 0.0, 9.0, 64.0)]
    server = StubServer(*looks)
    with servers.Watch(server, period=0.001) as watch:
        while len(server.looks) > 1:
            pass
    found = watch.found()
    assert found == {
        "peak_running": 3, "peak_waiting": 0, "peak_blocks": 55, "preemptions": 2,
        "cached_tokens": 64, "looked_up_tokens": 128,
    }  # fmt: skip


def options():
    return SimpleNamespace(**{"context": 1000, "output": 100, "prompts": 3})


RESULT = {
    **{"completed": 6, "failed": 0, "duration": 2.0, "output_throughput": 300.0},
    **{"total_token_throughput": 3000.0, "label": "not kept"},
    **{
        f"{part}_{kind}_ms": float(number)
        for number, (part, kind) in enumerate(
            (part, kind) for kind in serving.LATENCIES for part in ("mean", "p50", "p99")
        )
    },
}


@pytest.fixture
def client(monkeypatch):
    """Stands in for vLLM's client: writes `RESULT` where it is told to; returns its commands."""

    def run(command, **_):
        commands.append(command)
        folder, name = (
            command[command.index(f"--result-{part}") + 1] for part in ("dir", "filename")
        )
        Path(folder, name).write_text(json.dumps({**RESULT, **changed}))
        return SimpleNamespace(returncode=0, stdout="", stderr="")

    commands, changed = [], {}
    monkeypatch.setattr(subprocess, "run", run)
    return SimpleNamespace(commands=commands, changed=changed)


def test_a_point_is_what_the_client_and_the_gauges_say(client):
    server = StubServer(gauges(1, 0.1, 0))
    found = serving.point(server, Path("model"), 2, 5, options())
    text = " ".join(client.commands[0])
    for part in ("bench serve", "--max-concurrency 2", "--num-prompts 6", "--seed 5",
                 "--random-input-len 900", "--random-output-len 100", "--ignore-eos"):  # fmt: skip
        assert part in text
    assert found["requests"] == 6
    assert found["output_throughput"] == 300.0
    assert found["tpot_ms"] == {"mean": 3.0, "p50": 4.0, "p99": 5.0}
    assert found["preemptions"] == 0
    assert "label" not in found


def test_failed_requests_are_an_error(client):
    client.changed["failed"] = 1
    with pytest.raises(serving.ClientError, match=r"1 of 6 requests failed:\n.*its log"):
        serving.point(StubServer(gauges(1, 0.1, 0)), Path("model"), 2, 5, options())


def test_a_server_of_an_arm_has_its_options_and_the_same_bytes(monkeypatch, tmp_path):
    made = []

    def started(command, log, environment):
        assert environment == {"THP_MEM_ALLOC_ENABLE": "1"}  # huge pages, as our cache has
        made.append(" ".join(command))

    monkeypatch.setattr(servers, "Server", started)
    config = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_size": 64}))
    for name in ("dense", "rocketkv-512+fp8"):
        servers.server_of(arms.parse_arm(name), tmp_path, 2048, 4096, tmp_path, "--enforce-eager")
    dense, ours = made
    size = re.search(r"--kv-cache-memory-bytes (\d+)", dense)
    assert size
    assert size[0] in ours
    assert "--attention-backend" not in dense
    assert (
        '--attention-backend ROCKETKV --additional-config {"vllm_sparse": {"token_budget": 512'
        in ours
    )
    assert "--kv-cache-dtype fp8" in ours
    assert dense.endswith("--max-model-len 2048 " + size[0] + " --enforce-eager")


def test_rounds_are_shown_by_their_medians():
    kept = serving._kept(RESULT)
    gauges_of = {"peak_running": 2, "peak_blocks": 9, "preemptions": 0}
    points = [
        {"arm": arm, "round": n, "users": users, **gauges_of, **kept, "output_throughput": speed}
        for arm, n, users, speed in (
            *(("dense", 0, 1, 10.0), ("dense", 0, 2, 20.0), ("rocketkv-512", 0, 1, 30.0)),
            *(("dense", 1, 1, 14.0), ("dense", 2, 1, 99.0)),
        )
    ]
    head = {"model": "m", "context": 1000, "output": 100, "pool_tokens": 4000}
    text = serving.render({**head, "points": points})
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line]
    assert [row[:3] for row in rows[2:]] == [
        ["1", "dense", "14.0"], ["1", "rocketkv-512", "30.0"], ["2", "dense", "20.0"],
    ]  # fmt: skip
    assert rows[2][4:6] == ["4 / 5", "7"]
