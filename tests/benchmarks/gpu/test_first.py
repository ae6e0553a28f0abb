# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The first run on a GPU with stages that end in every way: each is reported, none is lost."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.gpu import check, first, runner, stages

from .test_runner import has_ended

if TYPE_CHECKING:
    import argparse

ROOT = Path(__file__).resolve().parents[3]
MODULE = "tests.benchmarks.gpu.test_first"
THOUSAND = 1024


def fails(report, options):
    report.add(case="a", kernel="append", error=1.0, limit=0.1, ok=False)
    raise stages.CheckFailedError("differ from the reference: append (a)")


def hangs(report, options):
    report.note(outputs=[])
    time.sleep(600)


def measures(step_ms, report, options):
    for context, batch in ((32, 1), (128, 1)):
        report.add(
            context=context * THOUSAND, wanted=batch, batch=batch, step_ms={"median": step_ms},
            least_bytes=1.0, preemptions=0, bound_ms=1.0, predicted_ms=1.5, tokens_per_s=1.0,
        )  # fmt: skip


def is_killed(report, options):
    measures(2.0, report, options)
    os.kill(os.getpid(), signal.SIGKILL)


def nothing(report, options):
    report.note(seed=options.seed)


def takes_long(report, options):
    report.add(context=1, prefill_s=1.0, process=os.getpid())
    time.sleep(600)


def plan(options: argparse.Namespace) -> list[stages.Stage]:
    """The real stages doing something else."""
    from functools import partial

    instead = {
        check.PARITY: fails,
        "whole-graphs": hangs,
        "dense": partial(measures, 4.0),
        "rocket-1024": is_killed,
        "sparda-offload": takes_long if options.seed else nothing,
    }
    return [
        dataclasses.replace(
            stage, run=instead.get(stage.name, nothing), min_s=0.5, env={},
            limit_s=4 if stage.name == "whole-graphs" else 600,
        )
        for stage in first.plan(options)
    ]  # fmt: skip


def main(arguments: list[str]) -> int:
    """The real program but for what the stages do."""
    return runner.main(
        MODULE, first.NAME, first.parser_of(), plan, first.summary, arguments, complete=True
    )


def test_whatever_a_stage_comes_to_the_others_run_and_are_judged(tmp_path, capsys):
    assert main(["--out", str(tmp_path), "--jobs", "2", "--budget-s", "3600"]) == 1
    result = json.loads((tmp_path / "gpu-first.json").read_text())
    found = {name: stage["status"] for name, stage in result["stages"].items()}
    assert found == {
        **dict.fromkeys(found, "ok"),
        check.PARITY: "failed",
        "whole-graphs": "timed out",
        "rocket-1024": "crashed",
    }
    assert len(found) == len(plan(first.parser_of().parse_args([])))
    reached = {target["what"]: target["reached"] for target in result["targets"]}
    assert reached["32K, batch 1, t = 1024: x dense"] == "yes"  # of rows before it was killed
    assert reached["16K, batch 1, t = 1024: x dense"] == "not measured"
    assert not result["passed"]
    printed = capsys.readouterr().out
    assert f"{check.PARITY}: differ from the reference" in printed
    assert "whole-graphs: stopped after 4 s" in printed


def test_what_a_killed_run_had_is_in_its_file(tmp_path):
    """Killed without warning, as by somebody's time limit."""
    command = [sys.executable, "-m", MODULE, "--out", str(tmp_path), "--seed", "1"]
    command += ["--only", "smoke", "dense", "sparda-offload"]
    file = tmp_path / "gpu-first.json"
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            found = json.loads(file.read_text())["stages"] if file.exists() else {}
            if found.get("sparda-offload", {}).get("rows"):
                break
            time.sleep(0.05)
        process.kill()
        process.wait(timeout=120)
    assert found["dense"]["status"] == "ok"
    assert len(found["dense"]["rows"]) == 2
    assert found["sparda-offload"]["status"] == "running"
    assert has_ended(found["sparda-offload"]["rows"][0]["process"])  # or it would keep the GPU


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
