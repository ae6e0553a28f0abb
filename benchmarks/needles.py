# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Questions whose answer is one sentence hidden in prose ("needles"), deterministic by seed.

Three sets:

* `single`: one needle per context. Contexts that share a haystack hide it at different depths.
* `multikey`: four needles with different keys per context, each asked for.
* `two_turn`: two needles worded unlike each other; the second is asked for in a second call that
  carries the whole conversation.
"""

from __future__ import annotations

import bisect
import random
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from benchmarks import corpus

if TYPE_CHECKING:
    from collections.abc import Iterable

ANSWER_TOKENS = 16
NEEDLES_PER_CONTEXT = 4
DEPTHS_PER_HAYSTACK = 5


_ADJECTIVES = corpus.words(
    "amber brisk calm dusty eager faint gentle hollow icy jolly keen lunar mellow noble olive "
    "proud quiet rustic silver tidy urban velvet witty young zesty"
)
_NOUNS = corpus.words(
    "anchor bridge candle desert engine forest garden harbor island jacket kettle lantern "
    "meadow needle orchard pillow quarry river saddle temple umbrella valley window yarn zipper"
)
_WAREHOUSES = corpus.words(
    "Lindqvist Okafor Petrova Halloran Nakamura Dubois Castellan Vermeer Oyelaran Strand Maddox "
    "Ferreira"
)


@dataclass(frozen=True)
class Question:
    """One prompt with a known answer, a value that has to appear in the completion.

    Token ids include the chat template and the beginning of the answer. Questions with the same
    `context_id` share most of their prompt; `detail` says what was varied.
    """

    context_id: int
    prompt: list[int]
    answer: str
    detail: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Conversation:
    """Two questions about one context; the second is only answerable from the context.

    The context is the first user message up to the question, needles included; the model continues
    the prefixes of the two answers.
    """

    context: str
    questions: tuple[str, str]
    prefixes: tuple[str, str]
    answers: tuple[str, str]


def is_correct(completion: str, answer: str) -> bool:
    """Whether the exact value stands in the completion (thousands separators ignored)."""
    return answer in re.findall(r"\d+", completion.replace(",", ""))


def chat_prompt(tokenizer, messages: list[dict], answer_prefix: str) -> list[int]:
    """Returns the token ids of a conversation whose next answer begins with `answer_prefix`."""
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(rendered + answer_prefix, add_special_tokens=False, verbose=False)["input_ids"]


def single(tokenizer, num_tokens: int, count: int, seed: int = 0) -> list[Question]:
    """One needle per context, at evenly spread depths in several haystacks.

    The deepest needle of a haystack comes first, so that the prefix cache serves the others.

    Args:
        tokenizer: The model's tokenizer; its chat template is used.
        num_tokens: Upper bound of the prompt's length, reached within one sentence.
        count: Number of questions.
        seed: Same seed, same questions.
    """
    rng = random.Random(f"single-{seed}")
    questions = []
    for index in range(count):
        haystack_id, turn = divmod(index, DEPTHS_PER_HAYSTACK)
        depth = 1 - (turn + 0.5) / DEPTHS_PER_HAYSTACK
        key, value = _keys(rng, 1)[0], _value(rng)
        start = _haystack_start(seed, haystack_id)
        placed = [(depth, _needle(key, value))]
        num_sentences = _num_sentences(tokenizer, num_tokens, start, placed)
        prompt = _prompt(tokenizer, start, num_sentences, placed, key)
        detail = {"depth": round(depth, 2), "haystack": haystack_id}
        questions.append(Question(haystack_id, prompt, value, detail))
    return questions


def multikey(tokenizer, num_tokens: int, count: int, seed: int = 0) -> list[Question]:
    """Four needles with different keys per context, one question for each.

    A prompt has at most `num_tokens` tokens, reached within one sentence.
    """
    rng = random.Random(f"multikey-{seed}")
    questions: list[Question] = []
    context_id = 0
    while len(questions) < count:
        keys = _keys(rng, NEEDLES_PER_CONTEXT)
        values = [_value(rng) for _ in keys]
        depths = sorted(rng.uniform(0.02, 0.98) for _ in keys)
        start = _haystack_start(seed, context_id, offset=0.5)
        placed = [
            (depth, _needle(key, value))
            for depth, key, value in zip(depths, keys, values, strict=True)
        ]
        num_sentences = _num_sentences(tokenizer, num_tokens, start, placed)
        for key, value, depth in zip(keys, values, depths, strict=True):
            prompt = _prompt(tokenizer, start, num_sentences, placed, key)
            questions.append(Question(context_id, prompt, value, {"depth": round(depth, 2)}))
        context_id += 1
    return questions[:count]


def two_turn(tokenizer, num_tokens: int, count: int, seed: int = 0) -> list[Conversation]:
    """Conversations with two needles that share no wording.

    The first turn's question says nothing of the second needle, so that an algorithm that keeps
    only what the first question attends to loses it. The second turn's prompt has at most
    `num_tokens` tokens, reached within one sentence.
    """
    rng = random.Random(f"two-turn-{seed}")
    conversations = []
    for index in range(count):
        key = _keys(rng, 1)[0]
        house = _WAREHOUSES[rng.randrange(len(_WAREHOUSES))]
        values = (_value(rng), _value(rng))
        placed = [
            (rng.uniform(0.05, 0.95), _needle(key, values[0])),
            (
                rng.uniform(0.05, 0.95),
                f"In the ledger, the harbour master wrote that warehouse {house} holds "
                f"{values[1]} crates.",
            ),
        ]
        questions = (_ask(key), f"How many crates does warehouse {house} hold?")
        prefixes = (_answer_prefix(key), f"Warehouse {house} holds")
        start = _haystack_start(seed, index, offset=0.25)

        def build(num_sentences: int, start=start, placed=placed) -> str:
            return _INTRODUCTION + "\n\n" + _plant(start, num_sentences, placed)

        def length(num_sentences: int, build=build, ask=questions, begin=prefixes) -> int:
            first = f"{build(num_sentences)}\n\n{ask[0]}"
            messages = [
                {"role": "user", "content": first},
                {"role": "assistant", "content": f"{begin[0]} 1234567."},
                {"role": "user", "content": ask[1]},
            ]
            # The first answer may be longer than expected.
            return len(chat_prompt(tokenizer, messages, begin[1])) + ANSWER_TOKENS

        conversations.append(
            Conversation(build(_most_sentences(length, num_tokens)), questions, prefixes, values)
        )
    return conversations


SETS = {"single": single, "multikey": multikey}


def by_context(questions: Iterable[Question]) -> list[list[int]]:
    """Returns the indices of the questions, grouped by context, in order."""
    groups: dict[int, list[int]] = {}
    for index, question in enumerate(questions):
        groups.setdefault(question.context_id, []).append(index)
    return list(groups.values())


_INTRODUCTION = (
    "A text follows. A few facts that do not belong to it are hidden in it. "
    "Remember them: you will be asked about them afterwards."
)


def _needle(key: str, value: str) -> str:
    return f"The special magic number for {key} is {value}."


def _ask(key: str) -> str:
    return f"What is the special magic number for {key} that the text mentions?"


def _answer_prefix(key: str) -> str:
    return f"The special magic number for {key} that the text mentions is"


def _keys(rng: random.Random, count: int) -> list[str]:
    """Returns keys that share no word, so that confusing two of them is no near miss."""
    pairs = zip(rng.sample(_ADJECTIVES, count), rng.sample(_NOUNS, count), strict=True)
    return [f"{adjective}-{noun}" for adjective, noun in pairs]


def _value(rng: random.Random) -> str:
    return str(rng.randrange(1_000_000, 10_000_000))


def _haystack_start(seed: int, context_id: int, offset: float = 0.0) -> int:
    """First sentence of a haystack; the golden ratio spreads them evenly over the text."""
    position = (offset + 0.6180339887 * (context_id + 7 * seed)) % 1.0
    return int(position * len(corpus.sentences()))


def _plant(start: int, num_sentences: int, placed: list[tuple[float, str]]) -> str:
    """Returns `num_sentences` sentences with each needle at its depth, between two sentences."""
    pool = corpus.sentences()
    lines = [pool[(start + index) % len(pool)] for index in range(num_sentences)]
    for depth, needle in sorted(placed, reverse=True):
        lines.insert(round(depth * num_sentences), needle)
    return " ".join(lines)


def _prompt(tokenizer, start: int, num_sentences: int, placed: list, key: str) -> list[int]:
    content = f"{_INTRODUCTION}\n\n{_plant(start, num_sentences, placed)}\n\n{_ask(key)}"
    return chat_prompt(tokenizer, [{"role": "user", "content": content}], _answer_prefix(key))


def _num_sentences(tokenizer, num_tokens: int, start: int, placed: list) -> int:
    """Most sentences with which a question about any key still fits.

    It does not depend on the key asked for, so that all questions share the context exactly.
    """
    longest = max((f"{a}-{n}" for a in _ADJECTIVES for n in _NOUNS), key=len)

    def length(num_sentences: int) -> int:
        return len(_prompt(tokenizer, start, num_sentences, placed, longest)) + _KEY_SLACK_TOKENS

    return _most_sentences(length, num_tokens)


_KEY_SLACK_TOKENS = 8


def _most_sentences(length, num_tokens: int) -> int:
    """Largest number of sentences whose prompt, of `length(n)` tokens, still fits."""
    upper = max(1, num_tokens // 4)  # no sentence is shorter than this on average
    best = bisect.bisect_right(range(1, upper), num_tokens, key=length)
    if best < 1:
        raise ValueError(f"{num_tokens} tokens are too few for a question")
    return best
