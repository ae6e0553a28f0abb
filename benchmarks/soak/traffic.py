# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What clients ask for: mixed lengths, shared prefixes, samples, hang-ups, and nonsense."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

VOCAB = 1024
_DOCUMENTS = 3
CROWD = 8
_LONG_ANSWER = 160


class Ask(NamedTuple):
    """A request.

    Attributes:
        prompt: Token ids.
        max_tokens: To generate; none ends earlier.
        samples: Answers to the one prompt, all of which must be alike.
        hang_up_after: Tokens after which the client goes away; `None` reads to the end.
        after_s: How long the client waits before it asks.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    samples: int = 1
    hang_up_after: int | None = None
    after_s: float = 0.0


def plan(seed: int, count: int, longest: int) -> list[Ask]:
    """Returns requests, the same for the same arguments.

    Args:
        seed: Of everything random.
        count: Requests, beside a crowd that makes the pool too small.
        longest: Most tokens of a prompt and its answer.
    """
    draw = random.Random(seed)
    # They fit the pool together until they have written some of their answers.
    crowd = [Ask(_text(draw, longest // 8 - 64), _LONG_ANSWER) for _ in range(CROWD)]
    documents = [_text(draw, _length(draw, longest - _LONG_ANSWER)) for _ in range(_DOCUMENTS)]
    asks: list[Ask] = []
    for _ in range(count):
        kind = draw.random()
        if kind < 0.2 and asks:
            prompt = draw.choice(asks).prompt  # all of it may be in the cache
        elif kind < 0.7:
            document = draw.choice(documents)
            shared = document[: draw.randint(1, len(document))]
            prompt = shared + _text(draw, draw.randint(1, 64))
        else:
            prompt = _text(draw, _length(draw, longest))
        prompt = prompt[: longest - 1]
        most = min(longest - len(prompt), _LONG_ANSWER)
        tokens = draw.randint(1, most) if draw.random() < 0.3 else min(most, draw.randint(1, 48))
        asks.append(_behave(draw, prompt, tokens))
    late = [ask._replace(after_s=1.0) for ask in asks[:CROWD]]
    return [*crowd, *late, *asks[CROWD:]]


def _behave(draw: random.Random, prompt: tuple[int, ...], tokens: int) -> Ask:
    """Most clients read one answer to the end."""
    kind = draw.random()
    if kind < 0.1:
        return Ask(prompt, tokens, hang_up_after=0)  # waiting, or amid the prompt
    if kind < 0.25:
        return Ask(prompt, tokens, hang_up_after=draw.randint(1, tokens))
    if kind < 0.4:
        return Ask(prompt, tokens, samples=draw.randint(2, 3))
    return Ask(prompt, tokens)


def _text(draw: random.Random, length: int) -> tuple[int, ...]:
    return tuple(draw.choices(range(VOCAB), k=length))


def _length(draw: random.Random, longest: int) -> int:
    """As many short ones as long ones, by their order of magnitude."""
    return int(longest ** draw.random())


def nonsense(longest: int) -> list[dict[str, Any]]:
    """Returns parts of bodies that a server must refuse as the client's mistake.

    Args:
        longest: The server's longest context.
    """
    return [
        {"prompt": []},
        {"prompt": [1] * (longest + 1)},
        {"prompt": [1] * longest, "max_tokens": 2},
        {"prompt": [VOCAB + 7]},
        {"prompt": [-1]},
        {"prompt": {"no": "prompt"}},
        {"max_tokens": 0},
        {"max_tokens": "many"},
        {"temperature": -1.0},
        {"top_p": 2.0},
        {"top_k": -7},
        {"n": 0},
        {"n": 2, "temperature": 0.0},
        {"logprobs": -3},
        {"stream_options": {"include_usage": True}, "stream": False},
        {"model": "another"},
    ]
