# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What follows from turns with drafts and without, and the prompts that ask for copies."""

from __future__ import annotations

from benchmarks import drafts


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
