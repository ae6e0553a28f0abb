# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Soaks a real `vllm serve`: rounds of hard traffic, every answer checked alone, then kills.

The server is as small as its traffic can fill: requests are preempted, prefixes evicted, blocks
fetched, clients go away, and a third of what arrives is nonsense. In the end every block, host
byte, file and thread has to be back, and no answer may differ from what its prompt gets alone on
a cold cache, nor, where the settings read everything, from stock vLLM. Exit status 1: they do not.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import harness, results
from benchmarks.soak import checkpoint, crash, growth, serving, storm, traffic, watch
from benchmarks.soak.client import Client

if TYPE_CHECKING:
    import argparse

_STOCK_CHECKS = 24
_MOST_FAULTS = 20


def main(arguments: list[str] | None = None) -> int:
    """Command line entry point; returns the exit status."""
    parser = harness.parser("soak", __doc__)
    parser.set_defaults(out=None)
    parser.add_argument("--backend", default="ROCKETKV", choices=serving.BACKENDS)
    parser.add_argument("--minutes", type=float, default=10, help="of rounds; at least three run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest", type=int, default=8192, help="tokens of a request")
    parser.add_argument("--requests", type=int, default=24, help="in a round")
    parser.add_argument("--clients", type=int, default=16, help="at once")
    parser.add_argument("--settings", type=json.loads, default={}, help="JSON, beside the chosen")
    parser.add_argument("--no-kills", dest="kills", action="store_false")
    options = harness.parse(parser, arguments)
    options.out = options.out or results.FOLDER / f"soak-{options.backend.lower()}.json"
    subject = serving.subject(options.backend, options.longest, **options.settings)
    body: dict[str, Any] = {
        "backend": subject.backend, "settings": subject.settings, "longest": subject.longest,
        "blocks": subject.blocks, "minutes": options.minutes, "seed": options.seed,
    }  # fmt: skip
    with (
        results.Recorder(options.out, "soak", body) as record,
        tempfile.TemporaryDirectory() as folder,
    ):
        run = _Run(options, subject, Path(folder))
        for part in (run.soak, run.compare_with_stock, run.kill)[: 3 if options.kills else 2]:
            part()
            body |= run.report()
            record.save()
    print(json.dumps(body, indent=1))
    return 1 if body["faults"] else 0


class _Run:
    """The parts of a run, in order."""

    def __init__(self, options: argparse.Namespace, subject: serving.Subject, folder: Path) -> None:
        self._options, self._subject, self._findings = options, subject, storm.Findings()
        self._folder = folder
        self._model = checkpoint.write(folder / "model", subject.longest)
        self.held: dict[str, dict[str, watch.Held]] = {}

    def _server(self, name: str, subject: serving.Subject) -> serving.Server:
        return serving.server(self._model, self._folder / f"{name}.log", subject)

    def _target(self, server: serving.Server) -> storm.Target:
        return storm.Target(Client(server.url, serving.NAME), server.metrics, self._subject.longest)

    def report(self) -> dict[str, Any]:
        """What was found so far, for a result file."""
        found = self._findings
        return {
            "counts": dict(found.counts),
            "largest_gap": found.largest_gap,
            "seen_by_clients": sorted(found.seen),
            "held": {
                when: {role: then._asdict() for role, then in roles.items()}
                for when, roles in self.held.items()
            },
            "faults": found.faults[:_MOST_FAULTS],
            "number_of_faults": len(found.faults),
        }

    def soak(self) -> None:
        """Rounds until the time is over, and then what is held."""
        options, findings = self._options, self._findings
        with self._server("soak", self._subject) as server:
            target, begin, number = self._target(server), time.monotonic(), 0
            looks = []
            while number < 3 or time.monotonic() < begin + 60 * options.minutes:
                asks = traffic.plan(options.seed + number, options.requests, options.longest)
                storm.round_of(target, asks, options.clients, findings)
                number += 1
                if number == 2:  # by then every thread has been needed, every buffer made
                    self.held["after two rounds"] = watch.held(server.pid)
                    looks.append(target.look())
                counts = {key: findings.counts[key] for key in ("requests", "hung up", "ties")}
                harness.progress(f"round {number}: {counts}, {len(findings.faults)} faults")
            self.held["in the end"] = watch.held(server.pid)
            looks.append(target.look())
            metrics, files = target.metrics(), watch.files_of(server.pid)
        findings.counts["rounds"] = number
        findings.faults += [f"left behind: {path}" for path in watch.left_behind(files)]
        findings.faults += growth.of_processes(*self.held.values())
        findings.faults += growth.of_worker(*looks)
        for name in ("num_preemptions", "prefix_cache_hits"):
            findings.counts[name] = int(metrics[f"vllm:{name}_total"])
            if not findings.counts[name]:
                findings.faults.append(f"nothing was tested: {name} is 0")
        for name, value in metrics.items():
            if name.startswith("vllm:sparse_") and value:
                findings.counts[name.removeprefix("vllm:")] = int(value)
        if self._subject.backend == "SPARDA" and not metrics["vllm:sparse_frame_misses_total"]:
            findings.faults.append("nothing was tested: every block had a frame")

    def compare_with_stock(self) -> None:
        """Requests that are served densely, by stock vLLM."""
        limit = self._subject.dense_tokens
        chosen = [
            (prompt, alone)
            for prompt, alone in self._findings.alone.items()
            if len(prompt) + len(alone.tokens[0]) <= limit and not alone.error
        ][:_STOCK_CHECKS]
        stock = self._subject._replace(backend="")
        with self._server("stock", stock) as server:
            client = self._target(server).client
            for prompt, alone in chosen:
                ask = traffic.Ask(prompt, len(alone.tokens[0]))
                got = (alone.tokens[0], alone.logprobs[0])
                storm.note(self._findings, ask, got, client.complete(ask), "stock vLLM")
        if len(chosen) < _STOCK_CHECKS // 4:
            self._findings.faults.append(f"only {len(chosen)} requests to compare with stock vLLM")

    def kill(self) -> None:
        """Each process once; then a start that serves as before."""
        prompt, alone = next(iter(self._findings.alone.items()))
        ask = traffic.Ask(prompt, len(alone.tokens[0]))
        for victim in crash.VICTIMS:
            with self._server(f"kill-{victim}", self._subject) as server:
                target = self._target(server)
                got = target.client.complete(ask)
                answer = (got.tokens[0], got.logprobs[0])
                storm.note(self._findings, ask, answer, alone, "the restarted server")
                if got.error:
                    self._findings.faults.append(f"a restarted server fails: {got.error}")
                crash.kill_amid_answers(target, server.pid, victim, self._findings)
            harness.progress(f"killed the {victim}: {len(self._findings.faults)} faults")


if __name__ == "__main__":
    sys.exit(main())
