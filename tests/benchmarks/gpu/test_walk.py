# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Stages of the first run on a GPU, by their own code, with vLLM's CUDA platform and graphs.

The GPU is pretended (``tests/support/pretend_gpu.py``): the first minutes on a real one are not to
end with what Python gets wrong. ``make gpu-walk`` walks more of them.
"""

from __future__ import annotations

import json

import pytest
from support.forked import PRETENDED_GPU, run_forked
from support.gpu_walk import ENGINE, pieces, starts_engine

from benchmarks.gpu import bench, check, machine

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm


ENVIRONMENT = {**machine.ENVIRONMENT, PRETENDED_GPU: "1"}


def walk(program: str, stage: str, work) -> dict:
    """Runs a stage as its program does, and returns its report."""
    arguments = ["--tiny", "--work", str(work), "--stage", stage, *ENGINE]
    job = {"program": program, "arguments": arguments}
    run_forked("support.gpu_walk", job, {**ENVIRONMENT, **pieces(stage)}, 900)
    return json.loads((work / f"{stage}.json").read_text())


def test_stages_run_in_graphs_that_are_replayed(tmp_path):
    """SPARDA is compared with stock vLLM by the stage itself, ROCKETKV in ``test_policy_gpu``.

    SPARDA in graphs of whole steps and of pieces, as vLLM captures them where it compiles.
    """
    found = {}
    for program, stage in (
        ("first", "smoke"), ("first", "stock"), ("check", "sparda-compiled"),
        ("first", "rocket-1024"),
    ):  # fmt: skip
        found[stage] = walk(program, stage, tmp_path)
        assert found[stage]["status"] == "ok", stage
    facts = {name: report["facts"] for name, report in found.items()}
    assert facts["smoke"]["capability"] == "9.0"
    assert facts["stock"]["flash_attention"] == 3
    for name in ("stock", "sparda-compiled", "rocket-1024"):
        pieces_too = name == "sparda-compiled"
        assert facts[name]["graphs"] == "FULL_" + ("AND_PIECEWISE" if pieces_too else "DECODE_ONLY")
        assert facts[name]["model_runner"] == "V2"
    assert facts["sparda-compiled"]["counted"]["frame_misses"] > 0
    assert facts["rocket-1024"]["selected_pages"] > 0  # of the look at what is selected
    assert [row["batch"] for row in found["rocket-1024"]["rows"] if "step_ms" in row] == [1, 2, 3]


def test_the_arguments_of_every_engine_are_accepted(tmp_path):
    """Of real size, as vLLM's CUDA platform and the plugin check them."""
    job = {"work": str(tmp_path), "result": str(tmp_path / "found.json")}
    run_forked("support.gpu_walk", job, ENVIRONMENT, 900)
    found = json.loads((tmp_path / "found.json").read_text())
    plans = [program.plan(program.parser_of().parse_args([])) for program in (check, bench)]
    assert set(found) == {stage.name for plan in plans for stage in plan if starts_engine(stage)}
    backends = {backend for backend, *_ in found.values()}
    assert backends == {"FLASH_ATTN", "ROCKETKV", "QUEST", "SNAPKV", "STREAMINGLLM", "SPARDA"}
    assert found["rocket-1024"] == ["ROCKETKV", "FULL_DECODE_ONLY", 256, 132608, False]
    as_vllm_does = {name for name, (*_, warms_up) in found.items() if warms_up}
    assert as_vllm_does == {name for name in found if name.endswith("-compiled")}
    assert found["whole-eager"][1] == "NONE"
    assert found["whole-compiled"][1] == "FULL_AND_PIECEWISE"
