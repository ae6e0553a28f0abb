# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""A row's run with servers that do not start, and a process that is waited for; without vLLM."""

from __future__ import annotations

import json
import os
import subprocess

import pytest

from benchmarks.served import __main__ as served
from benchmarks.served.forked import _Child
from benchmarks.served.rows import ROWS, Row
from vllm_sparse.demo.server import Server, ServerError


class Broken(Server):
    """Says why it does not start."""

    def __enter__(self):
        self._log_path.write_text(f"embedding models do not decode {self._arguments}")
        raise ServerError("vllm serve ended")


@pytest.fixture
def run(tmp_path):
    found = served.Run(tmp_path, tmp_path, forks=False)
    found._ours = Broken
    return found


def test_a_server_that_does_not_start_is_a_row_s_fault(run):
    found = run.row(Row("a row", options=("--enable-lora", "--lora-modules", "x={adapter}")))
    assert found["faults"] == ["vllm serve ended"]
    assert (found["judge"], found["processes"]) == ("rocketkv", "spawned")
    log = (run._logs / "a-row-ours.log").read_text()
    assert f"x={run._checkpoints.path('adapter')}" in log
    assert "'max_token_budget': 2048" in log.replace('"', "'")


def test_a_server_that_must_not_start_says_why(run):
    (row,) = (row for row in ROWS if row.refused)
    assert run.row(row)["faults"] == []
    (fault,) = run.row(row._replace(refused="another reason"))["faults"]
    assert "no word of 'another reason'" in fault


def test_rows_that_fail_are_noted_and_the_next_ones_run(tmp_path, monkeypatch):
    def row(self, row):
        return {"faults": ["wrong"] * (row.name == "LoRA"), "seconds": 1}

    monkeypatch.setattr(served.Run, "row", row)
    out = tmp_path / "out.json"
    chosen = ["--out", str(out), "--rows", "fp8", "LoRA", "EAGLE"]
    assert served.main(chosen) == 1
    rows = json.loads(out.read_text())["rows"]
    assert {name for name, found in rows.items() if found["faults"]} == {"LoRA"}
    assert len(rows) == 3
    assert served.main(["--out", str(out), "--rows", "fp8", "--resume"]) == 0
    assert len(json.loads(out.read_text())["rows"]) == 3


def test_a_child_is_waited_for():
    process = subprocess.Popen(["sleep", "60"])
    child = _Child(process.pid)
    assert child.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(0.2)
    child.terminate()
    assert child.wait(10) == -15
    assert child.poll() == -15
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)
    process.returncode = -15
