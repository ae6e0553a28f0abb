# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""A small ``vllm serve``, and a tokenizer for the random models that it serves."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from support.engine import BLOCK_SIZE
from vllm_sparse.demo import server

if TYPE_CHECKING:
    from pathlib import Path


def add_tokenizer(folder: Path, first: str = "") -> None:
    """Words ``w0`` to ``w1023`` for a random model, which has no tokenizer of its own.

    Args:
        folder: Of the model.
        first: Characters that take the place of the words from ``w1`` on, the first of which ends a
            text; texts are then written without blanks.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = [f"w{i}" for i in range(1024)]
    names[1 : 1 + len(first)] = first
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if first:
        words.decoder = decoders.Fuse()
    ends = {"eos_token": first[0]} if first else {}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", **ends)
    tokenizer.chat_template = "{% for turn in messages %}{{ turn['content'] }} {% endfor %}"
    tokenizer.save_pretrained(folder)


class Server(server.Server):
    """Healthy within a ``with`` block.

    Args:
        model: Checkpoint folder.
        log: File for what it prints.
        *arguments: Further ones of the command.
        env: Additional environment.
    """

    def __init__(
        self, model: Path, log: Path, *arguments: str, env: dict[str, str] | None = None
    ) -> None:
        self.log = log
        command = [
            str(model), "--served-model-name", "m", "--dtype", "float32", "--enforce-eager",
            "--max-model-len", "1024", "--max-num-seqs", "8", "--kv-cache-memory-bytes",
            str(64 << 20), "--block-size", str(BLOCK_SIZE), *arguments,
        ]  # fmt: skip
        common = {"VLLM_CPU_CI_ENV": "1", "VLLM_LOG_STATS_INTERVAL": "0.5"}
        super().__init__(command, log, 900, {**common, **(env or {})})

    def metrics(self) -> dict[str, float]:
        """Values summed over labels, but for ``reason``, which follows the name behind a slash."""
        totals: Counter[str] = Counter()
        for name, samples in self._samples().items():
            for labels, value in samples:
                totals["/".join(filter(None, (name, labels.get("reason"))))] += value
        return totals
