# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What follows from turns with drafts and without, and the prompts that ask for copies."""

from __future__ import annotations

import json

from support.workers import IdleWorker

from benchmarks import drafts, harness, report, worker


def turn(ms, per_step=1.0, drafted=0, accepted=0, text="a copy"):
    counted = {"drafted": drafted, "accepted": accepted, "tokens_per_step": per_step}
    return {"ms": ms, "cpu_ms": 2 * ms, "text": text, **counted}


def test_rounds_are_compared_one_by_one():
    """The machine was twice as slow in the second round, which is no gain of anybody."""
    turns = {
        "dense": [turn(100), turn(200), turn(100)],
        "rocket-512": [turn(50, text="fine"), turn(100), turn(50)],
        "rocket-512 + ngram": [turn(25, 2.5, 40, 30), turn(50, 2.5, 40, 30), turn(20, 2.5, 40, 30)],
    }
    rows = drafts.evaluate(turns)
    assert rows["dense"]["speedup_ms"] == 1
    assert rows["rocket-512"]["speedup_ms"] == 2
    drafting = rows["rocket-512 + ngram"]
    assert (drafting["speedup_ms"], drafting["speedup_cpu_ms"], drafting["ms"]) == (4, 4, 25)
    assert not drafting["text_as_without_drafts"]
    shown = drafts.render(
        {"model": "qwen", "new_tokens": 9, "rounds": 3,
         "tasks": {"edit": {"prompt_tokens": 7, "arms": rows}}}
    )  # fmt: skip
    assert "| rocket-512 + ngram | 2.50 | 30 of 40 | 25.0 | 50.0 | 4.00x | 4.00x |" in shown
    assert "| dense | 1.00 | | 100.0 | 200.0 | 1.00x | 1.00x |" in shown


def test_prompts_end_with_the_file_that_they_ask_about():
    class Words:
        def encode(self, text):
            return text.split(" ")

        def decode(self, tokens):
            return " ".join(tokens)

        def apply_chat_template(self, chat, **_):
            return self.encode(chat[0]["content"])

    made = drafts.prompts(Words(), 4000)
    assert list(made) == ["edit", "extract"]
    for prompt in made.values():
        assert 3900 <= len(prompt) < 4000
        assert "def dedent(text):" in " ".join(prompt)


class FakeWorker(IdleWorker):
    """Drafts halve the steps; the text is the arm's."""

    def __init__(self, arm, arguments, **further):
        super().__init__(arm, arguments, **further)
        self.drafts = "speculative_config" in arguments

    def call(self, command, **given):
        assert command == "generate_once"
        CALLS.append((self.arm.name, self.drafts))
        steps = given["max_tokens"] // (2 if self.drafts else 1)
        drafted = {"drafted": 2 * steps * self.drafts, "accepted": steps * self.drafts}
        return {"steps": steps, "tokens": given["max_tokens"], "seconds": 1e-2 * steps,
                "cpu": 1e-2 * steps, "text": self.arm.name, **drafted}  # fmt: skip


CALLS: list[tuple] = []


def test_every_arm_runs_with_drafts_and_without_in_turns(monkeypatch, tmp_path):
    monkeypatch.setattr(worker, "Worker", FakeWorker)
    monkeypatch.setattr(drafts, "prompts", lambda *_: {"edit": [1] * 50})
    for name in ("resolve_model", "tokenizer_of", "kv_bytes_per_token"):
        monkeypatch.setattr(harness, name, lambda _: 1)
    monkeypatch.setattr(harness, "exit_cleanly", lambda: None)
    out = tmp_path / "drafts.json"
    drafts.main(["--out", str(out), "--tasks", "edit", "--rounds", "2", "--generate", "20"])
    arms = json.loads(out.read_text())["tasks"]["edit"]["arms"]
    assert list(arms) == ["dense", "dense + ngram", "rocket-512", "rocket-512 + ngram"]
    forth = [("dense", False), ("dense", True), ("rocket-512", False), ("rocket-512", True)]
    assert [*forth, *reversed(forth)] == CALLS
    assert [row["tokens_per_step"] for row in arms.values()] == [1, 2, 1, 2]
    assert arms["rocket-512 + ngram"]["speedup_ms"] == 2
    assert arms["rocket-512 + ngram"]["text_as_without_drafts"] is True
    assert "| rocket-512 + ngram | 2.00 | 10 of 20 |" in report.render(out)
