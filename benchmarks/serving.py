# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Throughput against latency: `vllm bench serve` against `vllm serve`, stock and ours in turns.

For each number of users at once, vLLM's own client sends random prompts, each user one after the
other, and reports time to the first token (TTFT), time per further token (TPOT) and tokens per
second. Meanwhile this program reads the server's gauges: requests running, blocks held,
preemptions. All arms have the same bytes of KV cache.

A point is one pair of concurrency and arm; rounds repeat the points with other prompts, the arms
in turns, one server at a time.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import arms, harness, tables
from benchmarks.results import Recorder
from benchmarks.servers import SERVED, Watch, add_options, in_turns, server_of
from vllm_sparse.demo.server import ServerError

if TYPE_CHECKING:
    import argparse

    from vllm_sparse.demo.server import Server

QUICK = {
    **{"context": 2048, "output": 16, "users": [1, 2], "prompts": 2, "rounds": 1},
    "server_arg": ["--enforce-eager"],
}
# What is kept of vLLM's result: of all requests, and of each kind of latency.
TOTALS = ("completed", "failed", "duration", "output_throughput", "total_token_throughput")
LATENCIES = ("ttft", "tpot", "itl")
TIMEOUT_S = 3600


class ClientError(RuntimeError):
    """`vllm bench serve` failed; the message ends with the end of what it printed."""


def point(server: Server, model: Path, users: int, seed: int, options: Any) -> dict[str, Any]:
    """Runs vLLM's client once and returns what it and the server's gauges say.

    Args:
        server: Started.
        model: Folder of the model, for the client's tokenizer.
        users: Requests at once.
        seed: Of the prompts.
        options: Of the command line.

    Raises:
        ClientError: The client failed, or requests did.
    """
    count = max(users * options.prompts, 2)
    with tempfile.TemporaryDirectory(prefix="vllm-sparse-") as folder, Watch(server) as watch:
        file = Path(folder, "result.json")
        command = [
            *(str(Path(sys.executable).with_name("vllm")), "bench", "serve"),
            *("--base-url", server.url, "--model", SERVED, "--tokenizer", str(model)),
            *("--max-concurrency", str(users), "--num-prompts", str(count), "--seed", str(seed)),
            *("--ignore-eos", "--percentile-metrics", ",".join(LATENCIES)),
            *("--metric-percentiles", "50,99", "--disable-tqdm", "--temperature", "0"),
            *("--save-result", "--result-dir", folder, "--result-filename", file.name),
            *("--dataset-name", "random"),
            *("--random-input-len", str(options.context - options.output)),
            *("--random-output-len", str(options.output)),
        ]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S
        )
        if done.returncode or not file.exists():
            raise ClientError(f"vllm bench serve failed:\n{(done.stdout + done.stderr)[-3000:]}")
        found = json.loads(file.read_text())
    if found["failed"]:
        raise ClientError(f"{found['failed']} of {count} requests failed:\n{server.log_tail()}")
    return {"requests": count, **_kept(found), **watch.found()}


def _kept(found: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds, tokens per second and seconds of vLLM's result."""
    latencies = {
        f"{kind}_ms": {part: found[f"{part}_{kind}_ms"] for part in ("mean", "p50", "p99")}
        for kind in LATENCIES
    }
    return {**{name: found[name] for name in TOTALS}, **latencies}


def run(options: argparse.Namespace, chosen: list[arms.Arm], record: Recorder) -> None:
    """Serves each arm in each round and adds its points to the file."""
    model = harness.resolve_model(options.model)
    rows = record.body["points"]
    with tempfile.TemporaryDirectory(prefix="vllm-sparse-") as folder:
        for number, arm in in_turns(chosen, options.rounds):
            log = Path(folder, f"{arm.name}.log")
            with server_of(
                *(arm, model, options.context, options.pool_tokens, log),
                *("--max-num-seqs", str(max(options.users)), *options.server_arg),
            ) as server:
                for users in options.users:
                    found = point(server, model, users, 1000 * number + users, options)
                    rows.append({"arm": arm.name, "round": number, "users": users, **found})
                    record.save()
                    harness.progress(
                        f"{arm.name}, {users} users: {found['output_throughput']:.1f} tokens/s,"
                        f" TPOT {found['tpot_ms']['p50']:.0f} ms"
                    )


def points(result: dict[str, Any]) -> str:
    """A table with a row per number of users and arm: medians of rounds."""
    columns: tables.Columns = {
        "users": "users",
        "arm": "arm",
        "tokens/s": "{output_throughput:.1f}",
        "TTFT p50 / p99, s": "{ttft[0]:.1f} / {ttft[1]:.1f}",
        "TPOT p50 / p99, ms": "{tpot[0]:.0f} / {tpot[1]:.0f}",
        "between two tokens p50, ms": "{itl:.0f}",
        "running at most": "peak_running",
        "blocks at most": "peak_blocks",
        "preemptions": "preemptions",
    }
    return tables.table(medians(result["points"]), columns)


def render(result: dict[str, Any]) -> str:
    """What was served, and :func:`points`."""
    head = (
        f"{result['model']}, {result['context'] - result['output']} + {result['output']} tokens, "
        f"a pool of {result['pool_tokens']} tokens (stock's), medians of rounds"
    )
    return f"{head}:\n\n{points(result)}"


def medians(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per users and arm, in the order of their first appearance by users.

    Args:
        points: Of a result file.
    """
    rows = []
    for users, arm in sorted({(p["users"], p["arm"]): None for p in points}, key=lambda k: k[0]):
        same = [p for p in points if (p["users"], p["arm"]) == (users, arm)]

        def middle(*keys: str, same: list = same) -> float:
            return statistics.median(reduce(getitem, keys, point) for point in same)

        totals = ("output_throughput", "peak_running", "peak_blocks", "preemptions")
        rows.append({
            "users": users, "arm": arm, "itl": middle("itl_ms", "p50"),
            "ttft": [1e-3 * middle("ttft_ms", part) for part in ("p50", "p99")],
            "tpot": [middle("tpot_ms", part) for part in ("p50", "p99")],
            **{name: middle(name) for name in totals},
        })  # fmt: skip
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Command line entry point."""
    parser = harness.parser("serving", __doc__, "2,048 tokens, 1 and 2 users, eager")
    harness.add_model(parser, "smollm2")
    parser.add_argument("--context", type=int, default=8192, help="prompt and reply, tokens")
    parser.add_argument("--output", type=int, default=128, help="tokens of a reply")
    parser.add_argument("--users", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--prompts", type=int, default=3, help="of each user")
    parser.add_argument("--rounds", type=int, default=2)
    add_options(parser, "four whole requests")
    options = harness.parse(parser, arguments, QUICK)
    options.pool_tokens = options.pool_tokens or 4 * options.context
    chosen = arms.parse_arms(parser, options, baseline=True)
    body = {
        "model": options.model, "context": options.context, "output": options.output,
        "pool_tokens": options.pool_tokens,
        "settings": {arm.name: arm.settings for arm in chosen}, "points": [],
    }  # fmt: skip
    with Recorder(options.out, "serving", body) as record:
        try:
            run(options, chosen, record)
        except (ServerError, ClientError) as error:
            sys.exit(f"benchmarks.serving: {error}")


if __name__ == "__main__":
    main()
