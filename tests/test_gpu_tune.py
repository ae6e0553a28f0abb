# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The search for launches, without a GPU: a timer that knows the best ones, files, start-up."""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import stages, tune

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources
from vllm_sparse.kernels.triton import launch
from vllm_sparse.kernels.triton.launch import Launch

from benchmarks.gpu import kernels, models, parity, parity_sparda, timing, tuning
from vllm_sparse.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
SHIPPED = dict(launch._SM80)  # the table itself is what a search changes
EVERY = (*tuning.ROCKETKV, *tuning.SPARDA)


@pytest.fixture(autouse=True)
def _fresh_table(monkeypatch):
    """A process reads its table once; each test has its own."""
    monkeypatch.delenv(launch.LAUNCHES_ENV, raising=False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    launch.launches.cache_clear()
    yield
    launch.launches.cache_clear()


def options_of(tmp_path: Path, *arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    stages.add_options(parser, "tried")
    parser.set_defaults(install=True, work=tmp_path)
    every = ["--device", "cpu", "--tiny", "--out", str(tmp_path), *arguments]
    return parser.parse_args(every)


# A GPU on which twice the tile and half the warps are best, except that one entry cannot have it.

TOO_LARGE = "score_pages"


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
    monkeypatch.setattr(tune, "MODULE", "tests.test_gpu_tune")  # whose timer is the one above
    out = tmp_path / "out"
    status = tune.main(["--device", "cpu", "--tiny", "--skip", "smoke", "--out", str(out)])
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
        assert row["tried"] <= tuning.MOST_CANDIDATES
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


# The search.


def found_with(best: Launch, default: Launch, **options) -> tuning.Found:
    """Searches where every factor of two, or stage, away from the best costs as much again."""

    def measure(candidate: Launch) -> tuple[float, ...]:
        away = sum(abs(math.log2(at / to)) for at, to in zip(candidate, best, strict=True))
        return 1.0 + away, 3.0 + 3.0 * away

    return tuning.search(default, measure, **options)


@pytest.mark.parametrize(
    "best", [Launch(128, 4, 3), Launch(32, 8, 2), Launch(64, 2, 1), Launch(64, 4, 2)]
)
def test_the_search_finds_the_best(best):
    found = found_with(best, Launch(64, 4, 2))
    assert found.best == best
    assert len(found.times) <= 1 + tuning.MOST_CANDIDATES
    assert not found.cut


def test_the_search_comes_back_to_what_did_not_help_before():
    """A larger tile is only faster with more warps, which are tried after it."""

    def measure(candidate):
        return (
            4 * abs(candidate.num_warps - 8) + abs(candidate.block / candidate.num_warps - 16) + 1,
        )

    assert tuning.search(Launch(64, 4, 1), measure).best == Launch(128, 8, 1)


def test_the_search_stops_at_its_bound():
    found = found_with(Launch(8192, 16, 5), Launch(16, 1, 2))
    assert len(found.times) == 1 + tuning.MOST_CANDIDATES
    assert found.best == Launch(4096, 1, 2)
    assert not found.cut


def test_the_search_stays_within_what_makes_sense():
    found = found_with(Launch(1, 64, 9), Launch(16, 16, 7))
    assert found.best == Launch(16, 16, 7)
    assert all(tuning._is_sane(candidate) for candidate in found.times)
    assert len(found.times) > 2
    assert {stages for _, _, stages in found_with(Launch(64, 4, 3), Launch(64, 4, 1)).times} == {1}


def test_the_search_only_tries_what_is_valid():
    tried = found_with(
        Launch(32, 16, 1), Launch(256, 4, 1), valid=lambda at: at.block >= 32 * at.num_warps
    ).times
    assert {Launch(128, 4, 1), Launch(256, 8, 1)} & set(tried)
    assert all(at.block >= 32 * at.num_warps for at in tried)


def test_loops_that_gather_take_two_stages_per_buffer():
    assert found_with(Launch(64, 4, 7), Launch(64, 4, 5)).best == Launch(64, 4, 7)
    assert {at.num_stages for at in found_with(Launch(64, 4, 3), Launch(64, 4, 5)).times} == {
        *(1, 3, 5, 7),
    }


def test_the_search_does_not_follow_noise():
    def measure(gain):
        return lambda candidate: (1.0,) if candidate == default else (1.0 - gain,)

    default = Launch(64, 4, 1)
    assert tuning.search(default, measure(0.02)).best == default
    assert tuning.search(default, measure(0.04)).best == Launch(128, 4, 1)


def test_one_shape_is_not_paid_for_by_another():
    """The large one has all the time, and gets less than the small one loses."""

    def measure(candidate):
        return (1.0, 100.0) if candidate == default else (2.0, 60.0)

    default = Launch(64, 4, 1)
    assert tuning.search(default, measure).best == default


def test_the_search_survives_what_cannot_be_used():
    best, default = Launch(64, 8, 2), Launch(64, 4, 2)

    def measure(candidate):
        if candidate.block != 64 or candidate == default:
            return None
        return (1.0 + abs(candidate.num_warps - best.num_warps),)

    found = tuning.search(default, measure)
    assert found.best == best
    assert found.times[default] is None
    # Fast, but too large in float32.
    found = tuning.search(default, measure, fits=lambda candidate: candidate.num_warps < 8)
    assert found.best != best
    assert found.times[best] is None
    none = tuning.search(default, lambda candidate: None)
    assert none.best == default


def test_the_search_ends_with_its_time():
    left = iter([True, True, False])
    found = found_with(Launch(8192, 4, 2), Launch(64, 4, 2), has_time=lambda: next(left))
    assert found.cut
    assert found.best == Launch(256, 4, 2)


def test_kernels_without_time_are_named(tmp_path, monkeypatch):
    def slow(runs, device):
        report._deadline = 0.0
        return 1.0

    report = stages.Report(tmp_path / "tune.json", time.time() + 100)
    monkeypatch.setattr(timing, "seconds_each", slow)
    tuning.rocketkv(report, options_of(tmp_path))
    assert {row["kernel"] for row in report.rows} == {"attend"}
    assert all(row["cut"] and row["tried"] == 0 for row in report.rows)
    assert report.facts["no_time_for"] == list(tuning.ROCKETKV[1:])
    results = {"tune": {"rows": report.rows, "facts": report.facts}}
    text, further = tune.summary(results, tmp_path / "launches.json")
    assert "no time for: score_pages" in text
    assert "not searched to the end: attend;" in text
    assert further["installed"] is None


@pytest.mark.filterwarnings("error:invalid value")  # what no step has stored is NaN
def test_a_search_leaves_the_table_as_it_was(tmp_path, monkeypatch):
    report = stages.Report(tmp_path / "tune.json")
    monkeypatch.setattr(timing, "seconds_each", known_seconds)
    monkeypatch.setattr(tuning, "ROCKETKV", tuning.ROCKETKV[:1])
    tuning.rocketkv(report, options_of(tmp_path))
    assert report.rows[0]["launch"] == list(best_of("attend"))
    assert dict(launch._SM80) == SHIPPED
    # What a start-up would refuse is not even tried.
    monkeypatch.setattr(launch, "valid", lambda kernel, candidate: kernel != "attend")
    tuning.rocketkv(report, options_of(tmp_path))
    assert report.rows[-1]["tried"] == 0


def test_decode_steps_are_timed_with_their_newest_token():
    """What no step has stored is NaN, and so would be what attends to it."""
    (cell,) = kernels.TINY_CELLS
    found = tuning._decode(models.TINY, cell, torch.Generator().manual_seed(0))
    run = next(runs[0] for name, runs in found if name == "attend slots")
    run()
    assert bool(run.args[1]["output"].isfinite().all())


def test_a_kernel_that_nothing_can_launch_is_left_as_shipped(tmp_path, monkeypatch):
    def fails(runs, device):
        raise OutOfResources(300_000, 232_448, "shared memory")

    report = stages.Report(tmp_path / "tune.json")
    monkeypatch.setattr(timing, "seconds_each", fails)
    monkeypatch.setattr(tuning, "ROCKETKV", tuning.ROCKETKV[:1])
    tuning.rocketkv(report, options_of(tmp_path))
    assert dict(launch._SM80) == SHIPPED
    assert [row["launch"] for row in report.rows] == [None, None]
    results = {"tune": {"rows": report.rows, "facts": report.facts}}
    assert re.search(r"(/\d+){2} +- +- +- +- +6 +7\n", tune.summary(results, tmp_path)[0])
    checked = run_stage("parity", tmp_path, monkeypatch)
    assert checked["status"] == "failed"
    assert checked["reason"].startswith("no kernel was timed")


# What becomes of the table.


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
    """Time runs out after the search; a table that fails is told apart by `stages`, see there."""
    monkeypatch.setattr(tune, "PARITY_S", 3e9)
    report = json.loads(tuned(tmp_path).with_name("tune.json").read_text())
    report["seconds"] = 1.0
    monkeypatch.setattr(stages, "merged", lambda options, environment: {"tune": report})
    only = ["--only", "tune", "parity", "install"]
    assert tune.main(["--device", "cpu", "--out", str(tmp_path), *only]) == stages.INCOMPLETE
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


# The program.


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
    assert tune.main(["--dry-run", "--no-install", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "parity" in printed
    assert "for every later start" not in printed
    assert not out.exists()


def test_the_planning_process_does_not_import_torch():
    code = (
        "import sys; from benchmarks.gpu import tune; "
        "print([m for m in ('torch', 'vllm', 'vllm_sparse', 'triton') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_make_target_runs_the_program():
    text = (ROOT / "Makefile").read_text()
    assert re.search(r"^gpu-tune:.*##", text, re.M)
    assert re.search(r"^\.PHONY:.* gpu-tune ", text, re.M)
    assert f"-m {tune.MODULE} $(ARGS)" in text


# Start-up.


def test_every_entry_of_the_table_is_tuned():
    assert sorted(EVERY) == sorted(launch._SM80)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a table of kernel launches"),
        ("[]", "not a table of kernel launches"),
        ("{}", "not a table of kernel launches .'launches'"),
        ('{"launches": {"attend": [[64, 4]]}}', "not a table of kernel launches"),
        ('{"launches": {"attend": [["x", 4, 2], [64, 4, 2]]}}', "not a table of kernel launches"),
        ('{"launches": {"attention": [[64, 4, 2], [64, 4, 2]]}}', "of kernels: attention"),
        ('{"launches": {"pool": [[48, 4, 2], [64, 4, 2]]}}', "of kernels: pool"),
        ('{"launches": {"pool": [[64, 4, 2], [64, 3, 2]]}}', "of kernels: pool"),
        ('{"launches": {"pool": [[64, 4, 2], [64, 4, 0]]}}', "of kernels: pool"),
        ('{"launches": {"pool": [[0, 4, 2], [64, 4, 2]]}}', "of kernels: pool"),
        ('{"launches": {"pool": [[64, 4, 2]]}}', "of kernels: pool"),
    ],
)
def test_a_broken_table_is_refused_at_start_up(tmp_path, monkeypatch, text, message):
    path = tmp_path / "broken.json"
    path.write_text(text)
    monkeypatch.setenv(launch.LAUNCHES_ENV, str(path))
    with pytest.raises(ConfigError, match=message) as error:
        launch.launches(CPU)
    assert str(path) in str(error.value)
    assert "make gpu-tune" in str(error.value)


def test_a_table_is_read_back_as_it_was_written(tmp_path):
    table = {"pool": (Launch(64, 2, 1), Launch(16, 1, 5))}
    path = tmp_path / "new" / "table.json"
    launch.write_launches(path, table, {"gpu": "some"})
    assert launch.read_launches(path) == table
    assert [found.name for found in path.parent.iterdir()] == ["table.json"]


def test_where_a_table_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_SPARSE_CACHE", str(tmp_path))
    found = launch.tuned_path("NVIDIA H200")
    assert found.parent == tmp_path / "launches"
    assert re.fullmatch(r"NVIDIA-H200-triton-[\d.]+.*\.json", found.name)
    assert launch.tuned_path("") is None  # the interpreter
    monkeypatch.setenv(launch.LAUNCHES_ENV, "own.json")
    assert launch.tuned_path("NVIDIA H200") == launch.tuned_path("") == Path("own.json")
    monkeypatch.setenv(launch.LAUNCHES_ENV, "")
    assert launch.tuned_path("NVIDIA H200") is launch.tuned_path("") is None


@pytest.mark.parametrize(
    ("capability", "origin"), [((8, 0), "sm_80"), ((8, 9), "sm_80"), ((9, 0), "sm_90")]
)
def test_the_start_up_line_says_where_launches_are_from(tmp_path, monkeypatch, capability, origin):
    gpu = torch.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setenv("VLLM_SPARSE_CACHE", str(tmp_path))
    assert launch.launches(CPU).origin == "not tuned"
    shipped = launch.launches(gpu)
    assert shipped.origin == f"shipped for {origin}"
    path = launch.tuned_path("NVIDIA H200")
    launch.write_launches(path, {"pool": (Launch(64, 2, 1), Launch(16, 1, 5))}, {})
    assert launch.launches(gpu) is shipped  # read once
    launch.launches.cache_clear()
    found = launch.launches(gpu)
    assert found.origin == f"tuned, {path}"
    assert found.launches == {**shipped.launches, "pool": (Launch(64, 2, 1), Launch(16, 1, 5))}
    monkeypatch.setenv(launch.LAUNCHES_ENV, "")
    launch.launches.cache_clear()
    assert launch.launches(gpu).origin == f"shipped for {origin}"


if __name__ == "__main__":
    timing.seconds_each = known_seconds
    if "parity" in sys.argv:  # of ROCKETKV is enough here
        parity_sparda.TINY = ()
    sys.exit(tune.main())
