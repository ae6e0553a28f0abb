# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Conversations over one context, in the manner of SCBench (arXiv 2412.10319), generated.

Every turn asks for something else in the same context; the turns before stand in the prompt with
the right answers. So whoever evicts by what one question wants is asked the next one too, a prefix
cache is worth having, and a prompt costs little more than its last turn.

* ``turns-number``: numbers of keys, in prose.
* ``turns-kv``: UUIDs by their keys, UUIDs too, in one long JSON object.
* ``turns-affix``: strings of a list by how they begin and end.
* ``turns-hop``: the number behind a variable that another one was assigned to, in prose.
"""

from __future__ import annotations

import random
import string
import uuid
from typing import TYPE_CHECKING, Any

from benchmarks import corpus

if TYPE_CHECKING:
    from collections.abc import Callable

TURNS = 5
# Replies are cut where nothing but the answer fits.
TOKENS = {"turns-number": 16, "turns-kv": 48, "turns-affix": 40, "turns-hop": 16}

# The context with so many lines of filling, and what the turns ask and expect.
Made = tuple["Callable[[int], str]", list[tuple[str, str]]]


def make(task: str, tokenizer: Any, context: int, count: int, seed: int) -> list[tuple[Any, str]]:
    """Prompts, as token ids, and answers: `TURNS` in a row share a context.

    Args:
        task: One of `TOKENS`.
        tokenizer: Measures; each turn is tokenised on its own, so that prompts share a prefix.
        context: Upper bound of the last prompt and its reply together, in tokens.
        count: How many, a multiple of `TURNS`.
        seed: Same seed, same questions.
    """
    rng = random.Random(f"{task}-{seed}")
    found = []
    for _ in range(count // TURNS):
        text, turns = _TASKS[task](rng)
        asked = [_tokens(tokenizer, ask) for ask, _ in turns]
        told = [_tokens(tokenizer, f" {answer}") for _, answer in turns]
        room = context - TOKENS[task] - sum(map(len, asked)) - sum(map(len, told[:-1]))
        low, high = 0, context // 2
        while low < high:  # most lines that fit
            middle = (low + high + 1) // 2
            if len(tokenizer(text(middle), verbose=False)["input_ids"]) <= room:
                low = middle
            else:
                high = middle - 1
        prompt = tokenizer(text(low), verbose=False)["input_ids"]
        for ask, tell, (_, answer) in zip(asked, told, turns, strict=True):
            prompt = prompt + ask
            found.append((prompt, answer))
            prompt = prompt + tell
    return found


def _tokens(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, verbose=False, add_special_tokens=False)["input_ids"]


def _prose(rng: random.Random, facts: list[str], opening: str) -> Callable[[int], str]:
    """Prose of so many sentences with facts in between, in their order."""
    pool = corpus.sentences()
    start = rng.randrange(len(pool))

    def text(count: int) -> str:
        lines = [pool[(start + index) % len(pool)] for index in range(count)]
        places = sorted(random.Random(start).choices(range(count + 1), k=len(facts)), reverse=True)
        for place, fact in zip(places, reversed(facts), strict=True):
            lines.insert(place, fact)
        return f"{opening}\n\n{' '.join(lines)}"

    return text


def _list(
    rng: random.Random, line: Callable[[], str], wanted: list[str], opening: str, *ends: str
) -> Callable[[int], str]:
    """A list of random lines, with the wanted ones at random places."""
    others = [line() for _ in range(4000)]
    places = [rng.random() for _ in wanted]

    def text(count: int) -> str:
        lines = others[:count]
        for place, each in sorted(zip(places, wanted, strict=True), reverse=True):
            lines.insert(int(place * (len(others[:count]) + 1)), each)
        return "\n".join((opening, *ends[:1], *lines, *ends[1:]))

    return text


def _number(rng: random.Random) -> Made:
    keys = rng.sample(["".join(rng.sample(string.ascii_lowercase, 6)) for _ in range(40)], TURNS)
    values = [str(rng.randrange(1_000_000, 10_000_000)) for _ in keys]
    facts = [
        f"The special magic number for {key} is: {value}."
        for key, value in zip(keys, values, strict=True)
    ]
    turns = [
        (f"\n\nWhat is the special magic number for {key} mentioned in the text? It is:", value)
        for key, value in zip(keys, values, strict=True)
    ]
    rng.shuffle(facts)
    rng.shuffle(turns)
    opening = "Some special magic numbers are hidden in the following text. Memorize them."
    return _prose(rng, facts, opening), turns


def _uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def _pairs(rng: random.Random) -> Made:
    pairs = [(_uuid(rng), _uuid(rng)) for _ in range(TURNS)]
    wanted = [f'"{key}": "{value}",' for key, value in pairs]
    opening = "Extract the values of the keys that are asked for from the JSON object below.\n"
    text = _list(
        rng, lambda: f'"{_uuid(rng)}": "{_uuid(rng)}",', wanted, opening, "{", '"end": ""\n}'
    )
    return text, [(f'\n\nKey: "{key}"\nThe value is:', f'"{value}"') for key, value in pairs]


def _letters(rng: random.Random, count: int) -> str:
    return "".join(rng.choices(string.ascii_lowercase, k=count))


def _affixes(rng: random.Random) -> Made:
    wanted = [" ".join(_letters(rng, 5) for _ in range(4)) for _ in range(TURNS)]
    opening = "Below is a list of lines. Give the lines that are asked for.\n"
    text = _list(rng, lambda: " ".join(_letters(rng, 5) for _ in range(4)), wanted, opening)
    turns = []
    for line in wanted:
        first, *_, last = line.split()
        turns.append((f'\n\nThe line that begins with "{first}" and ends with "{last}" is:', line))
    return text, turns


def _hops(rng: random.Random) -> Made:
    names = rng.sample([_letters(rng, 4).upper() for _ in range(40)], 3 * TURNS)
    facts, turns = [], []
    for chain in range(TURNS):
        first, second, third = names[3 * chain : 3 * chain + 3]
        value = str(rng.randrange(10_000, 100_000))
        pairs = (second, first), (third, second)
        told = [f"VAR {first} = {value}.", *(f"VAR {new} = VAR {old}." for new, old in pairs)]
        facts.append(told)
        ask = f"\n\nQuestion: which number is VAR {second}?\nAnswer: VAR {second} ="
        turns.append((ask, value))
    order = [chain for chain in range(TURNS) for _ in range(3)]
    rng.shuffle(order)
    mixed = [facts[chain].pop(0) for chain in order]
    opening = "Memorize the assignments to variables that are hidden in the following text."
    return _prose(rng, mixed, opening), turns


_TASKS: dict[str, Callable[[random.Random], Made]] = {
    "turns-number": _number,
    "turns-kv": _pairs,
    "turns-affix": _affixes,
    "turns-hop": _hops,
}
