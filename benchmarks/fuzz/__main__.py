# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Sends a real `vllm serve` requests that hypothesis generates, for as long as it is told to.

The server may answer them or refuse them as the client's mistake, but never with HTTP 5xx, and it
may not die. Beside them, and afterwards, greedy requests must get what they got at the start; then
no block may be held. What fails is made small and sent to stock vLLM, too: where that fails as
well, it is counted but no fault. Exit status 1: a fault, which the JSON has.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import harness, results
from benchmarks.fuzz import hunt
from benchmarks.soak import checkpoint, serving, storm
from benchmarks.soak.client import Client
from benchmarks.soak.traffic import VOCAB, Ask

if TYPE_CHECKING:
    from collections.abc import Iterator

_LONGEST = 1024
_PRIORITIES = ("--scheduling-policy", "priority")  # others are refused
_PATIENCE_S = 120
_PROBES = (12, 200, 500)  # tokens: dense, and sparse


def main(arguments: list[str] | None = None) -> int:
    """Command line entry point; returns the exit status."""
    parser = harness.parser("fuzz", __doc__)
    parser.set_defaults(out=None)
    parser.add_argument("--backend", default="ROCKETKV", choices=serving.BACKENDS)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--settings", type=json.loads, default={}, help="JSON, beside the chosen")
    options = harness.parse(parser, arguments)
    options.out = options.out or results.FOLDER / f"fuzz-{options.backend.lower()}.json"
    subject = serving.subject(options.backend, _LONGEST, **options.settings)
    findings = hunt.Findings()
    body: dict[str, Any] = {
        "backend": subject.backend, "settings": subject.settings, "minutes": options.minutes,
        "seed": options.seed,
    }  # fmt: skip
    with (
        results.Recorder(options.out, "fuzz", body) as record,
        tempfile.TemporaryDirectory() as folder,
    ):
        model = checkpoint.write(Path(folder) / "model", _LONGEST)
        with serving.server(model, Path(folder) / "log", subject, *_PRIORITIES) as server:
            target = storm.Target(
                Client(server.url, serving.NAME, _PATIENCE_S), server.metrics, _LONGEST
            )
            _fuzz(target, options.minutes, options.seed, findings)
        stock = _those_of_stock(model, Path(folder) / "stock.log", subject, findings)
        ours = {said: batch for said, batch in findings.failures.items() if said not in stock}
        body |= {
            "counts": dict(findings.counts),
            "faults": [*findings.faults, *(f"{said} to {batch}" for said, batch in ours.items())],
            "stock_fails_too": [f"{said} to {findings.failures[said]}" for said in stock],
        }
        record.save()
    print(json.dumps(body, indent=1))
    return 1 if body["faults"] else 0


def _fuzz(target: storm.Target, minutes: float, seed: int, findings: hunt.Findings) -> None:
    asks = [Ask(tuple((5 + 11 * i) % VOCAB for i in range(length)), 16) for length in _PROBES]
    probes = {ask: target.client.complete(ask) for ask in asks}
    end = time.monotonic() + 60 * minutes
    while time.monotonic() < end:
        try:
            hunt.hunt(target, probes, seed, findings, hunt.EXAMPLES)
        except hunt.Died:
            return
        hunt.settle(target, probes, findings)
        seed += 1
        harness.progress(f"{dict(findings.counts)}, {len(findings.failures)} failures")


def _those_of_stock(
    model: Path, log: Path, subject: serving.Subject, findings: hunt.Findings
) -> list[str]:
    """Which failures stock vLLM has as well."""

    @contextlib.contextmanager
    def start() -> Iterator[Client]:
        with serving.server(model, log, subject._replace(backend=""), *_PRIORITIES) as server:
            yield Client(server.url, serving.NAME, _PATIENCE_S)

    return hunt.shared(findings.failures, start)


if __name__ == "__main__":
    sys.exit(main())
