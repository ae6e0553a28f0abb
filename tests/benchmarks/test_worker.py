# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Arms of other checkouts: which Python runs them, in which folder, beside which."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from benchmarks import corpus, harness, results, speed
from benchmarks.arms import Arm, parse_arm
from benchmarks.worker import Worker, WorkerError

if TYPE_CHECKING:
    from pathlib import Path

# Steps take what the checkout's file says.
STAND_IN = """
import json, os, pathlib, sys

job = json.loads(sys.stdin.readline())
step = float(pathlib.Path("step").read_text())
with os.fdopen(job["reply_fd"], "w") as replies:
    def answer(message):
        print(json.dumps(message), file=replies, flush=True)

    answer({"result": "ready"})
    for line in sys.stdin:
        asked = json.loads(line)
        if asked["command"] == "where":
            answer({"result": [os.getcwd(), sys.executable]})
        elif asked["command"] == "unheard of":
            answer({"error": "no such command"})
        else:
            steps = [step] * asked["arguments"].get("steps", 2)
            answer({"result": {} if asked["command"] == "counters" else steps})
"""


def checkout(folder: Path, step_seconds: float) -> Path:
    """A checkout with an environment and a commit, whose engine is made up."""
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "python").symlink_to(sys.executable)
    (folder / "benchmarks").mkdir()
    (folder / "benchmarks" / "__init__.py").touch()
    (folder / "benchmarks" / "worker.py").write_text(STAND_IN)
    (folder / "step").write_text(str(step_seconds))
    git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "step"], ["commit", "-qm", str(step_seconds)]):
        subprocess.run([*git, *command], check=True)
    return folder


def test_a_worker_runs_in_its_arms_checkout(tmp_path):
    tree = checkout(tmp_path / "old", 0.1)
    with Worker(Arm("dense@old", tree=tree), {}) as worker:
        assert worker.call("where") == [str(tree), str(tree / ".venv/bin/python")]
        with pytest.raises(WorkerError, match="no such command"):
            worker.call("unheard of")


def test_an_arm_is_of_this_checkout_unless_it_says_so(tmp_path, monkeypatch):
    arm = parse_arm("rocket-512")
    assert (arm.folder, arm.python) == (results.ROOT, sys.executable)
    there = parse_arm("rocket-512+fp8@old", {"min_context": 64}, trees={"old": tmp_path})
    assert there.settings == {"token_budget": 512, "min_context": 64}
    assert (there.folder, there.label) == (tmp_path, "t = 512, fp8, old")
    monkeypatch.chdir(tmp_path)
    ahead = parse_arm("forecast-32@old", None, "own.safetensors", {"old": tmp_path / "old"})
    assert ahead.settings["forecast"] == str(tmp_path / "own.safetensors")


def test_before_and_after_are_one_command(tmp_path, monkeypatch):
    """A step of 40 ms in one checkout, of 10 ms in another."""
    trees = [checkout(tmp_path / name, step) for name, step in (("a", 0.04), ("b", 0.01))]
    monkeypatch.setattr(harness, "resolve_model", lambda name: name)
    monkeypatch.setattr(harness, "kv_bytes_per_token", lambda model: 1)
    monkeypatch.setattr(harness, "tokenizer_of", lambda name: None)
    monkeypatch.setattr(corpus, "documents", lambda _, count, length: [[1] * length] * count)
    command = [
        *("--cells", "custom", "--context", "512", "--batch", "2", "--rounds", "1"),
        *("--patience", "0", "--prefills", "1", "--out", str(tmp_path / "speed.json")),
        *("--arms", "rocket-512@old,rocket-512@new"),
    ]
    given = [f"{name}={tree}" for name, tree in zip(("old", "new"), trees, strict=True)]
    speed.main([*command, "--tree", *given])
    found = json.loads((tmp_path / "speed.json").read_text())
    (cell,) = found["cells"]
    assert cell["arms"]["rocket-512@new"]["speedup"] == pytest.approx(4)
    assert found["trees"] == {
        arm: results.commit(tree)
        for arm, tree in zip(("rocket-512@old", "rocket-512@new"), trees, strict=True)
    }
    assert len(set(found["trees"].values()) - {None}) == 2


@pytest.mark.parametrize(
    ("further", "said"),
    [
        ([], "arm dense@old needs --tree old=FOLDER"),
        (["--tree", "old=nowhere"], "a checkout in which `make setup` was run (no .venv/bin/"),
        (["--tree", "old"], "expected NAME=FOLDER"),
    ],
)
def test_a_checkout_that_is_missing_is_said_before_anything_starts(further, said, capsys):
    with pytest.raises(SystemExit):
        speed.main(["--arms", "dense@old,dense", *further])
    assert said in capsys.readouterr().err
