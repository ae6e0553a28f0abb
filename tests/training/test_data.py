# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Text to sequences."""

from __future__ import annotations

import pytest

from vllm_sparse.errors import ConfigError
from vllm_sparse.training.data import pack, read_documents, sequence_index


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


def test_sources(tmp_path):
    (tmp_path / "b.txt").write_text("plain")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": [1, 2]}\n')
    (tmp_path / "ignored.bin").write_bytes(b"\x00")
    assert list(read_documents([str(tmp_path)])) == ["one", [1, 2], "plain"]
    with pytest.raises(ConfigError, match="line 1: no JSON object with a key 'body'"):
        list(read_documents([str(tmp_path / "a.jsonl")], "body"))
    with pytest.raises(ConfigError, match="no file or folder"):
        list(read_documents(["no/such-dataset"]))


def test_order_of_data_is_a_permutation_of_each_epoch():
    epochs = [[sequence_index(e * 7 + i, 7, 5) for i in range(7)] for e in range(3)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1]
