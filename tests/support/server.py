# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Starts ``vllm serve`` on a free port and reads its metrics."""

from __future__ import annotations

import contextlib
import os
import random
import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from support.engine import BLOCK_SIZE


def _free_port() -> int:
    """Below those that systems hand out, of which others could get it before the server has it."""
    for port in random.SystemRandom().sample(range(12_000, 30_000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


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


class Server:
    """A running ``vllm serve``.

    Args:
        model: Checkpoint folder.
        log: File for what it prints.
        *arguments: Further ones of the command.
        env: Additional environment.
    """

    def __init__(
        self, model: Path, log: Path, *arguments: str, env: dict[str, str] | None = None
    ) -> None:
        self.port, self.log = _free_port(), log
        self.url = f"http://127.0.0.1:{self.port}"
        command = [
            str(Path(sys.executable).with_name("vllm")), "serve", str(model), "--port",
            str(self.port), "--served-model-name", "m", "--dtype", "float32", "--enforce-eager",
            "--max-model-len", "1024", "--max-num-seqs", "8", "--kv-cache-memory-bytes",
            str(64 << 20), "--block-size", str(BLOCK_SIZE), *arguments,
        ]  # fmt: skip
        environment = {**os.environ, "VLLM_CPU_CI_ENV": "1", "VLLM_LOG_STATS_INTERVAL": "0.5"}
        environment.pop("OMP_NUM_THREADS", None)
        environment |= env or {}
        self.process = subprocess.Popen(
            command, stdout=log.open("w"), stderr=subprocess.STDOUT, env=environment,
            start_new_session=True,
        )  # fmt: skip

    def wait(self, seconds: float = 900) -> None:
        """Until it is healthy."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=2)
                return
            except OSError:
                time.sleep(1)
        raise AssertionError(f"server did not start:\n{self.log.read_text()[-4000:]}")

    def metrics(self) -> dict[str, float]:
        """Values summed over labels, but for ``reason``, which follows the name behind a slash."""
        text = urllib.request.urlopen(f"{self.url}/metrics", timeout=120).read().decode()
        rows = re.findall(r"^(vllm:\w+)(\{.*?\})? ([\d.e+-]+)$", text, re.MULTILINE)
        totals: dict[str, float] = {}
        for name, labels, value in rows:
            reason = re.search(r'reason="(\w+)"', labels)
            key = f"{name}/{reason[1]}" if reason else name
            totals[key] = totals.get(key, 0.0) + float(value)
        return totals

    def stop(self) -> None:
        """End it."""
        self.process.terminate()
        try:
            self.process.wait(120)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
