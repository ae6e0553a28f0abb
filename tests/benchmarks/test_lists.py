# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The benchmark of long lists: what is forced, what is asked, what is kept."""

from __future__ import annotations

import json
import re

import pytest
from support.workers import IdleWorker

from benchmarks import corpus, harness, lists, report
from benchmarks.commands import FREE
from benchmarks.quality import items
from benchmarks.worker import WorkerError

CALLS: list[tuple] = []
TOKENIZERS: list[Words] = []
SMALL = ["--lists", "2", "--items", "12", "--questions", "4", "--arms", "dense,stage2-512"]


class Words:
    """A word, with what stands before it, is a token."""

    def __init__(self):
        self.known: list[str] = []

    def __call__(self, text, **_):
        pieces = re.findall(r" ?\w+|\s|[^\w\s]", text)
        self.known += [piece for piece in dict.fromkeys(pieces) if piece not in self.known]
        return {"input_ids": [self.known.index(piece) for piece in pieces]}

    def decode(self, tokens):
        return "".join(self.known[token] for token in tokens)

    def apply_chat_template(self, chat, tokenize, add_generation_prompt):
        assert not tokenize
        assert add_generation_prompt
        turns = [f"[{turn['role']}] {turn['content']}" for turn in chat]
        return "".join(f"{turn}\n" for turn in (*turns, "[assistant] ")).removesuffix("\n")


class FakeWorker(IdleWorker):
    """Stock remembers everything; others the second half of their lists."""

    fails: str | None = None

    def __init__(self, arm, arguments, **further):
        super().__init__(arm, arguments, **further)
        self.arguments = arguments
        CALLS.append((arm.name, "start"))

    def call(self, command, **given):
        if self.fails == self.arm.name:
            raise WorkerError("ended")
        CALLS.append((self.arm.name, command))
        if command == "counters":
            return {"vllm:sparse_decode_tokens": 1}
        assert command == "force"
        longest = max(map(len, given["prompts"])) + max(map(len, given["forced"]))
        assert self.arguments["max_model_len"] == longest
        assert self.arguments["logits_processors"] == ["benchmarks.teacher:ForcedTokens"]
        return [self.written(text) for text in given["forced"]]

    def written(self, text):
        done: list[int] = []
        for at, token in enumerate(text):
            if token == FREE and text[at - 1] != FREE:
                # What followed this first word of an item when it stood there first.
                number = int(TOKENIZERS[-1].decode(done[-3:-2]))
                first = done.index(done[-1])
                known = self.arm.settings is None or number > 6
                done += done[first + 1 : first + 3] if known else [0, 0]
            elif token != FREE:
                done.append(token)
        return done


@pytest.fixture(autouse=True)
def tokenizer(monkeypatch):
    made = Words()
    words = [f"w{a}{b}ord" for a in "abcdefgh" for b in "abcdefgh"]
    CALLS.clear()
    TOKENIZERS.append(made)
    monkeypatch.setattr(FakeWorker, "fails", None)
    monkeypatch.setattr(lists, "Worker", FakeWorker)
    monkeypatch.setattr(corpus, "sentences", lambda: (" ".join(words), "A semi-final of it"))
    monkeypatch.setattr(
        corpus, "documents", lambda _, count, n: [made("play " * n)["input_ids"]] * count
    )
    monkeypatch.setattr(harness, "exit_cleanly", lambda: None)
    monkeypatch.setattr(harness, "kv_bytes_per_token", lambda model: 1)
    monkeypatch.setattr(harness, "resolve_model", lambda name: name)
    monkeypatch.setattr(harness, "tokenizer_of", lambda name: made)
    return made


def run(path, *further):
    lists.main(["--out", str(path), *SMALL, *further])
    return json.loads(path.read_text())


