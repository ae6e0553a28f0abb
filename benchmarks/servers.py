# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""`vllm serve` for one arm of a comparison, and what its gauges say while it works."""

from __future__ import annotations

import json
import threading
from typing import TYPE_CHECKING, Any

from benchmarks import arms, harness
from vllm_sparse.demo.server import Server

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator
    from pathlib import Path
    from types import TracebackType

    from benchmarks.arms import Arm

SERVED = "model"  # its name to clients
RUNNING, WAITING = "vllm:num_requests_running", "vllm:num_requests_waiting"
USAGE = "vllm:kv_cache_usage_perc"
PREEMPTIONS = "vllm:num_preemptions_total"
HITS, LOOKED_UP = "vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total"


def server_of(
    arm: Arm, model: Path, context: int, pool_tokens: int, log: Path, *further: str
) -> Server:
    """A server of an arm, not started yet.

    Args:
        arm: The arm.
        model: Folder of the model.
        context: ``--max-model-len``.
        pool_tokens: Tokens that stock vLLM's pool holds; all arms get its bytes.
        log: Receives what the server prints.
        *further: Options for all arms.
    """
    shared = harness.engine_args(model, context, pool_tokens)
    own = arm.engine_args(shared)
    options = [
        *(str(model), "--served-model-name", SERVED, "--dtype", "bfloat16"),
        *("--max-model-len", str(context)),
        *("--kv-cache-memory-bytes", str(shared["kv_cache_memory_bytes"])),
    ]
    for name, value in own.items():
        text = value if isinstance(value, str) else json.dumps(value)
        options += [f"--{name.replace('_', '-')}", text]
    return Server([*options, *further], log, environment=harness.ALIKE)


def add_options(parser: argparse.ArgumentParser, default_pool: str) -> None:
    """Adds what programs that start servers have in common.

    Args:
        parser: A benchmark's.
        default_pool: In words, what stock's pool holds unless told.
    """
    parser.add_argument(
        "--pool-tokens", type=int, help=f"in stock's pool (default: {default_pool})"
    )
    parser.add_argument(
        "--server-arg", nargs="+", default=[], metavar="OPTION", help="of vllm serve, for all arms"
    )
    arms.add_options(parser, "dense,rocketkv-512")


def in_turns(chosen: list[Arm], rounds: int) -> Iterator[tuple[int, Arm]]:
    """Every arm in every round, in alternating order; yields round and arm."""
    for number in range(rounds):
        for arm in harness.alternating(chosen, number):
            yield number, arm


class Watch:
    """Looks at a server's gauges until the end of a ``with`` block.

    Args:
        server: Started.
        period: Seconds between looks.
    """

    def __init__(self, server: Server, period: float = 0.5) -> None:
        self._server, self._period = server, period
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._peaks = {RUNNING: 0.0, WAITING: 0.0, USAGE: 0.0}
        self._before: dict[str, float] = {}

    def __enter__(self) -> Watch:
        self._before = self._server.metrics()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ended.wait(self._period):
            now = self._server.metrics()
            for name, peak in self._peaks.items():
                self._peaks[name] = max(peak, now.get(name, 0.0))

    def found(self) -> dict[str, Any]:
        """Peaks of the gauges and growth of the counters.

        Peaks are of what was looked at: a peak shorter than the period may be missed.
        """
        after = self._server.metrics()
        grown = {
            name: after.get(name, 0.0) - self._before.get(name, 0.0)
            for name in (PREEMPTIONS, HITS, LOOKED_UP)
        }
        return {
            "peak_running": int(self._peaks[RUNNING]),
            "peak_waiting": int(self._peaks[WAITING]),
            "peak_blocks": round(self._peaks[USAGE] * (self._server.num_blocks() - 1)),
            "preemptions": int(grown[PREEMPTIONS]),
            "cached_tokens": int(grown[HITS]),
            "looked_up_tokens": int(grown[LOOKED_UP]),
        }
