# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The accuracy benchmark with made-up engines: cells are kept, and not measured again."""

from __future__ import annotations

import json

import numpy as np
import pytest
from support.workers import IdleWorker

from benchmarks import accuracy, corpus, harness, needles, report
from benchmarks.needles import Conversation, Question
from benchmarks.worker import WorkerError

CALLS: list[tuple] = []
TASKS = ["--contexts", "2048", "4096", "--questions", "4", "--passages", "2"]


class FakeWorker(IdleWorker):
    """Answers three of four questions, and ends the run where it is told to."""

    stop_at: tuple[str, str] | None = None
    error: type[BaseException] = KeyboardInterrupt

    def __init__(self, arm, arguments, **further):
        super().__init__(arm, arguments, **further)
        CALLS.append((arm.name, "start", arguments["max_model_len"]))

    def call(self, command, **arguments):
        if self.stop_at == (self.arm.name, command):
            raise self.error
        if command != "forget":
            CALLS.append((self.arm.name, command))
        if command == "complete":
            numbers = [prompt[0] for prompt in arguments["prompts"]]
            text = [str(number) if number != 3 else "no idea" for number in numbers]
            return [{"text": one, "cached_tokens": 7} for one in text]
        if command == "force":
            for path, tokens in zip(arguments["record_to"], arguments["forced"], strict=True):
                chance = 0.5 if self.arm.settings is None else 0.4
                rows = np.log(np.tile([chance, 1 - chance], (len(tokens), 1)))
                np.save(path, rows.astype(np.float32))
        return {"vllm:num_preemptions": 2}


