# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What the GPU programs plan to run, and how they are called."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import bench, check, stages

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("program", [check, bench])
def test_plans_are_consistent(program, capsys, tmp_path):
    every = program.plan(program.parser_of().parse_args([]))
    names = [stage.name for stage in every]
    assert len(set(names)) == len(names)
    assert names[0] == "smoke"
    for index, stage in enumerate(every):
        assert set(stage.needs) <= set(names[:index]), stage.name
        assert set(stage.beside) <= set(names[:index]), stage.name
        assert 0 < stage.limit_s <= 200
    assert program.main(["--dry-run", "--out", str(tmp_path)]) == 0
    assert all(name in capsys.readouterr().out for name in names[:1])
    assert not any(tmp_path.iterdir())


def test_the_planning_process_imports_neither_torch_nor_vllm():
    code = (
        "import sys; from benchmarks.gpu import bench, check; "
        "print([m for m in ('torch', 'vllm', 'vllm_sparse', 'triton') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_make_targets_run_the_programs():
    text = (ROOT / "Makefile").read_text()
    for name in ("check", "bench"):
        assert re.search(rf"^gpu-{name}:.*##", text, re.M)
        assert f"-m benchmarks.gpu.{name}" in text


def part_of(part: str) -> list[stages.Stage]:
    return bench.plan(bench.parser_of().parse_args(["--part", part]))


def test_without_a_part_the_most_wanted_stages_come_first():
    names = [stage.name for stage in bench.plan(bench.parser_of().parse_args([]))]
    wanted = ["smoke", "dense", "rocket-1024", "sparda-offload", "sparda-resident"]
    assert names[:5] == wanted
    every = {stage.name for part in ("rocketkv", "sparda", "more") for stage in part_of(part)}
    assert every == set(names)


def test_target_cells_come_first_and_overheads_have_several_prefills():
    from benchmarks.gpu import decode

    stages_of = {stage.name for part in ("rocketkv", "more") for stage in part_of(part)}
    assert set(decode.CELLS) <= stages_of
    for name in ("dense", "rocket-1024"):
        first = decode.CELLS[name][:3]
        assert [(cell.context // 1024, cell.batches) for cell in first] == [
            (32, (1,)),
            (128, (1,)),
            (16, (1,)),
        ]
        assert first[0].prefills >= 3
        assert first[1].prefills >= 2


def test_what_must_be_checked_comes_first_and_one_engine_is_alone():
    every = {stage.name: stage for stage in check.plan(check.parser_of().parse_args([]))}
    names = list(every)
    wanted = {"kernels", "whole-eager", "chunked", "prefix-cache", "preemption", "sanitizer"}
    assert wanted <= set(names[: names.index("sparda-whole")])
    assert [name for name, stage in every.items() if stage.alone] == ["sparda-profiled"]
