# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Stages under the runner: every ending of a subprocess, budgets, merging, tables."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from benchmarks.gpu import runner, stages

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).resolve().parents[3]
MODULE = "tests.benchmarks.gpu.test_runner"
NAPS = ("meets", "meets too", "alone", "last")


def succeeds(report, options):
    report.note(seed=options.seed)
    report.add(value=1.5)


def hangs(report, options):
    report.add(value="before")
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    report.note(child=child.pid)
    time.sleep(600)


def crashes(report, options):
    report.add(value="before")
    os.kill(os.getpid(), signal.SIGKILL)


def raises(report, options):
    report.add(value="before")
    raise ValueError("out of\n  luck")


def sleeps(report, options):
    begin = time.time()
    time.sleep(0.2)
    report.add(begin=begin, end=time.time())


def meets(own, other, report, options):
    """Ends when another stage has begun, too."""
    begin = time.time()
    (options.out / own).touch()
    while not (options.out / other).exists():
        time.sleep(0.02)
    report.add(begin=begin, end=time.time())


def checks(report, options):
    raise stages.CheckFailedError("3 is not 4")


def refuses(report, options):
    raise stages.NotAvailableError("no such thing here")


def plan(options):
    every = [
        stages.Stage("succeeds", succeeds, 60),
        stages.Stage("hangs", hangs, 30, min_s=1),
        stages.Stage("crashes", crashes, 60),
        stages.Stage("raises", raises, 60, needs=("succeeds",)),
        stages.Stage("checks", checks, 60),
        stages.Stage("refuses", refuses, 60),
        stages.Stage("watched", succeeds, 60, prefix=("sh", "-c", '"$@"; exit 9', "sh")),
        stages.Stage(
            "unwatchable",
            checks,
            60,
            prefix=("sh", "-c", 'echo "= not supported"; "$@"', "sh"),
            unavailable=("not supp",),
        ),
        stages.Stage("dependent", succeeds, 60, needs=("crashes",)),
    ]
    naps = [stages.Stage(name, partial(meets, name, other), 60)
            for name, other in (NAPS[:2], NAPS[1::-1])]  # fmt: skip
    naps += [stages.Stage(name, sleeps, 60, alone=name == "alone") for name in NAPS[2:]]
    naps.append(stages.Stage("waits", hangs, 600, min_s=1))
    return every if options.only is None else [*every, *naps]


def outcome(arguments: Sequence[str], **how: bool) -> int:
    """Runs the stages above and returns the exit status."""
    parser = argparse.ArgumentParser()
    stages.add_options(parser, "tried")
    return runner.main(
        MODULE, "tried", parser, plan,
        lambda results: ("a table", {"extra": len(results)}), arguments, **how,
    )  # fmt: skip


def run(tmp_path, *arguments: str) -> dict:
    """Runs the stages above and returns the result file."""
    outcome(("--out", str(tmp_path), *arguments))
    return json.loads((tmp_path / "tried.json").read_text())


def has_ended(pid: int) -> bool:
    """Whether a process is gone, or only waits for its parent to notice."""
    for _ in range(3000):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


def test_every_ending_of_a_stage_is_told_apart_and_keeps_its_rows(tmp_path, capsys):
    result = run(tmp_path, "--seed", "7")
    found = result["stages"]
    assert {name: stage["status"] for name, stage in found.items()} == {
        "succeeds": "ok",
        "hangs": "timed out",
        "crashes": "crashed",
        "raises": "failed",
        "checks": "failed",
        "refuses": "not available",
        "watched": "failed",
        "unwatchable": "not available",
        "dependent": "skipped",
    }
    assert found["succeeds"]["rows"] == [{"value": 1.5}]
    assert found["succeeds"]["facts"] == {"seed": 7}
    for name in ("hangs", "crashes", "raises"):
        assert found[name]["rows"] == [{"value": "before"}]
        assert found[name]["log_tail"]
    assert found["raises"]["reason"] == "out of luck"
    assert found["checks"]["reason"] == "3 is not 4"
    assert found["refuses"]["reason"] == "no such thing here"
    assert found["unwatchable"]["reason"] == "not supported"
    assert found["dependent"]["reason"] == "needs crashes"
    assert result["environment"]["seed"] == 7
    assert "torch" in result["environment"]["versions"]
    assert "gpu" in result["environment"]
    assert result["extra"] == 9
    assert has_ended(found["hangs"]["facts"]["child"])
    printed = capsys.readouterr().out
    assert printed.index("stage ") < printed.index("a table") < printed.index("full result")
    assert "not run: dependent; for these use --only crashes dependent" in printed


def test_a_process_that_does_not_even_die_stops_nobody(tmp_path):
    """As with a driver that does not let go of it."""

    def wait(timeout=None):
        assert timeout is not None, "it would be waited for, for ever"
        raise subprocess.TimeoutExpired("stage", timeout)

    options = SimpleNamespace(out=tmp_path, site=tmp_path)
    tried = runner.Run(MODULE, "tried", options, (), {})
    tried._work = tmp_path
    process = SimpleNamespace(pid=1 << 30, poll=lambda: None, wait=wait)
    (log := tmp_path / "hangs.log").write_text("a line")
    child = runner._Child(stages.Stage("hangs", hangs, 1), process, log, time.monotonic() - 2, 1)
    tried._children.append(child)
    tried._finish(child)
    assert tried.results["hangs"]["status"] == "timed out"
    assert tried.results["hangs"]["reason"].endswith("but process 1073741824 does not end")


