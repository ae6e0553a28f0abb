# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What the judge asks: RULER's offline tasks as lm-eval makes them, and tasks of our own.

RULER's prompts are made by lm-eval's own functions (``pip install '.[quality]'``), plain
completions without a chat template, and judged as lm-eval does: the share of the wanted strings
that appear in the reply, whatever their case.

* ``niah_single_1``, ``niah_multikey_2``, ``niah_multikey_3``: a number among noise, a number among
  needles, a UUID among needles.
* ``vt``: all variables of a chain of assignments. ``cwe``, ``fwe``: the most frequent words.
* ``multivalue``, ``multiquery``: four numbers of one key, or of four keys, hidden in prose.
* ``table``: every row of a table that is scattered over prose.
* ``recall``: a long generation that has to reproduce, item by item, what a list in the prompt says.
* ``turns-*``: conversations over one context, see `benchmarks.quality.turns`.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import random
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from benchmarks import corpus, harness, results
from benchmarks.quality import turns
from vllm_sparse import paths

if TYPE_CHECKING:
    from collections.abc import Callable

# lm-eval allows 128 (niah_*), 30 (vt), 120 (cwe) and 50 (fwe). Less saves time where the rest is
# behind the answer, but cuts most lists of cwe: it stays, as replies of two limits are no pairs.
RULER_TOKENS = {
    "niah_single_1": 24, "niah_multikey_2": 24, "niah_multikey_3": 56, "vt": 30, "cwe": 80,
    "fwe": 40,
}  # fmt: skip
OWN_TOKENS = {"multivalue": 48, "multiquery": 64, "table": 160, "recall": 400}
TASKS = (*RULER_TOKENS, *OWN_TOKENS, *turns.TOKENS)


@dataclass(frozen=True)
class Question:
    """A prompt and the strings that a reply should contain.

    Attributes:
        task: One of `TASKS`.
        index: Number within the task.
        prompt: Token ids.
        answers: Wanted strings.
        max_tokens: Length of the reply.
    """

    task: str
    index: int
    prompt: list[int]
    answers: list[str]
    max_tokens: int

    def score(self, reply: str) -> float:
        """Share of the wanted strings that the reply contains."""
        reply = reply.lower()
        return sum(answer.lower() in reply for answer in self.answers) / len(self.answers)


def lacking(tasks: list[str]) -> str | None:
    """What tasks need that is not installed, and what to do; None: they can be asked."""
    made = [task for task in tasks if task in RULER_TOKENS]
    if not made or importlib.util.find_spec("lm_eval") is not None:
        return None
    return (
        f"{', '.join(made)}: lm-eval makes their questions and is not installed; "
        "pip install '.[quality]', or name other --tasks"
    )


def load(model: str, context: int, task: str, count: int, seed: int = 0) -> list[Question]:
    """The first questions of a task; kept in the cache folder once they are made.

    Args:
        model: Name, alias or folder; its tokenizer measures the prompts.
        context: Upper bound of prompt and reply together, in tokens.
        task: One of `TASKS`.
        count: At most 100.
        seed: Same seed, same questions.
    """
    name = harness.resolve_model(model).name
    file = paths.cache_dir() / "questions" / f"{name}-{context}-{task}-{seed}.json"
    if not file.exists():
        made = _make(str(harness.resolve_model(model)), context, task, seed)
        results.write_json(file, [asdict(question) for question in made])
    return [Question(**each) for each in json.loads(file.read_text())[:count]]


PER_FILE = 100


def _make(folder: str, context: int, task: str, seed: int) -> list[Question]:
    tokenizer = harness.tokenizer_of(folder)
    random.seed(f"{task}-{context}-{seed}")
    if task in OWN_TOKENS:
        own = {"multivalue": multivalue, "multiquery": multiquery, "table": table, "recall": recall}
        return own[task](tokenizer, context, PER_FILE, seed)
    if task in turns.TOKENS:
        made = turns.make(task, tokenizer, context, PER_FILE, seed)
        reply = turns.TOKENS[task]
        return [
            Question(task, index, prompt, [answer], reply)
            for index, (prompt, answer) in enumerate(made)
        ]
    limit = RULER_TOKENS[task]
    found = []
    for index, sample in enumerate(_ruler(tokenizer, context, task, seed)):
        # As lm-eval joins them: the task's delimiter, unless there is white space already.
        question, begun = sample["input"], sample["gen_prefix"]
        delimiter = "" if question[-1].isspace() else "\n\n" if task == "cwe" else " "
        text = question + delimiter + begun
        prompt = tokenizer(text, verbose=False)["input_ids"]
        found.append(Question(task, index, prompt, list(sample["outputs"]), limit))
    return found


def _ruler(tokenizer: Any, context: int, task: str, seed: int) -> list[dict[str, Any]]:
    """Samples as lm-eval makes them."""
    import numpy as np

    np.random.seed(seed)
    if task == "vt":
        from lm_eval.tasks.ruler import vt_utils as vt

        make = functools.partial(vt.sys_vartrack_w_noise_random, tokenizer)
        example = make(num_samples=1, max_seq_length=500, incremental=5)[0]
        return make(num_samples=PER_FILE, max_seq_length=context, icl_example=example)
    if task == "cwe":
        from lm_eval.tasks.ruler import cwe_utils as cwe

        return cwe.sys_word_pair_random(PER_FILE, context, tokenizer)
    if task == "fwe":
        from lm_eval.tasks.ruler import fwe_utils as fwe

        return fwe.sys_kwext(tokenizer, context, PER_FILE)
    from lm_eval.tasks.ruler import niah_utils as niah
    from lm_eval.tasks.ruler.prepare_niah import generate_samples, get_haystack

    haystack, key, value = {
        "niah_single_1": ("repeat", "words", "numbers"),
        "niah_multikey_2": ("needle", "words", "numbers"),
        "niah_multikey_3": ("needle", "uuids", "uuids"),
    }[task]
    return generate_samples(
        get_haystack(type_haystack=haystack), tokenizer, max_seq_length=context,
        template=niah.TEMPLATE, type_haystack=haystack, type_needle_k=key, type_needle_v=value,
        num_samples=PER_FILE,
    )  # fmt: skip


