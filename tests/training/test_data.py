# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Text to sequences."""

from __future__ import annotations

import itertools
import sys
from types import SimpleNamespace

import pytest

from vllm_sparse.errors import ConfigError
from vllm_sparse.training.data import pack, read_documents, read_sequences, sequence_index


class Words:
    """A tokenizer: words to their lengths."""

    eos_token_id = 0

    def __call__(self, text, **options):
        return {"input_ids": [len(word) for word in text.split()]}


def test_packing():
    documents = ["a bb ccc", "dddd", [5, 6, 7, 8]]
    joined = pack(documents, Words(), 3)
    assert joined.tolist() == [[1, 2, 3], [0, 4, 0], [5, 6, 7]]
    apart = pack(documents, Words(), 3, "documents")
    assert apart.tolist() == [[1, 2, 3], [5, 6, 7]]
    assert len(pack(documents, Words(), 2, limit=1)) == 1
    with pytest.raises(ConfigError, match="longest document: 4"):
        pack(documents, Words(), 100)


def test_sources(tmp_path, monkeypatch):
    (tmp_path / "b.txt").write_text("plain")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": [1, 2]}\n')
    (tmp_path / "ignored.bin").write_bytes(b"\x00")
    assert list(read_documents([str(tmp_path)])) == ["one", [1, 2], "plain"]
    with pytest.raises(ConfigError, match="line 1: no JSON object with a key 'body'"):
        list(read_documents([str(tmp_path / "a.jsonl")], "body"))

    def missing(*_, **options):
        raise FileNotFoundError("not on the hub")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=missing))
    with pytest.raises(ConfigError, match=r"no file or folder.*'train': not on the hub"):
        list(read_documents(["no/such-dataset"]))


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("a.jsonl.gz", b"\x1f\x8b\x08\x00" + bytes(range(128, 256)), "no text in UTF-8"),
        ("a.bin", b"words " * 50 + b"\xff" * 9, "no text in UTF-8"),
        ("a.jsonl", b'{"text": "good"}\n{"text": "\xff\xfe"}\n', "line 2: no JSON object"),
        ("a.jsonl", b'{"text": null}\n', "line 1: None is neither a text nor a list"),
        ("a.jsonl", b'{"text": [[1]]}\n', r"line 1: \[\[1\]\] is neither"),
    ],
)
def test_what_is_no_text_is_refused_by_name(tmp_path, name, content, why):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"{name}.*{why}"):
        list(read_documents([str(path)]))


def test_a_stray_byte_in_a_book_is_no_reason_to_stop(tmp_path):
    (tmp_path / "book.txt").write_bytes(b"word " * 400 + b"\xe9")
    (text,) = read_documents([str(tmp_path)])
    assert text.endswith("\N{REPLACEMENT CHARACTER}")


@pytest.fixture
def endless(monkeypatch):
    """The package ``datasets`` with one set that never ends; gives what it was asked for."""
    asked = []

    def load_dataset(name, configuration, *, split, streaming):
        asked.append((name, configuration, split, streaming))
        return ({"text": f"{'a' * (number + 1)} b"} for number in itertools.count())

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return asked


def test_data_sets_are_read_as_far_as_they_are_used(endless, tmp_path):
    options = (Words(), 2, "documents", "text")
    found, left = read_sequences(["some/set"], *options, None, 3)
    assert found.tolist() == [[1, 1], [2, 1], [3, 1]]
    assert left == []
    found, left = read_sequences(["some/set", "another"], *options, 2, 3)
    assert found.tolist() == [[1, 1], [2, 1]]
    assert left == ["another"]
    # What ends is read whole.
    (tmp_path / "a.jsonl").write_text('{"text": "one two"}\n' * 9)
    assert len(read_sequences([str(tmp_path)], *options, None, 3)[0]) == 9
    assert len(endless) == 2


def test_names_of_data_sets(endless):
    for source, expected in (
        ("own/er", ("own/er", None, "train", True)),
        ("own/er:test", ("own/er", None, "test", True)),
        ("own/er:en:test", ("own/er", "en", "test", True)),
        ("own/er:en:", ("own/er", "en", "train", True)),
    ):
        assert next(read_documents([source])) == "a b"
        assert endless[-1] == expected
    with pytest.raises(ConfigError, match="have no 'body' but text"):
        next(read_documents(["own/er"], "body"))


def test_order_of_data_is_a_permutation_of_each_epoch():
    epochs = [[sequence_index(e * 7 + i, 7, 5) for i in range(7)] for e in range(3)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1]
