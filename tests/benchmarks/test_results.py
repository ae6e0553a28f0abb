# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Result files: written after every measurement, marked if a run ends early, continued."""

from __future__ import annotations

import json
import subprocess

import pytest

from benchmarks import results
from benchmarks.results import OtherResultError, Recorder


def read(path) -> dict:
    return json.loads(path.read_text())


def test_a_file_says_who_measured_what_and_where(tmp_path):
    path = tmp_path / "new" / "r.json"
    with Recorder(path, "speed", {"cells": []}) as record:
        record.body["cells"].append(1)
        record.save()
        assert read(path)["cells"] == [1]
    found = read(path)
    assert found["benchmark"] == "speed"
    assert {"command", "commit", "date", "cpu", "cores", "versions"} <= set(found["environment"])
    assert "interrupted" not in found
    assert [file.name for file in path.parent.iterdir()] == ["r.json"]


def test_a_file_says_which_weights_demo_models_have(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_SPARSE_CACHE", str(tmp_path))
    assert results.environment()["demo_models"] == {}
    (tmp_path / "tiny").mkdir()
    said = {"model": "tiny", "licence": "x", "packages": [], "gguf_sha256": "ab12"}
    (tmp_path / "tiny" / "provenance.json").write_text(json.dumps(said))
    assert results.environment()["demo_models"] == {"tiny": "ab12"}


def test_the_commit_says_whether_more_than_results_has_changed(tmp_path, monkeypatch):
    def git(*command):
        done = subprocess.run(
            ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@y", *command],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        return done.stdout.strip()

    monkeypatch.delenv("VLLM_SPARSE_COMMIT", raising=False)
    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)
    monkeypatch.setattr(results, "ROOT", tmp_path)
    assert results.commit() is None  # no checkout
    code, result = tmp_path / "code.py", folder / "r.json"
    for path in (code, result):
        path.write_text("1")
    git("init", "-q")
    git("add", "-A")
    git("commit", "-q", "-m", "x")
    head = git("rev-parse", "HEAD")
    result.write_text("2")
    assert results.commit() == head
    code.write_text("2")
    assert results.commit() == f"{head}-dirty"
    monkeypatch.setenv("VLLM_SPARSE_COMMIT", "abc")
    assert results.commit() == "abc"


def interrupted(path, error: BaseException, body: dict) -> None:
    """Measures one thing and ends early."""
    with Recorder(path, "accuracy", body) as record:
        record.body["arms"]["dense"] = {"single": 1}
        record.save()
        raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("bad luck"), SystemExit(143)])
def test_a_run_that_ends_early_keeps_what_it_has_and_says_so(tmp_path, error):
    path = tmp_path / "r.json"
    with pytest.raises(type(error)):
        interrupted(path, error, {"arms": {}})
    found = read(path)
    assert found["arms"] == {"dense": {"single": 1}}
    assert found["interrupted"] == f"{type(error).__name__}: {error}".rstrip(": ")


def test_a_run_that_measures_nothing_leaves_an_earlier_file_alone(tmp_path):
    path = tmp_path / "r.json"
    path.write_text("earlier")
    with pytest.raises(ValueError, match="no"), Recorder(path, "accuracy", {"arms": {}}):
        raise ValueError("no such cell")
    assert path.read_text() == "earlier"


def test_a_file_is_continued_under_its_first_environment(tmp_path, monkeypatch):
    path, body = tmp_path / "r.json", {"model": "qwen", "seed": 0}
    with pytest.raises(KeyboardInterrupt):
        interrupted(path, KeyboardInterrupt(), {**body, "arms": {}})
    first = read(path)["environment"]
    monkeypatch.setattr(results, "environment", lambda: {"command": "again"})
    with Recorder(path, "accuracy", {**body, "arms": {}}, resume=True) as two:
        assert two.body["arms"] == {"dense": {"single": 1}}
        two.body["arms"]["quest-256"] = {"single": 2}
    found = read(path)
    assert set(found["arms"]) == {"dense", "quest-256"}
    assert found["environment"] == first
    assert found["resumed"] == [{"command": "again"}]
    assert "interrupted" not in found
    # Without being told to, a run starts anew.
    with Recorder(path, "accuracy", {**body, "arms": {}}):
        pass
    assert read(path)["arms"] == {}


@pytest.mark.parametrize("change", [{"model": "smollm2"}, {"seed": 1}])
def test_a_file_about_something_else_is_not_continued(tmp_path, change):
    path, body = tmp_path / "r.json", {"model": "qwen", "seed": 0, "arms": {}}
    with Recorder(path, "accuracy", body):
        pass
    before = path.read_text()
    with pytest.raises(OtherResultError, match="name another file with --out"):
        Recorder(path, "accuracy", {**body, **change}, resume=True)
    with pytest.raises(OtherResultError, match="benchmark"):
        Recorder(path, "speed", body, resume=True)
    assert path.read_text() == before


def test_folders_of_the_machine_are_renamed(tmp_path):
    path = tmp_path / "r.json"
    results.write_json(path, {"where": f"{tmp_path}/x"}, {tmp_path: "OUT"})
    assert read(path) == {"where": "OUT/x"}
