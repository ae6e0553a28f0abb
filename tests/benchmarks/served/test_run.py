# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""A row's run with servers that do not start, and a process that is waited for; without vLLM."""

from __future__ import annotations

import json
import os
import sys
import time
from types import SimpleNamespace

import pytest

from benchmarks.served import __main__ as served
from benchmarks.served import forked
from benchmarks.served.rows import ROWS, Row
from benchmarks.soak import watch
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


def test_a_forked_server_is_a_process_like_another(tmp_path, monkeypatch):
    """It leads a session, prints to its log, and Popen neither waits for it nor loses its end."""

    def main():
        os.write(1, f"{os.environ['FORKED']} {sys.argv[1:]}\n".encode())
        time.sleep(600 if sys.argv[1] == "stay" else 0)
        sys.exit(3)

    monkeypatch.setattr(forked, "_import", lambda: None)
    stand_in = SimpleNamespace(main=main, forked_workers=lambda: None)
    for name in ("vllm.entrypoints.cli.main", "support.stand_ins"):
        monkeypatch.setitem(sys.modules, name, stand_in)
    for what, status in (("stay", -15), ("end", 3)):
        server, log = forked.ForkedServer([], tmp_path / "log"), tmp_path / what
        with log.open("wb") as into:
            process = server._start(["vllm", what], {"FORKED": "yes"}, into)
        if what == "stay":
            watch.until(lambda log=log: log.read_text() != "", 120)
            assert process.poll() is None
            assert os.getpgid(process.pid) == process.pid != os.getpgid(0)
            process.terminate()
        assert process.wait(120) == status
        assert log.read_text() == f"yes ['{what}']\n"