@pytest.fixture(autouse=True)
def _made_up(monkeypatch):
    def questions(tokenizer, limit, count, seed):
        return [Question(n // 2, [n], str(n), {"depth": n}) for n in range(count)]

    def conversations(*_):
        return [Conversation("text", ("a?", "b?"), ("A", "B"), ("5", "5"))]

    CALLS.clear()
    monkeypatch.setattr(FakeWorker, "stop_at", None)
    monkeypatch.setattr(FakeWorker, "error", KeyboardInterrupt)
    monkeypatch.setattr(accuracy, "Worker", FakeWorker)
    monkeypatch.setattr(harness, "resolve_model", lambda name: name)
    monkeypatch.setattr(harness, "kv_bytes_per_token", lambda model: 1)
    monkeypatch.setattr(harness, "tokenizer_of", lambda name: None)
    monkeypatch.setattr(needles, "SETS", {"single": questions, "multikey": questions})
    monkeypatch.setattr(needles, "two_turn", conversations)
    monkeypatch.setattr(needles, "chat_prompt", lambda *_: [5])
    monkeypatch.setattr(corpus, "documents", lambda *_: [[5]] * 3)
    monkeypatch.setattr(
        corpus, "prose_tokens", lambda _, count, length: [[n % 2 for n in range(length)]] * count
    )
    monkeypatch.setattr(accuracy, "PROSE_CONTEXT", 4)
    monkeypatch.setattr(accuracy, "PROSE_TOKENS", 3)


def run(path, *arguments: str) -> dict:
    """Runs the benchmark and returns the file."""
    accuracy.main(["--out", str(path), "--arms", "dense,rocket-256,quest-256", *TASKS, *arguments])
    return json.loads(path.read_text())


def test_all_tasks_of_all_arms(tmp_path):
    found = run(tmp_path / "a.json")
    assert list(found["arms"]) == ["dense", "rocket-256", "quest-256"]
    assert found["arms"]["quest-256"]["backend"] == "QUEST"
    for arm in found["arms"].values():
        for task in ("single", "multikey"):
            assert {cell["correct"] for cell in arm[task].values()} == {3}
            assert set(arm[task]) == {"2048", "4096"}
        wrong = {"depth": 3, "expected": "3", "got": "no idea"}
        assert arm["single"]["2048"]["wrong"] == [wrong]
        assert set(arm["two-turn"]) == {"warm", "cold", "pressure"}
        assert arm["two-turn"]["warm"]["second_turn"] == 1
        assert arm["two-turn"]["pressure"]["preemptions"] == 2
    assert found["arms"]["dense"]["prose"]["kl"] == 0
    kl = 0.5 * (np.log(0.5 / 0.4) + np.log(0.5 / 0.6))
    assert found["arms"]["rocket-256"]["prose"]["kl"] == pytest.approx(kl, rel=1e-4)
    assert len(found["arms"]["rocket-256"]["prose"]["passages"]) == 2


def test_prose_of_other_lengths_is_another_result(tmp_path, capsys):
    path, more = tmp_path / "a.json", ("--tasks", "prose", "--resume", "--prose-tokens", "9")
    found = run(path, *more, "--prose-context", "6000")
    assert found["prose"] == "6000+9"
    cell = found["arms"]["rocket-256"]["prose"]
    assert (cell["context"], cell["passages"][0]["tokens"]) == (6000, 9)
    assert cell["kl_by_quarter"] == pytest.approx([cell["kl"]] * 4)
    assert "KL by quarter" in report.render(path)
    assert CALLS[0] == ("dense", "start", 6000 + 9 + 64)
    with pytest.raises(SystemExit):
        run(path, *more)
    assert "prose" in capsys.readouterr().err


def test_a_run_that_is_interrupted_is_continued_where_it_ended(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    tasks = ("--tasks", "single", "prose", "--resume")
    monkeypatch.setattr(FakeWorker, "stop_at", ("rocket-256", "force"))
    with pytest.raises(KeyboardInterrupt):
        run(path, *tasks)
    left = json.loads(path.read_text())
    assert left["interrupted"] == "KeyboardInterrupt"
    assert set(left["arms"]["dense"]) >= {"single", "prose"}
    assert set(left["arms"]["rocket-256"]["single"]) == {"2048", "4096"}
    assert "prose" not in left["arms"]["rocket-256"]
    monkeypatch.setattr(FakeWorker, "stop_at", None)
    CALLS.clear()
    found = run(path, *tasks)
    # The baseline reads the prose again, which nobody has kept; the questions are not asked again.
    assert [call[:2] for call in CALLS] == [
        *(("dense", "start"), ("dense", "force"), ("dense", "counters")),
        *(("rocket-256", "start"), ("rocket-256", "force"), ("rocket-256", "counters")),
        ("quest-256", "start"),
        *[("quest-256", "complete")] * 4,
        *(("quest-256", "force"), ("quest-256", "counters")),
    ]
    assert found["arms"]["dense"]["prose"] == left["arms"]["dense"]["prose"]
    assert len(found["resumed"]) == 1
    CALLS.clear()
    assert run(path, *tasks)["arms"] == found["arms"]
    assert CALLS == []


def test_an_arm_that_fails_does_not_cost_the_others(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(FakeWorker, "stop_at", ("rocket-256", "complete"))
    monkeypatch.setattr(FakeWorker, "error", WorkerError)
    path = tmp_path / "a.json"
    with pytest.raises(SystemExit, match="failed: rocket-256"):
        run(path, "--tasks", "single", "--resume")
    found = json.loads(path.read_text())["arms"]
    assert "single" in found["quest-256"]
    assert "single" not in found["rocket-256"]
    with pytest.raises(SystemExit):  # other questions are another result
        run(path, "--tasks", "single", "--resume", "--questions", "5")
    assert "questions" in capsys.readouterr().err


def test_the_preset_measures_the_policies(monkeypatch):
    seen = []
    monkeypatch.setattr(accuracy, "run", lambda *given: seen.append(given) or [])
    accuracy.main(["--preset", "policies", "--passages", "1"])
    ((options, chosen),) = seen
    assert len(chosen) == 13
    assert (options.contexts, options.questions, options.passages) == ([4096], 20, 1)
    assert options.tasks == ["single", "multikey", "prose"]
    assert options.resume
    assert options.out.name == "accuracy-policies.json"
    assert chosen[1].settings["min_context"] == accuracy.MIN_CONTEXT
