# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The benchmark of long generations with made-up engines: turns, points, and what is kept."""

from __future__ import annotations

import json
import re

import pytest
from support.workers import IdleWorker

from benchmarks import generations, report, worker
from benchmarks.worker import WorkerError

CALLS: list[tuple] = []


class FakeWorker(IdleWorker):
    """A step of stock vLLM takes as many milliseconds as it is the n-th; others take one."""

    ends_at: int | None = None

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.done = 0

    def call(self, command, **given):
        CALLS.append((self.arm.name, command, given))
        if command == "begin":
            self.done = 1
            return 2.0
        if command == "stretch":
            first, self.done = self.done, self.done + given["steps"]
            if self.ends_at is not None and self.done > self.ends_at:
                raise WorkerError("ended")
            dense = self.arm.settings is None
            seconds = [1e-3 * (n if dense else 1) for n in range(first, self.done)]
            return {"seconds": seconds, "cpu": sum(seconds) / 2}
        if command == "held":
            return {"blocks": self.done, "num_blocks": 100, "cache_bytes": 100 << 20}
        return None


@pytest.fixture(autouse=True)
def _made_up(monkeypatch):
    CALLS.clear()
    monkeypatch.setattr(worker, "Worker", FakeWorker)
    monkeypatch.setattr(generations.harness, "kv_bytes_per_token", lambda model: 1)
    monkeypatch.setattr(generations, "save_random_llama", lambda folder, **sizes: None)


def run(path, *further):
    arguments = ["--out", str(path), "--arms", "dense,rocketkv-512", "--turn", "500", *further]
    generations.main(arguments)
    return json.loads(path.read_text())["cells"]


def test_arms_take_turns_and_every_thousand_tokens_is_a_point(tmp_path):
    cell = run(tmp_path / "g.json", "--cells", "64+2300-sampled")["64+2300-sampled"]
    begun = [given for _, command, given in CALLS if command == "begin"]
    assert [one["temperature"] for one in begun] == [1.0, 1.0]
    assert {len(one["prompts"][0]) for one in begun} == {64}
    steps = [(arm, given["steps"]) for arm, command, given in CALLS if command == "stretch"]
    assert steps[:4] == [
        *(("dense", 499), ("rocketkv-512", 499), ("rocketkv-512", 500), ("dense", 500)),
    ]
    assert sum(count for arm, count in steps if arm == "dense") == 2299
    curve = cell["arms"]["dense"]["curve"]
    assert [point["generated"] for point in curve] == [1000, 2000, 2300]
    # The first token came with the prompt: steps 1 to 999, then 1000 to 1999.
    assert [round(point["step_ms"], 1) for point in curve] == [500.0, 1499.5, 2149.5]
    assert curve[1]["cpu_ms"] == pytest.approx(curve[1]["mean_ms"] / 2)
    assert [point["device_bytes"] >> 20 for point in curve] == [1000, 2000, 2300]
    assert cell["arms"]["rocketkv-512"]["curve"][0]["step_ms"] == pytest.approx(1)
    shown = report.render(tmp_path / "g.json")
    assert "| 2000 | 1499.50 (749.75) | 2000.0 | 1.00 (0.50) | 2000.0 |" in shown


def test_only_whole_cells_are_kept(tmp_path, monkeypatch):
    path = tmp_path / "g.json"
    run(path, "--cells", "64+100")
    monkeypatch.setattr(FakeWorker, "ends_at", 1500)
    with pytest.raises(WorkerError):
        run(path, "--cells", "64+100", "64+2000")
    found = json.loads(path.read_text())
    assert "ended" in found["interrupted"]
    assert len(found["cells"]["64+2000"]["arms"]["dense"]["curve"]) == 1
    monkeypatch.setattr(FakeWorker, "ends_at", None)
    CALLS.clear()
    cells = run(path, "--cells", "64+100", "64+2000")
    assert len(cells["64+2000"]["arms"]["dense"]["curve"]) == 2
    assert sum(command == "begin" for _, command, _ in CALLS) == 2
    CALLS.clear()
    run(path, "--cells", "64+2000")
    assert not CALLS


@pytest.mark.parametrize("cell", ["64", "64-100", "64+", "64+100-greedy"])
def test_other_cells_are_refused(tmp_path, cell, capsys):
    with pytest.raises(SystemExit):
        run(tmp_path / "g.json", "--cells", cell)
    assert re.search("unknown cell.*expected PROMPT", capsys.readouterr().err)


def test_a_file_about_other_arms_is_not_continued(tmp_path, capsys):
    path = tmp_path / "g.json"
    run(path, "--cells", "64+100")
    with pytest.raises(SystemExit):
        generations.main(["--out", str(path), "--cells", "64+100", "--arms", "dense"])
    assert "compared" in capsys.readouterr().err
