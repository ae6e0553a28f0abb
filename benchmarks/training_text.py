# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Text to train a Forecast on, without a network, and text that it never sees.

    python -m benchmarks.training_text --model MODEL --out TEXT --documents 32
    vllm-sparse train-forecast --model MODEL --data TEXT/train.jsonl --text-key tokens \\
        --recipe dense-small --cache CACHE --out forecast.safetensors
    vllm-sparse eval-forecast --model MODEL --forecast forecast.safetensors --text-key tokens \\
        --packing documents --data TEXT/held-out-needles.jsonl --queries 12 --tail-queries 12

The first command writes ``train.jsonl`` and three held-out sets. Training documents are cut from
the plays and poems that `benchmarks.corpus` does not use and from Python's standard library; in
most of them facts are hidden that a conversation at the end asks for, or a passage is repeated at
the end. Facts, questions and keys have nothing in common with those of `benchmarks.needles`.

The held-out sets are the prose of `benchmarks.corpus`, other modules of the standard library, and
questions of `benchmarks.needles` with their answers. All documents have the same number of tokens.
"""

from __future__ import annotations

import argparse
import json
import random
import sysconfig
import tarfile
from pathlib import Path
from typing import Any

from benchmarks import corpus, needles

_HELD_OUT_MODULES = ("argparse", "asyncio", "datetime", "logging", "statistics", "zipfile")


_NAMES = corpus.words(
    "Abernathy Bellweather Corrigan Dunmore Ellsworth Farquhar Grimaldi Hathersage Ibarra Jessop "
    "Kowalczyk Lachlan Mirzoyan Novak Ostrander Pettigrew Quillfeather Ravenscroft Sandoval "
    "Thibault Underhill Valdimar Wexford Ximenes Yardley Zablocki"
)
_THINGS = corpus.words(
    "turbine ledger parcel locker shipment archive telescope vineyard ferry clinic reactor "
    "orchestra glacier printer satellite barn tram foundry aquarium warehouse"
)
_COLOURS = corpus.words("crimson teal ochre indigo beige maroon turquoise magenta khaki lilac")
_PLACES = corpus.words(
    "Tromso Cartagena Leipzig Mombasa Osaka Valparaiso Winnipeg Tbilisi Porto Hobart Aleppo "
    "Bergen Cusco Davao Edmonton Fukuoka Gdansk Haifa Izmir Jaipur"
)
# What the text says, what is asked, how the answer begins. The answer ends with the value.
_FACTS = (
    (
        "Note to the reader: the access code of the {colour} {thing} is {value}.",
        "Which access code opens the {colour} {thing}?",
        "The {colour} {thing} opens with {value}",
    ),
    (
        "{name} signed for invoice {value} in {place}.",
        "What is the number of the invoice that {name} signed for in {place}?",
        "{name} signed for invoice {value}",
    ),
    (
        "(Remember that {name} was last seen with the {colour} {thing} in {place}.)",
        "In which city was {name} last seen with the {colour} {thing}?",
        "It was in {place}",
    ),
    (
        "The telephone of Dr. {name}, who repairs the {thing}, is {value}.",
        "How can I reach Dr. {name} by telephone?",
        "Call {value}",
    ),
    (
        "setting.{place}.{thing} = {value}",
        "What value does setting.{place}.{thing} have?",
        "setting.{place}.{thing} = {value}",
    ),
    (
        "Of all passengers, {name} alone carried the badge {value}.",
        "Which badge did {name} carry?",
        "{name} carried the badge {value}",
    ),
    (
        "It is recorded that the {thing} from {place} weighs {value} grams.",
        "How many grams does the {thing} from {place} weigh?",
        "It weighs {value}",
    ),
)


def _value(rng: random.Random) -> str:
    kind = rng.randrange(4)
    if kind == 0:
        return "".join(rng.choice("ABCDEFGHJKLMNPQRSTUVWXYZ23456789") for _ in range(7))
    if kind == 1:
        return f"{rng.randrange(100, 1000)}-{rng.randrange(1000, 10000)}"
    return str(rng.randrange(10 ** rng.randrange(3, 8), 10**8))


def _facts(rng: random.Random, count: int) -> list[tuple[str, str, str]]:
    names, things = rng.sample(_NAMES, count), rng.sample(_THINGS, count)
    places = rng.sample(_PLACES, count)
    facts = []
    for name, thing, place in zip(names, things, places, strict=True):
        words = {"name": name, "thing": thing, "place": place, "value": _value(rng)}
        words["colour"] = rng.choice(_COLOURS)
        said, asked, answered = (part.format(**words) for part in rng.choice(_FACTS))
        facts.append((said, asked, answered))
    return facts


def _training_plays() -> list[str]:
    """Texts of the archive that no benchmark reads."""
    used = {Path(name).name for name in (*corpus.PLAYS.values(), *corpus.PROSE.values())}
    texts = []
    with tarfile.open(corpus.fetch()) as archive:
        for member in sorted(archive.getmembers(), key=lambda item: item.name):
            path = Path(member.name)
            wanted = "/texts/" in member.name and path.suffix == ".txt" and path.name not in used
            # "_f" are the same plays in the spelling of 1623; their modern twin may be held out.
            if not wanted or path.stem.endswith("_f") or path.stem == "metadata":
                continue
            file = archive.extractfile(member)
            assert file is not None
            texts.append(file.read().decode("utf-8", errors="replace").replace("\r", ""))
    return texts


def _library(held_out: bool) -> list[str]:
    """Modules of Python's standard library."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = [*folder.glob("*.py"), *folder.glob("*/*.py")]
    texts = []
    for file in sorted(files):
        top = file.relative_to(folder).parts[0].removesuffix(".py")
        if top in ("test", "site-packages", "idlelib", "lib2to3") or top.startswith("_"):
            continue
        if (top in _HELD_OUT_MODULES) == held_out:
            texts.append(file.read_text(encoding="utf-8", errors="replace"))
    return texts


