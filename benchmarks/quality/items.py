# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Lists that a model is forced to write, and questions about their items.

An item is three random words. A second turn repeats some items: number and first word are forced,
the other two words, which are its last two tokens, are left to the model.
"""

from __future__ import annotations

import itertools
import random
import re
from typing import Any, NamedTuple

from benchmarks import corpus
from benchmarks.commands import FREE

REQUEST = "Write a numbered list of {items} items. Each item is three random words."
AGAIN = "Repeat some items of your list, with their numbers, word for word."
WORDS = 3  # of an item
ANSWER_TOKENS = 2  # of its last two words
_WORD = re.compile(r"(?<![\w-])[a-z]{5,8}(?![\w-])")


class Asked(NamedTuple):
    """Number of an item, from 1; tokens of the text before its answer and before that is asked."""

    item: int
    written: int
    at: int
    answer: str


class Task(NamedTuple):
    """A prompt, and the text that is generated after it: a list, then `FREE` where it is asked."""

    prompt: list[int]
    text: list[int]
    asked: list[Asked]


def whole_words(tokenizer: Any) -> list[str]:
    """Words of prose that are one token after a space, so that all items are equally long."""
    found = {word for sentence in corpus.sentences() for word in _WORD.findall(sentence)}
    return [word for word in sorted(found) if len(_ids(tokenizer, f" {word}")) == 1]


def make(
    tokenizer: Any, lists: int, items: int, questions: int, *, document: int = 0, seed: int = 0
) -> list[Task]:
    """Lists in which no word stands twice.

    Args:
        tokenizer: The model's; its chat template is used.
        lists: How many.
        items: Of each list.
        questions: About each list: one about an item of each of so many stretches, in any order.
        document: Tokens of prose that stand in each prompt before what is asked.
        seed: Same seed, same lists.

    Raises:
        ValueError: There are too few words for so many items, or too few items for the questions;
            or the chat template shows a reply otherwise once the conversation goes on.
    """
    if not 0 < questions <= items:
        raise ValueError(
            f"{questions} questions cannot be asked about {items} items: ask for 1 to as many as "
            "there are items"
        )
    words, wanted = whole_words(tokenizer), WORDS * items
    if len(words) < wanted:
        raise ValueError(
            f"{items} items take {wanted} different words, and {len(words)} of the prose's are one "
            f"token of this model: --items {len(words) // WORDS} is the most"
        )
    documents: list[list[int]] = [[]] * lists
    if document:
        documents = corpus.documents(tokenizer, lists, document)
    made = []
    for number, before in enumerate(documents):
        rng = random.Random(f"{seed}-{number}")
        picked = rng.sample(words, wanted)
        # One of each stretch of the list.
        bounds = [n * items // questions for n in range(questions + 1)]
        chosen = [rng.randrange(*stretch) for stretch in itertools.pairwise(bounds)]
        rng.shuffle(chosen)
        request = f"{tokenizer.decode(before)}\n\n{REQUEST.format(items=items)}".strip()
        made.append(_task(tokenizer, request, picked, chosen))
    return made


def _task(tokenizer: Any, request: str, words: list[str], chosen: list[int]) -> Task:
    items = [words[at : at + WORDS] for at in range(0, len(words), WORDS)]
    heads = [f"{number}. {item[0]}" for number, item in enumerate(items, 1)]
    tails = [f" {' '.join(item[1:])}" for item in items]
    whole = "\n".join(head + tail for head, tail in zip(heads, tails, strict=True))
    start, between = _turns(tokenizer, request, whole)
    text: list[int] = []
    written: list[int] = []
    for number, (head, tail) in enumerate(zip(heads, tails, strict=True)):
        text += _ids(tokenizer, f"\n{head}" if number else head)
        written.append(len(text))
        text += _ids(tokenizer, tail)
    asked = []
    for number, item in enumerate(chosen):
        text += _ids(tokenizer, f"\n{heads[item]}" if number else f"{between}{heads[item]}")
        asked.append(Asked(item + 1, written[item], len(text), tails[item].strip()))
        text += [FREE] * ANSWER_TOKENS
    return Task(_ids(tokenizer, start), text, asked)


def _turns(tokenizer: Any, request: str, reply: str) -> tuple[str, str]:
    """What stands before a reply, and between it and the next one, to `AGAIN`."""

    def shown(*contents: str) -> str:
        roles = ("user", "assistant", "user")
        chat = [{"role": roles[n], "content": text} for n, text in enumerate(contents)]
        found: str = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        return found

    start, whole = shown(request), shown(request, reply, AGAIN)
    if not whole.startswith(start + reply):
        raise ValueError(
            "the model's chat template shows a reply otherwise once the conversation goes on, so "
            "that no generation leads there: choose another --model"
        )
    return start, whole.removeprefix(start + reply)


def _ids(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return found
