# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What every benchmark shares: models, engine arguments, options, statistics."""

from __future__ import annotations

import argparse
import datetime
import json
import signal
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from benchmarks import results

if TYPE_CHECKING:
    from collections.abc import Sequence

Side = TypeVar("Side")

MODEL_ALIASES = {"smollm2": "smollm2-135m-instruct", "qwen": "qwen2.5-coder-0.5b-instruct"}
BLOCK_TOKENS = 128  # vLLM's default block size on CPU
# Our cache asks for huge pages: so that a gain is not theirs, all arms' tensors lie on them.
ALIKE = {"THP_MEM_ALLOC_ENABLE": "1"}


def parser(name: str, about: str | None, quick: str = "") -> argparse.ArgumentParser:
    """The parser of a benchmark, with --out."""
    made = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=about)
    made.add_argument("--out", type=Path, default=results.FOLDER / f"{name}.json")
    if quick:
        made.add_argument("--quick", action="store_true", help=quick)
    return made


def parse(
    parser: argparse.ArgumentParser,
    arguments: list[str] | None,
    quick: dict[str, Any] | None = None,
    presets: dict[str, dict[str, Any]] | None = None,
) -> argparse.Namespace:
    """Parses, where --quick and --preset change what other options are unless given.

    Also makes the program end its workers when it is told to end.

    Args:
        parser: A benchmark's.
        arguments: The command line's unless given.
        quick: Defaults under --quick.
        presets: Defaults under each --preset.
    """
    exit_cleanly()
    first = parser.parse_args(arguments)
    if presets:
        parser.set_defaults(**presets.get(first.preset, {}))
    if quick and first.quick:
        parser.set_defaults(**quick)
    return parser.parse_args(arguments)


def add_model(parser: argparse.ArgumentParser, default: str) -> None:
    """Adds --model."""
    parser.add_argument("--model", default=default, help="name, alias (smollm2, qwen) or path")


def add_threads(parser: argparse.ArgumentParser) -> None:
    """Adds --threads, for programs that compute in this process."""
    parser.add_argument(
        "--threads", type=int, default=1, help="more are faster, but only on a quiet machine"
    )


def resolve_model(name: str) -> Path:
    """Returns the directory of a demo model (by name or alias) or of a model given as a path."""
    if Path(name).is_dir():
        return Path(name).absolute()  # workers may run in another folder
    from vllm_sparse.demo import models

    return models.fetch(MODEL_ALIASES.get(name, name))


def tokenizer_of(name: str) -> Any:
    """Returns the tokenizer of a model, as `resolve_model` finds it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(resolve_model(name))


def head_dim(config: dict[str, Any]) -> int:
    """Returns the size of a model's heads, which its config.json may leave to be derived."""
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def kv_bytes_per_token(model: Path) -> int:
    """Returns the bytes of KV cache that one token takes in bfloat16."""
    config = json.loads((model / "config.json").read_text())
    return 2 * 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * head_dim(config)


def engine_args(model: Path, max_model_len: int, pool_tokens: int, **overrides: Any) -> dict:
    """Returns the arguments of `LLM` that both sides of a comparison share."""
    pool_blocks = -(-pool_tokens // BLOCK_TOKENS) + 2
    return {
        "model": str(model), "dtype": "bfloat16", "max_model_len": max_model_len,
        "kv_cache_memory_bytes": pool_blocks * BLOCK_TOKENS * kv_bytes_per_token(model),
        "seed": 0, "disable_log_stats": False, **overrides,
    }  # fmt: skip


def summary(values: list[float]) -> dict[str, float]:
    """Returns median, quartiles, 99th percentile and extremes of a sample that is not empty."""
    if len(values) > 1:
        lower, _, upper = statistics.quantiles(values, n=4, method="inclusive")
        slowest = statistics.quantiles(values, n=100, method="inclusive")[-1]
    else:
        lower = upper = slowest = values[0]
    return {
        "median": statistics.median(values), "p25": lower, "p75": upper, "p99": slowest,
        "min": min(values), "max": max(values), "n": len(values),
    }  # fmt: skip


def mean_of(rows: list[dict], keys: tuple[str, ...]) -> dict[str, float]:
    """Returns the mean of each key over the rows."""
    return {key: sum(row[key] for row in rows) / len(rows) for key in keys}


def alternating(sides: Sequence[Side], number: int) -> Sequence[Side]:
    """The sides of a comparison in the order of a round: forwards and backwards by turns.

    Args:
        sides: Arms, or their workers.
        number: Of the round, or of the turn within it.
    """
    return sides if number % 2 == 0 else sides[::-1]


def exit_cleanly() -> None:
    """Makes SIGTERM end the program the way Ctrl-C does, so that workers are ended too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def progress(message: str) -> None:
    """Prints a line for whoever is watching."""
    print(f"[{datetime.datetime.now():%H:%M:%S}] {message}", file=sys.stderr, flush=True)
