# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The questions: they fit, and their answers stand in their prompts."""

from __future__ import annotations

import pytest

from benchmarks import corpus
from benchmarks.quality import questions, turns
from benchmarks.quality.questions import Question


class _Words:
    """A tokenizer whose tokens are words."""

    def __init__(self) -> None:
        self.known: list[str] = []

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        words = text.replace("\n", " \n ").split(" ")
        start = len(self.known)
        self.known += words
        return {"input_ids": list(range(start, start + len(words)))}

    def decode(self, tokens: list[int]) -> str:
        return " ".join(self.known[token] for token in tokens).replace(" \n ", "\n")


def test_score_is_the_share_found() -> None:
    question = Question("vt", 0, [], ["ABC", "DEF", "GHI", "JKL"], 30)
    assert question.score("abc, then GHI") == 0.5
    assert question.score("") == 0


@pytest.mark.parametrize("task", list(questions.OWN_TOKENS))
def test_own_tasks(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sentences = tuple(f"Sentence number {index} says nothing." for index in range(500))
    monkeypatch.setattr(corpus, "sentences", lambda: sentences)
    tokenizer, limit = _Words(), 1500
    make = getattr(questions, task)
    found = make(tokenizer, limit, 3, 0)
    assert [question.index for question in found] == [0, 1, 2]
    for question in found:
        text = tokenizer.decode(question.prompt)
        assert limit - 40 < len(question.prompt) + question.max_tokens <= limit
        for answer in question.answers:
            assert text.count(answer) == 1
        assert len(set(question.answers)) == len(question.answers) >= 4
    again = make(_Words(), limit, 3, 0)
    assert [question.answers for question in again] == [question.answers for question in found]
    assert make(_Words(), limit, 1, 1)[0].answers != found[0].answers


@pytest.mark.parametrize("task", list(turns.TOKENS))
def test_turns_share_a_context(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sentences = tuple(f"Sentence number {index} says nothing." for index in range(500))
    monkeypatch.setattr(corpus, "sentences", lambda: sentences)
    tokenizer, limit = _Words(), 1500
    found = turns.make(task, tokenizer, limit, 2 * turns.TURNS, 0)
    assert len(found) == 2 * turns.TURNS
    for number, (prompt, answer) in enumerate(found):
        text = tokenizer.decode(prompt)
        turn = number % turns.TURNS
        earlier = [each for _, each in found[number - turn : number]]
        # The answer stands in the context once, those of earlier turns behind their questions too.
        assert text.count(answer) == 1, answer
        assert all(text.count(each) == 2 for each in earlier)
        if turn:
            assert prompt[: len(found[number - 1][0])] == found[number - 1][0]
        if turn == turns.TURNS - 1:
            assert limit - 40 < len(prompt) + turns.TOKENS[task] <= limit
    again = turns.make(task, _Words(), limit, turns.TURNS, 0)
    assert [answer for _, answer in again] == [answer for _, answer in found[: turns.TURNS]]


def test_ruler_as_lm_eval_makes_it(llama, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install '.[quality]'")
    pytest.importorskip("wonderwords")
    tokenizer = _Words()
    tokenizer_call = type("Encoding", (dict,), {"__getattr__": dict.__getitem__})
    original = tokenizer.__call__
    monkeypatch.setattr(
        _Words, "__call__", lambda _, text, **options: tokenizer_call(original(text, **options))
    )
    monkeypatch.setattr(questions.harness, "tokenizer_of", lambda _: tokenizer)
    monkeypatch.setattr(questions, "PER_FILE", 2)
    for question in questions._make("folder", 4096, "vt", 0):
        text = tokenizer.decode(question.prompt)
        assert text.endswith("they are:")
        for answer in question.answers:
            assert f"VAR {answer} =" in text