def test_a_used_up_budget_skips_the_rest_and_says_so(tmp_path, capsys):
    result = run(tmp_path, "--budget-s", "6", "--only", "refuses", "hangs")
    assert list(result["stages"]) == ["hangs", "refuses"]  # by value, as in the plan
    assert result["stages"]["hangs"]["status"] == "timed out"
    assert result["stages"]["refuses"]["status"] == "skipped"
    assert "budget of 6 s" in result["stages"]["refuses"]["reason"]
    assert "not run: refuses" in capsys.readouterr().out


def test_a_killed_run_keeps_what_it_has(tmp_path):
    """And leaves no process behind."""
    command = [sys.executable, "-m", MODULE, "--out", str(tmp_path)]
    command += ["--only", "succeeds", "waits"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if "waits (at most" in line:
                break
        deadline = time.monotonic() + 120
        file = tmp_path / "tried.json"
        while time.monotonic() < deadline:
            found = json.loads(file.read_text())["stages"].get("waits", {"facts": {}})
            if "child" in found["facts"]:
                break
            time.sleep(0.05)
        assert found["status"] == "running"  # even a run that is killed at once keeps these
        assert found["rows"] == [{"value": "before"}]
        process.terminate()
        process.wait(timeout=120)
    result = json.loads((tmp_path / "tried.json").read_text())
    assert result["stages"]["succeeds"]["status"] == "ok"
    assert result["stages"]["waits"]["status"] == "interrupted"
    assert result["stages"]["waits"]["rows"] == [{"value": "before"}]
    assert has_ended(found["facts"]["child"])
    assert "'child': " in (tmp_path / "tried.log").read_text()


def test_what_has_been_measured_is_merged_and_not_measured_again(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("VLLM_SPARSE_COMMIT", "of all runs")  # git may take too long to be heard
    first = run(tmp_path, "--only", "succeeds", "raises")
    earlier = tmp_path / "earlier.json"
    (tmp_path / "tried.json").rename(earlier)
    result = run(tmp_path, "--merge", str(earlier), "--only", "raises", "refuses")
    assert list(result["stages"]) == ["succeeds", "raises", "refuses"]
    merged = result["stages"]["succeeds"]
    assert merged == {**first["stages"]["succeeds"], "of": first["environment"]["date"]}
    assert "succeeds (at most" not in capsys.readouterr().err.split("raises: failed")[-1]
    first["stages"]["succeeds"]["rows"].append({"skipped": "no time"})
    first["stages"]["another program's"] = first["stages"]["succeeds"] | {"rows": []}
    earlier.write_text(json.dumps(first))
    again = run(tmp_path, "--merge", str(earlier), "--only", "refuses")
    assert list(again["stages"]) == ["refuses"]  # nothing is taken over that left something out
    with pytest.raises(SystemExit):
        run(tmp_path, "--merge", str(earlier), "--seed", "1", "--only", "refuses")
    assert "seed was 0 and is 1" in capsys.readouterr().err


def test_stages_that_measure_no_time_run_at_once(tmp_path):
    result = run(tmp_path, "--only", *NAPS, "--jobs", "4")
    assert {stage["status"] for stage in result["stages"].values()} == {"ok"}
    spans = {name: stage["rows"][0] for name, stage in result["stages"].items()}
    first, second, alone, last = (spans[name] for name in NAPS)
    assert first["begin"] < second["end"]
    assert second["begin"] < first["end"]
    assert alone["begin"] > max(first["end"], second["end"])
    assert last["begin"] > alone["end"]


def test_a_run_that_is_to_be_complete_says_if_it_is_not(tmp_path):
    arguments = ["--only", "succeeds", "refuses", "--budget-s", "60", "--out", str(tmp_path)]
    assert outcome(arguments, complete=True) == 0
    arguments[arguments.index("60")] = "10"
    assert outcome(arguments, complete=False) == 0
    assert outcome(arguments, complete=True) == runner.INCOMPLETE
    arguments[2] = "raises"
    arguments[arguments.index("10")] = "60"
    assert outcome(arguments, complete=True) == 1


def test_results_name_no_folder_of_the_machine(tmp_path):
    result = run(tmp_path, "--only", "raises")
    text = json.dumps(result)
    assert str(tmp_path) not in text
    assert str(ROOT) not in text
    assert 'File \\"WORK/path/' in text  # of the traceback


def test_an_unknown_stage_is_refused(tmp_path):
    with pytest.raises(SystemExit):
        run(tmp_path, "--only", "nothing")


if __name__ == "__main__":
    chosen = argparse.ArgumentParser()
    stages.add_options(chosen, "tried")
    sys.exit(runner.main(__spec__.name, "tried", chosen, plan, lambda results: ("", {})))
