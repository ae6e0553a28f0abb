# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Every published result can be measured again by the commands that its file names."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil

import pytest

from benchmarks import headline, published, results, run_all
from benchmarks.quality import pages


@pytest.fixture
def ran(monkeypatch, tmp_path):
    """Programs copy the published file, and those in ``failing`` fail."""
    calls = []

    class Process:
        failing: tuple[str, ...] = ()

        def __init__(self, command, cwd):
            _, _, self.program, *self.arguments = command
            calls.append((self.program, self.arguments))

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def wait(self):
            out = tmp_path / self.arguments[-1]
            out.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(results.FOLDER / out.name, out)
            return int(out.stem in self.failing)

    monkeypatch.setattr(run_all.subprocess, "Popen", Process)
    monkeypatch.setattr(run_all, "ROOT", tmp_path)
    return calls, Process


def test_all_that_tables_read_can_be_measured_again(monkeypatch):
    read = set()
    right = published.result
    monkeypatch.setattr(published, "result", lambda name: read.add(name) or right(name))
    for make in (*published.TABLES.values(), *headline.TABLES.values(), *pages.TABLES.values()):
        make()
    assert len(read) > 15
    for name in read:
        commands = run_all.commands_of(results.FOLDER / f"{name}.json")
        assert commands, name
        for program, *arguments in commands:
            assert importlib.util.find_spec(f"benchmarks.{program}"), program
            assert "--out" not in arguments


def test_a_file_is_made_by_its_commands_in_order(ran, capsys):
    calls, _ = ran
    run_all.main(["--only", "capacity", "quality-lab"])
    (capacity, wanted), *others = calls
    assert capacity == "benchmarks.capacity"
    arms = "dense,rocket-512,rocket-1024"
    assert wanted == ["--requests", "6", "--arms", arms, "--out", "build/results/capacity.json"]
    lab = json.loads((results.FOLDER / "quality-lab.json").read_text())
    assert len(others) == 1 + len(lab["resumed"]) > 3
    for (program, arguments), run in zip(
        others, [lab["environment"], *lab["resumed"]], strict=True
    ):
        assert program == "benchmarks.quality.judge"
        typed = re.sub(r" --out \S+", "", run["command"])
        assert " ".join(arguments[:-2]) == typed.partition("judge ")[2]
        assert arguments[-1] == "build/results/quality-lab.json"
    assert capsys.readouterr().out.count("### ") == 2


def test_what_fails_is_named_and_the_rest_goes_on(ran):
    calls, process = ran
    process.failing = ("capacity",)
    with pytest.raises(SystemExit, match=r"failed: capacity$"):
        run_all.main(["--only", "capacity", "drafts"])
    assert [program for program, _ in calls] == ["benchmarks.capacity", "benchmarks.drafts"]
    with pytest.raises(SystemExit):
        run_all.main(["--only", "nothing"])