# --- tasks of our own ---------------------------------------------------------------------------


_KEYS = corpus.words(
    "anchor bridge candle desert engine forest garden harbor island jacket kettle lantern "
    "meadow needle orchard pillow quarry river saddle temple umbrella valley window zipper"
)
_CITIES = corpus.words(
    "Lisbon Oslo Prague Turin Ghent Malmo Bergen Krakow Porto Seville Leeds Basel Graz Bremen "
    "Nantes Tartu Split Cork Debrecen Varna"
)
_GOODS = corpus.words(
    "copper linen pepper timber salt wool amber paper glass honey barley coffee resin cotton "
    "marble cork saffron tin olives candles"
)


def _hidden(
    tokenizer: Any, context: int, reply: int, facts: list[str], opening: str, ask: str, rng: Any
) -> list[int]:
    """A prompt with facts spread over as much prose as fits."""
    pool = corpus.sentences()
    start = rng.randrange(len(pool))

    def prompt(count: int) -> list[int]:
        lines = [pool[(start + index) % len(pool)] for index in range(count)]
        places = sorted(random.Random(start).sample(range(count + 1), len(facts)), reverse=True)
        for place, fact in zip(places, reversed(facts), strict=True):
            lines.insert(place, fact)
        text = f"{opening}\n\n{' '.join(lines)}\n\n{ask}"
        return tokenizer(text, verbose=False)["input_ids"]

    low, high = len(facts), context // 4
    while low < high:  # most sentences that fit
        middle = (low + high + 1) // 2
        if len(prompt(middle)) + reply <= context:
            low = middle
        else:
            high = middle - 1
    return prompt(low)


def _generator(
    task: str,
) -> Callable[[Callable[[Any], tuple[list[str], str, str, list[str]]]], Any]:
    """Makes a set of questions of a function that invents facts, opening, question and answers."""

    def decorate(invent: Any) -> Any:
        @functools.wraps(invent)
        def make(tokenizer: Any, context: int, count: int, seed: int) -> list[Question]:
            rng, reply = random.Random(f"{task}-{seed}"), OWN_TOKENS[task]
            found = []
            for index in range(count):
                facts, opening, ask, answers = invent(rng)
                prompt = _hidden(tokenizer, context, reply, facts, opening, ask, rng)
                found.append(Question(task, index, prompt, answers, reply))
            return found

        return make

    return decorate


_OPENING = "Some special magic numbers are hidden in the following text. Memorize them."


def _number(rng: Any) -> str:
    return str(rng.randrange(1_000_000, 10_000_000))


@_generator("multivalue")
def multivalue(rng: Any) -> tuple[list[str], str, str, list[str]]:
    """Four numbers of one key."""
    key, values = rng.choice(_KEYS), [_number(rng) for _ in range(4)]
    facts = [f"One of the special magic numbers for {key} is: {value}." for value in values]
    ask = (
        f"What are all the special magic numbers for {key} mentioned in the text? The special "
        f"magic numbers for {key} mentioned in the text are"
    )
    return facts, _OPENING, ask, values


@_generator("multiquery")
def multiquery(rng: Any) -> tuple[list[str], str, str, list[str]]:
    """A number of each of four keys."""
    keys = rng.sample(_KEYS, 4)
    values = [_number(rng) for _ in keys]
    pairs = zip(keys, values, strict=True)
    facts = [f"The special magic number for {key} is: {value}." for key, value in pairs]
    rng.shuffle(facts)
    named = f"{', '.join(keys[:-1])} and {keys[-1]}"
    ask = (
        f"What are the special magic numbers for {named} mentioned in the text? "
        f"The special magic number for {keys[0]} is:"
    )
    return facts, _OPENING, ask, values


@_generator("table")
def table(rng: Any) -> tuple[list[str], str, str, list[str]]:
    """Every row of a table of eight cities."""
    cities = rng.sample(_CITIES, 8)
    rows = [f"{city} | {rng.choice(_GOODS)} | {rng.randrange(1000, 9999)}" for city in cities]
    facts = [f"[Record: {row}]" for row in rows]
    opening = (
        "The following text contains records of the form [Record: city | goods | crates]. "
        "Collect every record."
    )
    ask = "All records of the text above, in its order, as a table:\ncity | goods | crates\n"
    return facts, opening, ask, rows


@_generator("recall")
def recall(rng: Any) -> tuple[list[str], str, str, list[str]]:
    """Twenty instructions that are repeated one after the other in a long reply."""
    names = [f"{city}-{rng.randrange(100, 999)}" for city in rng.sample(_CITIES, 20)]
    goods = [rng.choice(_GOODS) for _ in names]
    facts = [
        f"Step {number}: send the {item} to depot {name}."
        for number, (name, item) in enumerate(zip(names, goods, strict=True), 1)
    ]
    opening = "The following text contains twenty numbered steps. Remember all of them."
    ask = "The twenty numbered steps of the text above, in full:\nStep 1:"
    return facts, opening, ask, names
