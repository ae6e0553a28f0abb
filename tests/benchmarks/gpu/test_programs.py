# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What the GPU programs plan to run, and how they are called."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest

from benchmarks.gpu import bench, check, first, stages

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("program", [check, bench, first])
def test_plans_are_consistent(program, capsys, tmp_path):
    every = program.plan(program.parser_of().parse_args([]))
    names = [stage.name for stage in every]
    assert len(set(names)) == len(names)
    assert names[0] == "smoke"
    for index, stage in enumerate(every):
        assert set(stage.needs) <= set(names[:index]), stage.name
        assert set(stage.beside) <= set(names[:index]), stage.name
        assert 0 < stage.limit_s <= 200
    assert program.main(["--list", "--out", str(tmp_path)]) == 0
    assert all(name in capsys.readouterr().out for name in names[:1])
    assert not any(tmp_path.iterdir())


def test_the_planning_process_imports_neither_torch_nor_vllm():
    code = (
        "import sys; from benchmarks.gpu import bench, check, first, tune; "
        "print([m for m in ('torch', 'vllm', 'triton') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_make_targets_run_the_programs():
    text = (ROOT / "Makefile").read_text()
    for name in ("first", "check", "bench", "tune"):
        assert re.search(rf"^gpu-{name}:.*##", text, re.M)
        assert re.search(rf"^\.PHONY:.* gpu-{name} ", text, re.M)
        assert f"-m benchmarks.gpu.{name} $(ARGS)" in text


def part_of(part: str) -> list[stages.Stage]:
    return bench.plan(bench.parser_of().parse_args(["--part", part]))


def test_without_a_part_the_most_wanted_stages_come_first():
    names = [stage.name for stage in bench.plan(bench.parser_of().parse_args([]))]
    wanted = ["smoke", "dense", "rocket-1024", "sparda-offload", "sparda-resident"]
    assert names[:5] == wanted
    every = {stage.name for part in ("rocketkv", "sparda", "more") for stage in part_of(part)}
    assert every == set(names)


def test_the_first_run_has_what_the_others_would_run_and_fits_ten_minutes():
    """Stages of one name are the same, so that the others need not run them again."""
    options = first.parser_of().parse_args([])
    others = {
        stage.name: stage
        for program in (check, bench)
        for stage in program.plan(program.parser_of().parse_args([]))
    }
    every = first.plan(options)
    for stage in every:
        theirs = others[stage.name]
        assert getattr(stage.run, "args", stage.run) == getattr(theirs.run, "args", theirs.run)
    assert options.budget_s + 13 < 600  # with a stage that has to be killed
    names = [stage.name for stage in every]
    timed = ["dense", "rocket-1024", "sparda-offload", "sparda-resident"]
    assert names[5:] == [*timed, "quest", "snapkv", "streamingllm"]
    assert [stage.name for stage in every if stage.alone] == timed
    compared = {*first.ENGINES, *first.BASELINES}
    assert {stage.name for stage in every if stage.needs} == compared
    # Even if everything takes as long as it may, checks a few at once, one step is timed of each.
    limits = {stage.name: stage.limit_s for stage in every}
    checked = max(limits[check.PARITY], limits["stock"] + limits["whole-graphs"])
    (offload,) = (stage for stage in every if stage.name == "sparda-offload")
    reached = checked + limits["dense"] + limits["rocket-1024"]
    assert options.budget_s - reached >= offload.least_s


def test_the_first_shapes_of_both_backends_are_compared_first():
    from benchmarks.ops import parity

    found = [ops.__name__.rpartition(".")[2] for ops, _ in parity.cases_of("CASES")]
    assert found[:4] == ["rocketkv", "sparda"] * 2


def test_no_stage_has_the_name_of_another_program_s():
    """Or a program would take the result of a stage that does something else for its own."""
    from benchmarks.gpu import tune

    parser = first.parser_of()
    parser.set_defaults(install=True)
    plans = [program.plan(parser.parse_args([])) for program in (check, bench, tune)]
    names = [{stage.name for stage in plan} - {"smoke"} for plan in plans]
    assert len(set().union(*names)) == sum(map(len, names))


def test_target_cells_come_first_and_overheads_have_several_prefills():
    from benchmarks.gpu import decode

    stages_of = {stage.name for part in ("rocketkv", "more") for stage in part_of(part)}
    assert set(decode.CELLS) <= stages_of
    for name in ("dense", "rocket-1024"):
        cells = decode.CELLS[name]
        assert [(cell.context // 1024, cell.batches[0]) for cell in cells] == [
            (32, 1), (128, 1), (16, 1),
        ]  # fmt: skip
        assert cells[0].batches[-1] == decode.MOST  # before minutes go into a long prompt
        assert cells[0].prefills >= 3
        assert [cell.prefills for cell in (cells[1], decode.CELLS[f"{name}-more"][1])] == [1, 2]


def test_blocks_of_128_are_compared_with_those_of_64_and_fewer():
    from benchmarks.gpu import decode
    from benchmarks.ops import rocketkv

    name = "rocket-1024-blocks-of-128"
    arm = decode.arm_of(name, bench.parser_of().parse_args([]))
    assert (arm.name, arm.settings["token_budget"]) == ("rocket-1024", 1024)
    assert decode.BLOCK_SIZES[name] == 128
    (stage,) = (stage for stage in part_of("more") if stage.name == name)
    assert stage.beside == ("dense",)
    sizes = {cell.block_size for cell in rocketkv.CELLS if cell[:3] == (32768, 1024, 27)}
    assert sizes == {16, 64, 128}


def test_a_cell_that_fails_costs_no_other_one(tmp_path):
    from benchmarks.gpu import decode

    class Subject:
        done: ClassVar[list[tuple[int, bool]]] = []
        finished = 0

        def measure(self, cell, *, look):
            self.done.append((cell.context, look))
            if cell.context == 2:
                raise RuntimeError("selected pages are runs of slots")

        def finish(self):
            self.finished += 1

    report, subject = stages.Report(tmp_path / "report.json"), Subject()
    with pytest.raises(stages.CheckFailedError, match="2: selected pages"):
        decode.measure_cells(subject, [decode.Cell(n, (1,)) for n in (2, 4, 1)], report)
    assert subject.done == [(2, True), (4, False), (1, False)]
    assert subject.finished == 1
    assert report.rows == [{"context": 2, "failed": "selected pages are runs of slots"}]


def test_what_must_be_checked_comes_first_and_one_engine_is_alone():
    every = {stage.name: stage for stage in check.plan(check.parser_of().parse_args([]))}
    names = list(every)
    wanted = {check.PARITY, "whole-eager", "chunked", "prefix-cache", "preemption", "sanitizer"}
    assert wanted <= set(names[: names.index("sparda-whole")])
    assert [name for name, stage in every.items() if stage.alone] == ["sparda-profiled"]
