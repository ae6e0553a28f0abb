# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Forced misses with made-up engines: whose link it is, whose turn, and what is checked."""

from __future__ import annotations

import json

import pytest
from support.workers import IdleWorker

from benchmarks import corpus, harness, offload, report, worker

PIECE, LAYERS, KV_HEADS, FREE = 64 * 2 * 2 * 32, 4, 2, 4
CALLS: list[tuple] = []


class FakeWorker(IdleWorker):
    """A resident step takes 8 ms; every arm moves what it is to, unless it is told not to."""

    moves = 1

    def call(self, command, **given):
        CALLS.append((self.arm.name, command, given, dict(self.arm.settings)))
        if command == "begin_forced":
            shape = {"layers": LAYERS, "kv_heads": KV_HEADS, "piece_bytes": PIECE}
            return {**shape, "frames": [3] * LAYERS}
        misses = round(given["rate"] * FREE) * given["steps"] * given["batch"]
        moved = self.moves * misses * PIECE
        counts = {
            "frame_misses": misses, "expected_misses": misses, "frame_hits": 1,
            "host_to_device_bytes": moved, "engine_bytes": moved, "prefetch_issued": misses,
            "prefetch_late": 0, "exposed_wait_seconds": 0.0, "free_picks": FREE * given["steps"],
        }  # fmt: skip
        return {"seconds": [0.008] * given["steps"], "counts": counts}


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs the part, and returns its result."""
    CALLS.clear()
    config = {"num_attention_heads": 4, "num_key_value_heads": KV_HEADS, "hidden_size": 128}
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": LAYERS}))
    monkeypatch.setattr(worker, "Worker", FakeWorker)
    monkeypatch.setattr(harness, "tokenizer_of", lambda _: None)
    monkeypatch.setattr(corpus, "documents", lambda _, count, length: [[1] * length] * count)
    monkeypatch.setattr(harness, "exit_cleanly", lambda: None)

    def run(*further):
        out = tmp_path / "overlap.json"
        arguments = ["--model", str(tmp_path), "--out", str(out), "--context", "2048", "--batch",
                     "2", "--top-k", "8", "--rates", "0", "0.5", "--steps", "4", "--rounds", "1",
                     "--link-steps", "2"]  # fmt: skip
        offload.main(["overlap", *arguments, *further])
        return json.loads(out.read_text()), out

    return run


def test_the_resident_arm_tells_the_link_of_the_others(run):
    found, out = run()
    # 15 % of 4 free picks, of 2 requests and 2 heads, in the 2 ms of a layer.
    assert found["link_gb_per_s"] == pytest.approx(4 * PIECE / 0.002 / 1e9)
    assert "link_gb_per_s" not in found["settings"]["resident"]
    links = {name: own["link_gb_per_s"] for name, own in found["settings"].items()
             if name != "resident"}  # fmt: skip
    assert len(links) == 4
    assert set(links.values()) == {found["link_gb_per_s"]}
    turns = [(name, given["rate"]) for name, command, given, _ in CALLS if command == "forced"]
    names = list(found["settings"])
    back = [(name, 0.5) for name in reversed(names)]
    assert turns == [("resident", 0.0), *((name, 0.0) for name in names), *back]
    rows = {(row["arm"], row["rate"]): row for row in found["rows"]}
    assert rows["prefetch", 0.5]["misses_per_step"] == 4
    assert rows["prefetch", 0.5]["step_ms"]["median"] == pytest.approx(8)
    assert "| prefetch | 8.0 (8.0-8.0) |" in report.render(out)


def test_a_given_link_is_not_measured(run):
    found, _ = run("--link-gb-per-s", "0.25")
    assert {own.get("link_gb_per_s", 0.25) for own in found["settings"].values()} == {0.25}
    assert sum(command == "forced" for _, command, _, _ in CALLS) == 10


def test_bytes_that_are_not_the_misses_end_the_run(run, monkeypatch):
    monkeypatch.setattr(FakeWorker, "moves", 2)
    with pytest.raises(RuntimeError, match="resident at 50%: 16 misses were forced"):
        run()
