# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The demo: one question about a long document, asked of stock vLLM and of one of our backends."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_sparse.demo import document
from vllm_sparse.demo.models import ModelUnavailableError, fetch
from vllm_sparse.demo.server import Server, ServerError
from vllm_sparse.registry import entries

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from openai import OpenAI

DEFAULT_MODEL = "smollm2-135m-instruct"
PRESETS = {name: entry.preset for name, entry in entries().items() if entry.preset}
DECODE_TOKENS = 64
# Decode steps after which the KV cache is looked at; by then RocketKV has freed its blocks.
SAMPLED_STEPS = (16, 32, 48)
DECODE_ROWS = "vllm:sparse_decode_rows_total"
POOL_MIB = 1024

Message = dict[str, str]


@dataclass
class Outcome:
    """What one server did.

    Attributes:
        answers: One per fact, in the order of `document.FACTS`.
        ttft_seconds: Time to the first token of the first, uncached question.
        kv_blocks: Most blocks of vLLM's pool seen in use while decoding.
        device_kv_mib: The memory of these blocks; with SPARDA, whose blocks are on the host, that
            of the frames and compressed keys in use.
        counters: The plugin's metrics at the end.
    """

    name: str
    answers: list[str] = field(default_factory=list)
    prompt_tokens: int = 0
    ttft_seconds: float = 0.0
    decode_tokens_per_second: float = 0.0
    kv_blocks: int = 0
    device_kv_mib: float = 0.0
    counters: dict[str, float] = field(default_factory=dict)


