# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The speed benchmark with made-up engines: few rounds, and runs that end early."""

from __future__ import annotations

import json

import pytest
from support.workers import IdleWorker

from benchmarks import corpus, harness, report, speed, worker


class FakeWorker(IdleWorker):
    """Stock vLLM takes 4 ms a step at length and 1 ms at 128 tokens, the other arm 2 and 1."""

    start_seconds = 0.0
    stop_after = 10**9
    calls = 0
    length = 0

    def call(self, command, **given):
        FakeWorker.calls += 1
        if FakeWorker.calls > FakeWorker.stop_after:
            raise KeyboardInterrupt
        if command == "begin":
            self.length = len(given["prompts"][0])
        if command == "decode":
            long = 0.004 if self.arm.settings is None else 0.002
            return [long if self.length > 200 else 0.001] * given["steps"]
        if command == "first_two":
            return [1.0, 1.1] if self.arm.settings is None else [1.1, 1.32]
        return {}


@pytest.fixture(autouse=True)
def _made_up(monkeypatch):
    monkeypatch.setattr(FakeWorker, "calls", 0)
    monkeypatch.setattr(FakeWorker, "stop_after", 10**9)
    monkeypatch.setattr(worker, "Worker", FakeWorker)
    monkeypatch.setattr(harness, "resolve_model", lambda name: name)
    monkeypatch.setattr(harness, "kv_bytes_per_token", lambda model: 1)
    monkeypatch.setattr(harness, "tokenizer_of", lambda name: None)
    monkeypatch.setattr(
        corpus, "documents", lambda _, count, length: [[n] * length for n in range(count)]
    )


def run(path, *arguments: str) -> dict:
    """Runs one cell and returns the file."""
    cells = ("--cells", "smollm2-8192-b8", "--patience", "0", "--prefills", "2")
    speed.main(["--out", str(path), *cells, *arguments])
    return json.loads(path.read_text())


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_any_number_of_rounds_is_enough(tmp_path, rounds, capsys):
    (cell,) = run(tmp_path / "s.json", "--rounds", str(rounds))["cells"]
    ours = cell["arms"]["rocket-512"]
    assert cell["bound"] == pytest.approx(4)
    assert ours["speedup"] == pytest.approx(2)
    assert ours["speedup_by_round"]["n"] == rounds
    assert ours["share_of_bound"] == pytest.approx(0.5)
    assert ours["prefill_overhead_percent"] == pytest.approx(10)
    assert ours["second_token_overhead_percent"] == pytest.approx(20)
    assert ours["second_token_seconds"]["median"] == pytest.approx(1.32)
    assert ours["step_ms"]["n"] == rounds * 9
    assert ours["step_ms_at_128_tokens"]["n"] == rounds * 9
    assert "2.00x (2.00-2.00)" in capsys.readouterr().out


def test_a_run_that_is_interrupted_at_any_moment_leaves_what_it_measured(tmp_path):
    run(tmp_path / "whole.json", "--rounds", "2")
    total, seen = FakeWorker.calls, []
    for stop in range(0, total, 3):
        FakeWorker.calls, FakeWorker.stop_after = 0, stop
        path = tmp_path / f"{stop}.json"
        with pytest.raises(KeyboardInterrupt):
            run(path, "--rounds", "2")
        if not path.exists():  # nothing was measured yet
            seen.append(set())
            continue
        found = json.loads(path.read_text())
        assert found["interrupted"] == "KeyboardInterrupt"
        assert "Ended early" in report.render(path)
        seen.append(set(found["cells"][0]["arms"]["rocket-512"]))
    first, last = seen[0], seen[-1]
    assert first == set()
    assert {
        "step_ms",
        "step_ms_at_128_tokens",
        "prefill_seconds",
        "second_token_seconds",
        "speedup",
    } <= last
    assert any("step_ms_at_128_tokens" in keys and "step_ms" not in keys for keys in seen)


def test_cells_that_are_done_survive_the_next_one(tmp_path):
    path = tmp_path / "s.json"
    run(path, "--rounds", "1")
    FakeWorker.stop_after, FakeWorker.calls = FakeWorker.calls + 5, 0
    with pytest.raises(KeyboardInterrupt):
        run(path, "--rounds", "1", "--cells", "smollm2-8192-b8", "qwen-16384-b4")
    (cell,) = json.loads(path.read_text())["cells"]
    assert cell["cell"]["model"] == "smollm2"
    assert "speedup" in cell["arms"]["rocket-512"]
