# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The report renders every committed result."""

from __future__ import annotations

import re

import pytest

from benchmarks import report, results, tables

FILES = sorted(results.FOLDER.glob("*.json"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_committed_result_is_rendered(path):
    text = report.render(path)
    assert text.startswith(f"### {path.stem}\n")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) > 2
    for line in rows:
        assert line.endswith("|")
    # What all rows lack has no column, but for what a kind of file has not always said.
    for found in re.findall(r"(?:^\|.*\n)+", text, re.M):
        head, _, *cells = (
            [cell.strip() for cell in line.split("|")] for line in found.splitlines()
        )
        blank = [name for name, *column in zip(head, *cells, strict=True) if not any(column)]
        assert set(blank) <= {"", "blocks per decoding request", "left out, needs GiB"}, blank
    assert re.search(r"^Command: `python -m benchmarks\.\w", text, re.M), "which command made it?"
    assert re.search(r"^Machine: .+; versions: .*torch .+; date: 20\d\d-", text, re.M)


def test_every_kind_of_result_has_a_renderer():
    """What is written by default into the folder must not end the report."""
    kinds = set()
    for path in (results.FOLDER.parent).rglob("*.py"):
        text = path.read_text()
        kinds |= set(re.findall(r"\bRecorder\(\s*[\w.]+,\s*\"([\w-]+)\"", text))
        kinds |= set(re.findall(r"^(?:MODULE, )NAME = .*\"([\w-]+)\"$", text, re.M))
    assert {"soak", "fuzz", "gpu-first", "gpu-check", "speed", "quality"} <= kinds
    assert kinds <= set(report.RENDERERS)


@pytest.mark.parametrize("kind", ["soak", "fuzz"])
def test_faults_are_rendered(tmp_path, kind):
    path = tmp_path / f"{kind}-sparda.json"
    body = {"backend": "SPARDA", "minutes": 10.0, "seed": 3, "environment": results.environment()}
    results.write_json(path, {"benchmark": kind, **body})  # ended early
    assert "**SPARDA**, 10 minutes, seed 3: no fault" in report.render(path)
    counts = {"requests": 1200}
    results.write_json(path, {"benchmark": kind, **body, "counts": counts, "faults": ["a", "b"]})
    text = report.render(path)
    assert "seed 3: 2 faults, first: a" in text
    assert "| requests | 1,200 |" in text


def test_the_report_prints_all_of_them(capsys):
    report.main([])
    printed = capsys.readouterr().out
    assert printed.count("### ") == len(FILES) > 20


def test_what_a_result_lacks_stays_blank(tmp_path):
    path = tmp_path / "early.json"
    cell = {"model": "m", "context": 8192, "batch": 8, "shared": False}
    arms = {"dense": {"settings": None, "step_ms_at_128_tokens": {"median": 2.0}}, "rocket-512": {}}
    body = {
        "cells": [{"cell": cell, "bound": None, "cores_used_by_others": None, "arms": arms}],
        "environment": results.environment() | {"commit": None},
    }
    results.write_json(path, {"benchmark": "speed", "interrupted": "KeyboardInterrupt", **body})
    text = report.render(path)
    assert "**Ended early: KeyboardInterrupt**" in text
    assert re.search(r"\| dense \| \| 2\.0 \| \|", text)
    assert text.endswith(f"; date: {body['environment']['date']}")


def test_headers_may_repeat():
    text = tables.table([3], {"n": lambda row: row, "n ": lambda row: None, " ": lambda row: "x"})
    assert text == "| n | n | |\n|---|---|---|\n| 3 | | x |"


def test_tables_are_aligned():
    rows = [{"name": "a", "n": 1}, {"name": "long", "n": 12345.6}, {"name": "c", "n": None}]
    columns = {"name": "name", "n": "n"}
    lines = tables.table(rows, columns, aligned=True).splitlines()
    assert lines[0] == "name      n"
    assert [line.split() for line in lines[2:]] == [["a", "1"], ["long", "12346"], ["c", "-"]]
    assert tables.table([], {"x": "x"}, aligned=True).splitlines()[0] == "x"


def test_results_of_the_gpu_programs_are_rendered(tmp_path):
    path = tmp_path / "gpu-bench.json"
    stage = {"status": "ok", "reason": "", "seconds": 12.0, "facts": {}, "rows": [{}, {}]}
    targets = [{"what": "32K: x dense", "found": 1.5, "reached": "yes"}]
    environment = {**results.environment(), "gpu": {"name": "NVIDIA H200"}}
    body = {"environment": environment, "stages": {"dense": stage}, "targets": targets}
    results.write_json(path, {"benchmark": "gpu-bench", **body})
    text = report.render(path)
    assert "| dense | ok | 12 | 2 | |" in text
    assert "| 32K: x dense | 1.500 | yes |" in text
    assert "NVIDIA H200" in text
