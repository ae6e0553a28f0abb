# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Tuning without a GPU: a timer that knows the best launches, and what becomes of a table."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import runner, shapes, stages, tune

pytest.importorskip("triton")
from triton.runtime.errors import OutOfResources
from vllm_sparse.kernels.triton import launch
from vllm_sparse.kernels.triton.launch import Launch

from benchmarks.ops import launches, parity, rocketkv, search, sparda, timings

pytestmark = pytest.mark.usefixtures("fresh_launches")
ROOT = Path(__file__).resolve().parents[3]
CPU = torch.device("cpu")
SHIPPED = dict(launch._SM80)  # the table itself is what a search changes
EVERY = (*launches.ROCKETKV, *launches.SPARDA)
# On the GPU of these tests twice the tile and half the warps are best; one entry cannot have it.
TOO_LARGE = "select_slots"


def options_of(tmp_path: Path, *arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    stages.add_options(parser, "tried")
    parser.set_defaults(install=True, work=tmp_path)
    every = ["--device", "cpu", "--tiny", "--out", str(tmp_path), *arguments]
    return parser.parse_args(every)


def best_of(kernel: str) -> Launch:
    shipped = SHIPPED[kernel][0]
    if kernel == TOO_LARGE:
        return shipped._replace(num_warps=shipped.num_warps // 2)
    return shipped._replace(block=2 * shipped.block, num_warps=shipped.num_warps // 2)


def known_seconds(runs, device) -> float:
    """In place of the timer: how far the launches in force are from the best ones."""
    assert runs
    table = launch.launches(device).launches
    if table[TOO_LARGE][0].block > SHIPPED[TOO_LARGE][0].block:
        raise OutOfResources(300_000, 232_448, "shared memory")
    away = 0.0
    for kernel, (found, _) in table.items():
        pairs = zip(found, best_of(kernel), strict=True)
        away += sum(abs(math.log2(at / best)) for at, best in pairs)
    return 1.2**away


def test_the_whole_program_finds_checks_and_installs_the_best(tmp_path, monkeypatch, capsys):
    """Kernels are interpreted, times made up; without --tiny and --device it is the real thing."""
    installed = tmp_path / "cache" / "launches.json"
    monkeypatch.setenv(launch.LAUNCHES_ENV, str(installed))
    monkeypatch.setattr(
        tune, "MODULE", "tests.benchmarks.gpu.test_tune"
    )  # whose timer is the one above
    monkeypatch.setattr(tune, "PARITY_S", 1800)  # a busy machine has longer than a GPU would need
    out = tmp_path / "out"
    status = tune.main(
        ["--device", "cpu", "--tiny", "--skip", "smoke", "--out", str(out), "--budget-s", "5400"]
    )
    result = json.loads((out / "gpu-tune.json").read_text())
    assert status == 0, result
    assert {name: stage["status"] for name, stage in result["stages"].items()} == {
        "tune": "ok",
        "tune-sparda": "ok",
        "parity": "ok",
        "install": "ok",
    }
    assert result["installed"].endswith("cache/launches.json")
    assert result["no_time_for"] == []
    rows = [row for name in tune.SEARCHES for row in result["stages"][name]["rows"]]
    assert list(dict.fromkeys(row["kernel"] for row in rows)) == list(EVERY)
    for row in rows:
        assert row["launch"] == list(best_of(row["kernel"]))
        assert row["us"] < row["shipped_us"]
        assert row["tried"] <= search.MOST_CANDIDATES
        assert bool(row["unusable"]) == (row["kernel"] == TOO_LARGE)
        assert not row["cut"]
    refused = next(row["unusable"] for row in rows if row["unusable"])
    larger = SHIPPED[TOO_LARGE][0]._replace(block=2 * SHIPPED[TOO_LARGE][0].block)
    assert refused[str(list(larger))].startswith("OutOfResources: out of resource: shared memory")
    assert sum(row["kernel"] == "attend" for row in rows) == 2  # of both backends

    # Parity was of kernels that ran with it, and a start-up reads it.
    assert result["stages"]["parity"]["facts"]["launches"].startswith("tuned, ")
    assert any(row["kernel"] == "attend slots" for row in result["stages"]["parity"]["rows"])
    table = launch.read_launches(installed)
    assert table == launch.read_launches(out / "launches.json")
    assert table == {name: (best_of(name), SHIPPED[name][1]) for name in EVERY}
    assert launch.launches(CPU).launches == table
    printed = capsys.readouterr().out
    before, after = ("/".join(map(str, at)) for at in (SHIPPED["attend"][0], best_of("attend")))
    assert re.search(rf"attend +tiny, 600 x 1 +{before} +\d+ +{after} +\d+ +1\.44 ", printed)
    assert f"installed: {installed}" in printed


def test_kernels_without_time_are_named(tmp_path, monkeypatch):
    def slow(runs, device):
        report._deadline = 0.0
        return 1.0

    report = stages.Report(tmp_path / "tune.json", time.time() + 100)
    monkeypatch.setattr(timings, "seconds_each", slow)
    launches.tune("rocketkv", report, options_of(tmp_path))
    assert {row["kernel"] for row in report.rows} == {"attend"}
    assert all(row["cut"] and row["tried"] == 0 for row in report.rows)
    assert report.facts["no_time_for"] == list(launches.ROCKETKV[1:])
    results = {"tune": {"rows": report.rows, "facts": report.facts}}
    text, further = tune.summary(results, tmp_path / "launches.json")
    assert "no time for: select_slots" in text
    assert "not searched to the end: attend;" in text
    assert further["installed"] is None


@pytest.mark.filterwarnings("error:invalid value")  # what no step has stored is NaN
def test_a_search_leaves_the_table_as_it_was(tmp_path, monkeypatch):
    report = stages.Report(tmp_path / "tune.json")
    monkeypatch.setattr(timings, "seconds_each", known_seconds)
    monkeypatch.setattr(launches, "ROCKETKV", launches.ROCKETKV[:1])
    launches.tune("rocketkv", report, options_of(tmp_path))
    assert report.rows[0]["launch"] == list(best_of("attend"))
    assert dict(launch._SM80) == SHIPPED
    # What a start-up would refuse is not even tried.
    monkeypatch.setattr(launch, "valid", lambda kernel, candidate: kernel != "attend")
    launches.tune("rocketkv", report, options_of(tmp_path))
    assert report.rows[-1]["tried"] == 0


def test_decode_steps_are_timed_with_their_newest_token():
    """What no step has stored is NaN, and so would be what attends to it."""
    (cell,) = rocketkv.TINY_CELLS
    found = rocketkv.decode_timings(shapes.TINY, cell, torch.Generator().manual_seed(0))
    run = next(work.runs[0] for work in found if work.name == "attend slots")
    run()
    assert bool(run.keywords["output"].isfinite().all())


def test_a_kernel_that_nothing_can_launch_is_left_as_shipped(tmp_path, monkeypatch):
    def fails(runs, device):
        raise OutOfResources(300_000, 232_448, "shared memory")

    report = stages.Report(tmp_path / "tune.json")
    monkeypatch.setattr(timings, "seconds_each", fails)
    monkeypatch.setattr(launches, "ROCKETKV", launches.ROCKETKV[:1])
    launches.tune("rocketkv", report, options_of(tmp_path))
    assert dict(launch._SM80) == SHIPPED
    assert [row["launch"] for row in report.rows] == [None, None]
    results = {"tune": {"rows": report.rows, "facts": report.facts}}
    assert re.search(r"(/\d+){2} +- +- +- +- +6 +7\n", tune.summary(results, tmp_path)[0])
    checked = run_stage("parity", tmp_path, monkeypatch)
    assert checked["status"] == "failed"
    assert checked["reason"].startswith("no kernel was timed")


def tuned(tmp_path: Path, block: int = 128) -> Path:
    """Leaves the report of a search, and returns where its table is to go."""
    report = stages.Report(tmp_path / "tune.json")
    row = {"shape": "any", "shipped": [64, 4, 2], "shipped_us": 2.0, "us": 1.0, "cut": False}
    row |= {"tried": 1, "unusable": {}, "larger_heads": [32, 4, 2]}
    report.add(kernel="attend", launch=[block, 4, 2], **row)
    report.save("ok")
    return tmp_path / "launches.json"


def run_stage(name: str, tmp_path: Path, monkeypatch, **env: str) -> dict:
    """Runs a stage in this process, and returns its report."""
    options = options_of(tmp_path)
    (stage,) = (stage for stage in tune.plan(options) if stage.name == name)
    report, status, reason = stages.Report(tmp_path / f"{name}.json"), "ok", ""
    with monkeypatch.context() as patch:
        for key, value in {**env, **stage.env}.items():
            patch.setenv(key, value)
        try:
            stage.run(report, options)
        except stages.NotAvailableError as error:
            status, reason = "not available", str(error)
        except Exception as error:
            status, reason = "failed", str(error)
    report.save(status, reason)
    return json.loads((tmp_path / f"{name}.json").read_text())


@pytest.mark.parametrize("ending", ["passes", "fails", "raises", "is killed", "was not run"])
def test_only_a_table_that_passes_parity_is_installed(tmp_path, monkeypatch, ending):
    def check(report, options):
        assert launch.launch("attend", CPU) == Launch(128, 4, 2)
        assert launch.launch("attend", CPU, head_dim=256) == Launch(32, 4, 2)
        if ending == "fails":
            raise stages.CheckFailedError("differ")
        if ending == "raises":
            raise OutOfResources(300_000, 232_448, "shared memory")

    monkeypatch.setattr(parity, "check", check)
    source, target = tuned(tmp_path), tmp_path / "cache" / "found.json"
    if ending == "is killed":
        stages.Report(tmp_path / "parity.json")
    elif ending != "was not run":
        passed = run_stage("parity", tmp_path, monkeypatch)
        assert passed["status"] == ("ok" if ending == "passes" else "failed")
        assert launch.read_launches(source) == {"attend": (Launch(128, 4, 2), Launch(32, 4, 2))}
    result = run_stage("install", tmp_path, monkeypatch, VLLM_SPARSE_LAUNCHES=str(target))
    if ending == "passes":
        assert result["status"] == "ok"
        assert launch.read_launches(target) == launch.read_launches(source)
        facts = json.loads(target.read_text())["facts"]
        assert facts["found"][0]["shipped_us"] == 2.0
        assert "triton" in facts
        assert [path.name for path in target.parent.iterdir()] == [target.name]
    else:
        assert result["status"] == ("not available" if ending == "was not run" else "failed")
        assert re.search("parity has not (run|passed)", result["reason"])
        assert not target.exists()


def test_a_table_that_is_not_checked_is_no_success(tmp_path, monkeypatch, capsys):
    """Time runs out after the search; a table that fails is another ending."""
    monkeypatch.setattr(tune, "PARITY_S", 3e9)
    report = json.loads(tuned(tmp_path).with_name("tune.json").read_text())
    report["seconds"] = 1.0
    monkeypatch.setattr(runner, "merged", lambda *_: {"tune": report})
    only = ["--only", "tune", "parity", "install"]
    assert tune.main(["--device", "cpu", "--out", str(tmp_path), *only]) == runner.INCOMPLETE
    result = json.loads((tmp_path / "gpu-tune.json").read_text())
    assert [stage["status"] for stage in result["stages"].values()] == ["ok", "skipped", "skipped"]
    assert "NOT installed: no table was checked" in capsys.readouterr().out
    result["stages"]["parity"] |= {"status": "failed", "facts": {"found": report["rows"]}}
    source = tmp_path / "launches.json"
    assert f"NOT installed: {source}" in tune.summary(result["stages"], source)[0]


def test_a_table_that_start_up_would_refuse_does_not_pass(tmp_path, monkeypatch):
    monkeypatch.setattr(parity, "check", lambda report, options: None)
    tuned(tmp_path, block=48)
    checked = run_stage("parity", tmp_path, monkeypatch)
    assert checked["status"] == "failed"
    assert "no valid launches of kernels: attend" in checked["reason"]


def test_nothing_is_installed_where_nothing_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(parity, "check", lambda report, options: None)
    tuned(tmp_path)
    run_stage("parity", tmp_path, monkeypatch)
    result = run_stage("install", tmp_path, monkeypatch, VLLM_SPARSE_LAUNCHES="")
    assert result["status"] == "not available"


def test_the_plan_is_consistent(tmp_path, capsys):
    options = options_of(tmp_path)
    every = tune.plan(options)
    names = [stage.name for stage in every]
    assert names == ["smoke", *tune.SEARCHES, "parity", "install"]
    for index, stage in enumerate(every):
        assert {*stage.needs, *stage.beside} <= set(names[:index]), stage.name
    assert sum(stage.limit_s for stage in every) <= options.budget_s == 460
    longer = tune.plan(options_of(tmp_path, "--budget-s", "1000"))
    assert sum(stage.limit_s for stage in longer) == 1000
    # A search starts from what is shipped, not from what an earlier one has found.
    assert tune.LAUNCHES_ENV == launch.LAUNCHES_ENV
    assert [stage.env.get(tune.LAUNCHES_ENV) for stage in every[1:]] == [
        *("", "", str(tmp_path / "launches.json")),
        None,
    ]
    out = tmp_path / "out"
    assert tune.main(["--list", "--no-install", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "parity" in printed
    assert "for every later start" not in printed
    assert not out.exists()


def test_every_entry_of_the_table_is_tuned():
    assert sorted(EVERY) == sorted(launch._SM80)


if __name__ == "__main__":
    timings.seconds_each = known_seconds
    if "parity" in sys.argv:  # of ROCKETKV is enough here
        sparda.TINY_CASES = ()
    sys.exit(tune.main())


def test_what_fits_must_be_launched_as_what_is_timed(monkeypatch):
    """Float32 in heads of as many bytes: larger ones have a launch of their own."""
    seen = []
    monkeypatch.setattr(launches, "_paged", lambda *_: {"select blocks": {}})
    monkeypatch.setattr(launches, "make_pool", lambda case, *_: seen.append(case))
    monkeypatch.setattr(sparda, "selections", lambda *_: {"softmax": {}})
    next(launches._sparda(False, torch.Generator()))
    seen.append(rocketkv.in_float32(rocketkv.CASES[0]))
    for case in seen:
        assert case.dtype == torch.float32
        sizes = {"head_dim": case.dim, "dtype": case.dtype}
        assert launch.launch("score_blocks", CPU, **sizes) == SHIPPED["score_blocks"][0]
        assert case.dim * case.dtype.itemsize == launch.SMALL_HEAD