class Writer:
    """Makes documents of exactly `num_tokens` tokens."""

    def __init__(self, tokenizer: Any, num_tokens: int) -> None:
        """Keeps the tokenizer."""
        self._tokenizer, self._num_tokens = tokenizer, num_tokens
        self._tail = num_tokens * 5 // 64  # of questions or repetition, at the end

    def ids(self, text: str) -> list[int]:
        """Token ids of a text."""
        return self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def passage(self, rng: random.Random, texts: list[str]) -> str:
        """A passage that is long enough for a document; short texts are joined."""
        start, needed = rng.randrange(len(texts)), 6 * self._num_tokens
        text = texts[start]
        while len(text) < needed:
            start = (start + 1) % len(texts)
            text += "\n\n" + texts[start]
        offset = rng.randrange(len(text) - needed + 1)
        return text[offset : offset + needed]

    def plain(self, rng: random.Random, texts: list[str]) -> list[int]:
        """Text as it is."""
        return self.ids(self.passage(rng, texts))[: self._num_tokens]

    def repeating(self, rng: random.Random, texts: list[str]) -> list[int]:
        """Text whose end repeats one of its earlier passages."""
        ids = self.ids(self.passage(rng, texts))
        room = self._num_tokens - self._tail
        start = rng.randrange(room - self._tail)
        lead = self.ids("\n\nAs we read before:\n\n")
        return (ids[:room] + lead + ids[start : start + self._tail])[: self._num_tokens]

    def questions(self, rng: random.Random, texts: list[str]) -> list[int]:
        """Text with hidden facts, and a conversation about them at the end."""
        facts = _facts(rng, min(len(_THINGS), self._num_tokens // 340))
        lines = self.passage(rng, texts).splitlines(keepends=True)
        asked = rng.sample(facts, len(facts))
        rendered = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": "\x00"}], tokenize=False, add_generation_prompt=True
        )
        head, _, answer_head = rendered.partition("\x00")
        turn = head.removesuffix("\n").rpartition("\n")[2] + "\n"
        end = answer_head.partition("\n")[0]
        talk = ""
        for number, (_, question, answer) in enumerate(asked):
            before = f"{end}\n{turn}" if number else ""
            talk += f"{before}{question}{answer_head}{answer}."
        tail = self.ids(f"\n\n{talk}")[: rng.randrange(self._tail - 60, self._tail)]
        room = self._num_tokens - len(tail)
        begin = head + "Read the text; questions follow.\n\n"
        spread = sorted(rng.random() for _ in facts)
        count = len(lines)
        while True:  # fewer lines until they fit, the facts spread over them
            text = lines[:count]
            for place, (fact, _, _) in reversed(list(zip(spread, facts, strict=True))):
                text.insert(int(place * count), f"{fact}\n")
            ids = self.ids(begin + "".join(text))
            if len(ids) <= room or count < 50:
                break
            count = int(count * max(0.5, min(0.995, room / len(ids))))
        padding = self.ids("".join(lines[count : count + 200]))
        return (ids + padding)[:room] + tail


def training_documents(tokenizer: Any, num_tokens: int, count: int, seed: int) -> list[list[int]]:
    """Token ids of the training documents."""
    rng = random.Random(f"training-{seed}")
    writer = Writer(tokenizer, num_tokens)
    plays, library = _training_plays(), _library(held_out=False)
    result = []
    for number in range(count):
        texts = library if number % 3 == 2 else plays
        make = (writer.questions, writer.plain, writer.questions, writer.repeating)[number % 4]
        result.append(make(rng, texts))
    return result


def answered(tokenizer: Any, num_tokens: int, count: int) -> list[list[int]]:
    """Token ids of questions of `benchmarks.needles`, each followed by its answer."""
    writer = Writer(tokenizer, num_tokens)
    questions = needles.multikey(tokenizer, num_tokens + 40, 4 * count, seed=11)[::4]
    documents = [question.prompt + writer.ids(f" {question.answer}.") for question in questions]
    # Exactly as long as the others, at the expense of the text's first words.
    return [ids[:60] + ids[60 + len(ids) - num_tokens :] for ids in documents]


def held_out(tokenizer: Any, num_tokens: int, count: int) -> dict[str, list[list[int]]]:
    """Token ids of the held-out documents, by the name of the set."""
    rng = random.Random("held-out")
    writer = Writer(tokenizer, num_tokens)
    code = _library(held_out=True)
    return {
        "prose": corpus.prose_tokens(tokenizer, count, num_tokens),
        "code": [writer.plain(rng, code) for _ in range(count)],
        "needles": answered(tokenizer, num_tokens, count),
    }


def main() -> None:
    """Writes the files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="directory with the tokenizer")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--documents", type=int, default=120)
    parser.add_argument("--held-out", type=int, default=4, help="documents per held-out set")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    sets = held_out(tokenizer, arguments.tokens, arguments.held_out)
    sets = {f"held-out-{name}": documents for name, documents in sets.items()}
    sets["train"] = training_documents(
        tokenizer, arguments.tokens, arguments.documents, arguments.seed
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, documents in sets.items():
        path = arguments.out / f"{name}.jsonl"
        with path.open("w", encoding="utf-8") as file:
            for ids in documents:
                file.write(json.dumps({"tokens": ids}) + "\n")
        print(f"{path}: {len(documents)} documents, {sum(map(len, documents))} tokens")


if __name__ == "__main__":
    main()