def add_command(subparsers: Any) -> None:
    """Adds ``vllm-sparse demo``."""
    parser = subparsers.add_parser(
        "demo",
        help="compare stock vLLM and a sparse backend on a long document",
        description="Serves a small model twice, stock and sparse, and compares the two.",
    )
    parser.add_argument(
        "--backend",
        type=str.upper,
        choices=list(PRESETS),
        default=next(iter(PRESETS)),
        help="the sparse backend (default: %(default)s)",
    )
    parser.add_argument(
        "--model", metavar="PATH", help=f"model directory (default: download {DEFAULT_MODEL})"
    )
    parser.add_argument(
        "--config",
        metavar="NAME",
        help="vllm-sparse preset, or path of a YAML file (default: the demo model's)",
    )
    parser.add_argument(
        "--keep-logs", metavar="DIR", type=Path, help="write the servers' logs to DIR"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the demo; returns the exit status."""
    try:
        if arguments.model is None:
            print(f"Model: {DEFAULT_MODEL} (downloaded once, about 93 MB)", flush=True)
        model = arguments.model or str(fetch(DEFAULT_MODEL))
        with tempfile.TemporaryDirectory(prefix="vllm-sparse-demo-") as scratch:
            log_dir = arguments.keep_logs or Path(scratch)
            log_dir.mkdir(parents=True, exist_ok=True)
            stock = measure("stock vLLM", model, [], log_dir / "stock.log")
            name = arguments.backend
            options = sparse_options(name, arguments.config or PRESETS[name])
            sparse = measure(name, model, options, log_dir / f"{name.lower()}.log")
    except (ModelUnavailableError, ServerError) as error:
        print(f"\nThe demo failed: {error}", file=sys.stderr)
        return 1
    print("\n" + report(stock, sparse))
    problems = list(find_problems(sparse))
    for problem in problems:
        print(f"FAILED: {problem}", file=sys.stderr)
    return 1 if problems else 0


def sparse_options(backend: str, config: str) -> list[str]:
    """Returns the options of ``vllm serve`` that select a backend and its settings."""
    settings = json.dumps({"vllm_sparse": {"config": config}})
    return ["--attention-backend", backend, "--additional-config", settings]


def measure(name: str, model: str, options: list[str], log_path: Path) -> Outcome:
    """Starts a server, puts the questions to it and stops it."""
    from openai import OpenAI, OpenAIError

    common = [
        *(model, "--served-model-name", "demo", "--dtype", "bfloat16"),
        *("--max-model-len", "8192", "--max-num-seqs", "4"),
        *("--kv-cache-memory-bytes", str(POOL_MIB << 20)),
        # Compiling takes longer than these few requests.
        "--enforce-eager",
    ]
    print(f"\n{name}: starting the server ...", flush=True)
    began = time.monotonic()
    with Server([*common, *options], log_path) as server:
        print(f"{name}: ready after {time.monotonic() - began:.0f} s", flush=True)
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=300, max_retries=0)
        try:
            return _interview(name, server, client)
        except (OpenAIError, OSError) as error:
            raise ServerError(f"a request failed: {error}\n{server.log_tail()}") from error


def _interview(name: str, server: Server, client: OpenAI) -> Outcome:
    outcome = Outcome(name)
    messages: list[Message] = []
    for fact in document.FACTS:
        question = fact.question if messages else document.first_message(fact.question)
        messages.append({"role": "user", "content": question})
        reply = Stream(client, messages, max_tokens=32)
        answer = "".join(reply).strip()
        if not outcome.answers:
            outcome.ttft_seconds = reply.ttft_seconds
            outcome.prompt_tokens = reply.prompt_tokens
            print(f"{name}: read {reply.prompt_tokens} tokens in {reply.ttft_seconds:.1f} s")
        print(f"{name}: {fact.question} -> {answer}", flush=True)
        outcome.answers.append(answer)
        messages.append({"role": "assistant", "content": answer})

    task: Message = {"role": "user", "content": document.first_message(document.SUMMARY_TASK)}
    timed = Stream(client, [task], max_tokens=DECODE_TOKENS, ignore_eos=True)
    num_blocks = server.num_blocks()
    for step, _ in enumerate(timed):
        if step in SAMPLED_STEPS:
            metrics = server.metrics()
            used = metrics["vllm:kv_cache_usage_perc"]
            outcome.kv_blocks = max(outcome.kv_blocks, round(used * num_blocks))
            outcome.device_kv_mib = max(outcome.device_kv_mib, device_kv_mib(metrics, used))
    outcome.decode_tokens_per_second = timed.decode_tokens_per_second
    print(f"{name}: decoded {outcome.decode_tokens_per_second:.1f} tokens/s", flush=True)
    outcome.counters = {
        metric: value
        for metric, value in server.metrics().items()
        if metric.startswith("vllm:sparse_") and not metric.endswith("_created")
    }
    return outcome


def device_kv_mib(metrics: dict[str, float], used: float) -> float:
    """KV memory in use on the device.

    Args:
        metrics: Of the server.
        used: Share of vLLM's pool in use.
    """
    frames = metrics.get("vllm:sparse_slab_frames")
    if frames is None:
        return used * POOL_MIB
    slab = metrics["vllm:sparse_slab_bytes"] * metrics["vllm:sparse_slab_frames_in_use"] / frames
    # One key for every sixteen tokens' keys and values.
    compressed = used * metrics["vllm:sparse_host_pool_bytes"] / 32
    return (slab + compressed) / 2**20


class Stream:
    """A streamed chat completion: iterate over its text, then read what it took.

    Args:
        client: The server's client.
        messages: The conversation.
        max_tokens: Length of the answer.
        ignore_eos: Decode ``max_tokens`` in any case.
    """

    def __init__(
        self, client: OpenAI, messages: list[Message], max_tokens: int, ignore_eos: bool = False
    ) -> None:
        self._client = client
        self._request: dict[str, Any] = {
            "model": "demo",
            "messages": messages,
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "extra_body": {"ignore_eos": ignore_eos},
        }
        self.prompt_tokens = 0
        self.ttft_seconds = 0.0
        self.decode_tokens_per_second = 0.0

    def __iter__(self) -> Iterator[str]:
        began = time.monotonic()
        first: float | None = None
        for chunk in self._client.chat.completions.create(**self._request):
            if chunk.choices:
                last = time.monotonic()
                if text := chunk.choices[0].delta.content:
                    first = first or last
                    yield text
            if chunk.usage is not None and first is not None:
                self.prompt_tokens = chunk.usage.prompt_tokens
                self.ttft_seconds = first - began
                steps = chunk.usage.completion_tokens - 1
                self.decode_tokens_per_second = steps / (last - first) if steps else 0.0


def report(stock: Outcome, sparse: Outcome) -> str:
    """Returns the table that compares both servers."""
    rows: list[tuple[str, ...]] = [("", stock.name, sparse.name, "ratio")]
    for fact, dense_answer, sparse_answer in zip(
        document.FACTS, stock.answers, sparse.answers, strict=True
    ):
        rows.append((f'says "{fact.answer}"', *_verdicts(fact, dense_answer, sparse_answer), ""))
    rows += [
        _row("time to first token, s", stock.ttft_seconds, sparse.ttft_seconds, ".1f"),
        _row("KV blocks held while decoding", stock.kv_blocks, sparse.kv_blocks, "d"),
        _row("their memory on the device, MiB", stock.device_kv_mib, sparse.device_kv_mib, ".0f"),
        _row(
            "decode tokens/s",
            stock.decode_tokens_per_second,
            sparse.decode_tokens_per_second,
            ".1f",
        ),
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [f"A document of {sparse.prompt_tokens} tokens, {DECODE_TOKENS} decoded tokens:", ""]
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    lines += ["", "Counters of the plugin:"]
    counted = sorted((name, value) for name, value in sparse.counters.items() if value)
    lines += [f"  {name} {value:.0f}" for name, value in counted]
    return "\n".join(lines)


def _verdicts(fact: document.Fact, *answers: str) -> tuple[str, ...]:
    return tuple("yes" if fact.answer in answer else "no" for answer in answers)


def _row(label: str, dense: float, sparse: float, form: str) -> tuple[str, str, str, str]:
    ratio = f"{sparse / dense:.2f}" if dense else "-"
    return (label, format(dense, form), format(sparse, form), ratio)


def find_problems(sparse: Outcome) -> Iterator[str]:
    """Yields what would make the demo a failure."""
    fact = document.FACTS[0]
    if fact.answer not in sparse.answers[0]:
        yield f"{sparse.name} answered {sparse.answers[0]!r}, which lacks {fact.answer!r}"
    if not sparse.counters.get(DECODE_ROWS):
        yield f"the server did not use the backend: {DECODE_ROWS} is absent or zero"