def test_a_list_is_written_and_some_of_it_asked_again(tokenizer):
    one, other = items.make(tokenizer, 2, 12, 4)
    assert one.text != other.text
    assert tokenizer.decode(one.prompt) == (
        "[user] Write a numbered list of 12 items. Each item is three random words.\n[assistant] "
    )
    text = tokenizer.decode([token for token in one.text if token != FREE])
    written, again = text.split(f"\n[user] {items.AGAIN}\n[assistant] ")
    found = re.findall(r"^(\d+)\. (\w+) (\w+ \w+)$", written, re.M)
    assert [number for number, *_ in found] == [str(number) for number in range(1, 13)]
    assert len({word for _, *words in found for word in " ".join(words).split()}) == 36
    assert one.text.count(FREE) == 2 * len(one.asked) == 8
    # One of each three items.
    assert sorted((asked.item - 1) // 3 for asked in one.asked) == [0, 1, 2, 3]
    heads = []
    for asked in one.asked:
        number, key, answer = found[asked.item - 1]
        heads.append(f"{number}. {key}")
        assert asked.answer == answer
        assert tokenizer.decode(one.text[: asked.written]).endswith(heads[-1])
        there = one.text[asked.written : asked.written + 2]
        assert tokenizer.decode(there) == f" {answer}"
        assert tokenizer.decode(one.text[asked.at - 1 : asked.at]) == f" {key}"
        assert one.text[asked.at : asked.at + 2] == [FREE, FREE]
    assert again == "\n".join(heads)
    assert (
        items.make(tokenizer, 2, 12, 4) == [one, other] != items.make(tokenizer, 2, 12, 4, seed=1)
    )


def test_a_template_that_changes_replies_is_refused(monkeypatch, tmp_path, capsys):
    right = Words.apply_chat_template

    def wrong(self, chat, **options):
        return right(self, chat, **options).replace("[assistant] 1.", "[assistant] I.")

    monkeypatch.setattr(Words, "apply_chat_template", wrong)
    with pytest.raises(SystemExit):
        run(tmp_path / "lists.json")
    assert "choose another --model" in capsys.readouterr().err


def test_arms_are_judged_by_where_the_item_stands(tmp_path):
    path = tmp_path / "lists.json"
    found = run(path)
    cell = found["cells"]["0"]
    assert list(cell["arms"]) == ["dense", "stage2-512"]
    assert cell["arms"]["dense"]["settings"] is None
    assert cell["arms"]["stage2-512"]["settings"]["min_context"] == 32
    assert (cell["arms"]["dense"]["correct"], cell["arms"]["dense"]["questions"]) == (8, 8)
    assert cell["arms"]["stage2-512"]["correct"] == 4
    asked = cell["arms"]["stage2-512"]["asked"]
    for one in asked:
        assert (one["got"] == one["expected"]) is (one["item"] > 6)
        assert one["back"] > 0
    far = [one["back"] for one in asked if one["item"] <= 3]
    near = [one["back"] for one in asked if one["item"] > 9]
    assert min(far) > max(near)
    shown = report.render(path)
    assert "| dense | 8 of 8 | 4 of 4 | 4 of 4 |" in shown
    assert "| stage2-512 | 4 of 8 | 0 of 4 | 4 of 4 |" in shown


def test_what_the_file_has_is_not_asked_again(tmp_path, monkeypatch, capsys):
    path = tmp_path / "lists.json"
    monkeypatch.setattr(FakeWorker, "fails", "dense")
    with pytest.raises(SystemExit, match="failed: dense"):
        run(path)
    assert list(json.loads(path.read_text())["cells"]["0"]["arms"]) == ["stage2-512"]
    monkeypatch.setattr(FakeWorker, "fails", None)
    CALLS.clear()
    run(path)
    assert CALLS == [("dense", "start"), ("dense", "force"), ("dense", "counters")]
    CALLS.clear()
    found = run(path, "--document", "40", "--arms", "stage2-512")
    assert {name for name, _ in CALLS} == {"stage2-512"}
    assert list(found["cells"]) == ["0", "40"]
    short, long = (cell["prompt_tokens"][0] for cell in found["cells"].values())
    assert short + 40 <= long < short + 45
    for other in (["--setting", "min_context=64"], ["--items", "10"]):
        with pytest.raises(SystemExit):
            run(path, *other)
        assert "name another file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("further", "message"),
    [(["--items", "40"], "--items 21 is the most"), (["--questions", "13"], "cannot be asked")],
)
def test_impossible_lists_are_refused(tmp_path, capsys, further, message):
    with pytest.raises(SystemExit):
        run(tmp_path / "lists.json", *further)
    assert message in capsys.readouterr().err
    assert not CALLS
