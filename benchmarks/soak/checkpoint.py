# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""A small random model that a server can load, with a tokenizer, so that wrong ids are refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.gpu.shapes import save_random_llama
from benchmarks.soak.traffic import VOCAB

if TYPE_CHECKING:
    from pathlib import Path


def write(folder: Path, longest: int) -> Path:
    """Writes a checkpoint whose attention decides its tokens.

    Args:
        folder: Where; kept if it is there.
        longest: Most tokens of a request.
    """
    if not (folder / "config.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        save_random_llama(folder, vocab=VOCAB, max_position_embeddings=longest)
        add_tokenizer(folder)
    return folder


def add_tokenizer(folder: Path) -> None:
    """Writes a tokenizer whose words are ``w0``, ``w1`` and so on, one for each id."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)
