# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Conversations that grow: what an agent asks, and what is measured of a turn."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from benchmarks import replay


class StubClient:
    """Streams as many pieces as are asked for, or fewer."""

    def __init__(self, lost=0):
        self.asked, self._lost = [], lost
        self.completions = SimpleNamespace(create=self._create)

    def _create(self, *, prompt, max_tokens, **_):
        self.asked.append(list(prompt))
        count = max_tokens - self._lost
        for _ in range(count):
            yield SimpleNamespace(choices=["a piece"], usage=None)
        usage = SimpleNamespace(prompt_tokens=len(prompt), completion_tokens=count)
        yield SimpleNamespace(choices=[], usage=usage)


def test_a_conversation_grows_by_the_results_of_tools():
    client, text = StubClient(), list(range(100))
    options = SimpleNamespace(start=10, result=20, turns=3, reply=4)
    turns = replay.converse(client, text, options)
    assert [turn["prompt_tokens"] for turn in turns] == [10, 30, 50]
    assert client.asked == [text[:10], text[:30], text[:50]]
    assert [turn["turn"] for turn in turns] == [0, 1, 2]
    assert all(turn["ttft_ms"] > 0 and turn["tpot_ms"] > 0 for turn in turns)


def test_a_reply_that_is_too_short_is_an_error():
    with pytest.raises(RuntimeError, match="instead of 4 tokens"):
        replay.ask(StubClient(lost=1), [1, 2], 4)


def test_first_and_later_turns_are_apart():
    turns = [{"turn": n, "ttft_ms": ms, "tpot_ms": 20.0} for n, ms in enumerate((9000, 500, 700))]
    run = {"arm": "dense", "seconds": 12.0, "agents": [turns], "peak_blocks": 5, "preemptions": 0,
           "cached_tokens": 90, "looked_up_tokens": 120}  # fmt: skip
    head = {"model": "m", "conversations": 1, "turns": 3, "start": 10, "result": 20, "reply": 4}
    text = replay.render({**head, "pool_tokens": 64, "runs": [run]})
    assert "| dense | 12 | 9.0 | 0.6 | 20 | 75% | 5 | 0 |" in text
