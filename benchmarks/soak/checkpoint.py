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
        from support.server import add_tokenizer  # as the random model, of the tests

        add_tokenizer(folder)
    return folder
