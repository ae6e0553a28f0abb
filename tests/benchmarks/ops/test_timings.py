# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Timing kernels, in the interpreter."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

import pytest

from benchmarks.gpu import bench, stages

if TYPE_CHECKING:
    import argparse


def options_of(tmp_path, *arguments: str) -> argparse.Namespace:
    return bench.parser_of().parse_args(["--out", str(tmp_path), *arguments])


@pytest.mark.parametrize("rows", [1, 3])
def test_every_step_of_a_cycle_misses_the_same_share(rows):
    import torch

    from benchmarks.ops import sparda_timings

    generator = torch.Generator().manual_seed(0)
    steps = sparda_timings.cycle(rows, 2, 30, rows * 2 * 100, generator)
    held = [set(step.flatten().tolist()) for step in steps]
    assert all(len(pieces) == rows * 60 for pieces in held)
    assert all(step.shape == (rows, 2, 30) for step in steps)
    for before, after in zip([held[-1], *held], held, strict=False):
        assert len(after - before) == rows * 6


def test_bytes_of_each_kernel():
    from benchmarks.gpu.shapes import LLAMA
    from benchmarks.ops import rocketkv
    from vllm_sparse.planner import bounds

    split = bounds.Split(held=4096, page_size=4, top_r=64, top_k=512)
    sizes = rocketkv.Sizes(LLAMA, rocketkv.Cell(1000, 1024, 1), split, max_kept=64)
    least = {op.name: op.least(sizes) for op in (*rocketkv.STEP, *rocketkv.PROMPT)}
    assert least["append"] == 2 * 8 * 128 * (4 + 4 + 2)
    assert least["select slots"] == bounds.score_bytes(LLAMA, 1, split) + 4 * 8 * 512
    assert least["score prompt"] == 2 * 128 * (8 * 1000 + 32 * 32) + 4 * 8 * 1000
    assert least["compact tokens"] == 2 * 8 * 128 * (4 * 64 + 2 * 16)


def test_sparda_kernels_are_timed_in_the_interpreter(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    from benchmarks.ops import sparda_timings, timings

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    report = stages.Report(tmp_path / "kernels-sparda.json")
    timings.measure("sparda", report, options_of(tmp_path, "--tiny", "--device", "cpu"))
    assert not any("error" in row for row in report.rows)
    assert len(report.rows) == 3 + len(sparda_timings.PROGRAMS)
    assert {row["misses"] for row in report.rows if "misses" in row} == {4}
    assert all(row["predicted_us"] > 0 for row in report.rows)


def test_rocketkv_kernels_are_timed_in_the_interpreter(tmp_path, monkeypatch):
    """What one kernel lacks, or the set-up of others, costs nothing else."""
    pytest.importorskip("triton")
    from vllm_sparse.kernels.triton import compaction, pages

    from benchmarks.ops import timings

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    report = stages.Report(tmp_path / "kernels.json")
    options = options_of(tmp_path, "--tiny", "--device", "cpu")
    timings.measure("rocketkv", report, options)
    assert not any("error" in row for row in report.rows)
    every = [row["kernel"] for row in report.rows]
    assert len(every) == 9
    assert all(row["predicted_us"] > 0 for row in report.rows)
    assert report.facts["predicted_for"]["overlapped"]

    def fails(**_):
        raise LookupError("no such\nresources")

    for module, name in ((compaction, "compact_tokens"), (pages, "select_slots")):
        fails.__signature__ = inspect.signature(getattr(module, name))
        monkeypatch.setattr(module, name, fails)
    report = stages.Report(tmp_path / "again.json")
    timings.measure("rocketkv", report, options)
    found = {row["kernel"]: row.get("error", "") for row in report.rows}
    problem = "LookupError: no such resources"
    assert found["select slots"] == found["decode"] == found["compact tokens"] == problem
    assert not any(found[name] for name in ("append", "score prompt"))
