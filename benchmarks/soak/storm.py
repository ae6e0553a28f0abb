# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""One round: a storm of requests, then calm, then every answer again alone."""

from __future__ import annotations

import json
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from benchmarks.soak import judge, traffic, watch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benchmarks.soak.client import Answer, Client
    from benchmarks.soak.traffic import Ask

CALM_S = 60  # for requests that nobody waits for any more
_GAUGES = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")


@dataclass
class Findings:
    """What happened.

    Attributes:
        counts: Of requests and what became of them.
        faults: What must not be, in words.
        alone: What each prompt got alone.
    """

    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    alone: dict[tuple[int, ...], Answer] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)
    largest_gap: float = 0.0


@dataclass(frozen=True)
class Target:
    """A running server.

    Attributes:
        client: Talks to it.
        metrics: Reads its metrics, summed over labels.
        longest: Most tokens of a request.
    """

    client: Client
    metrics: Callable[[], dict[str, float]]
    longest: int

    def look(self) -> dict[str, Any]:
        """Returns what :meth:`.probe.Probe.soak_look` sees."""
        status, text = self.client.post("/collective_rpc", {"method": "soak_look"})
        if status != 200:
            raise RuntimeError(f"the probe does not answer: {status} {text}")
        found: dict[str, Any] = json.loads(text)["results"][0]
        return found

    def forget(self) -> bool:
        """Empties the prefix cache; vLLM does so only if every block is free."""
        status, text = self.client.post("/reset_prefix_cache")
        return status == 200 and json.loads(text)["success"]

    def comes_free(self) -> bool:
        """Whether every block is free soon: who left early may have been on the way in."""
        return watch.until(self.forget, CALM_S)

    def is_calm(self) -> bool:
        """Whether nothing runs, nothing waits and no block is held, now and a moment later."""
        for _ in range(2):  # who left before the first token may still be on the way in
            found = self.metrics()
            if any(found[f"vllm:{name}"] for name in _GAUGES):
                return False
            time.sleep(0.3)
        return True


def round_of(target: Target, asks: Sequence[Ask], at_once: int, findings: Findings) -> None:
    """Runs a round and notes what it finds.

    Args:
        target: The server, calm.
        asks: Requests.
        at_once: Clients.
        findings: Is added to.
    """
    with ThreadPoolExecutor(1) as aside:
        refusals = aside.submit(_refusals, target)
        answers = target.client.complete_all(asks, at_once)
    findings.faults += refusals.result()
    faults, counts = findings.faults, findings.counts
    for ask, answer in zip(asks, answers, strict=True):
        counts["requests"] += 1
        counts["hung up"] += answer.hung_up
        counts["samples"] += ask.samples
        counts["tokens"] += sum(map(len, answer.tokens))
        counts["longest prompt"] = max(counts["longest prompt"], len(ask.prompt))
        if answer.error:
            faults.append(f"a prompt of {len(ask.prompt)} tokens failed: {answer.error}")
    counts["refused"] += len(traffic.nonsense(target.longest))
    if calms_down(target, faults):
        _compare(target, asks, answers, findings)
        faults += left_in_worker(target)


def calms_down(target: Target, faults: list[str]) -> bool:
    """Whether nothing runs and nothing is held after a while; else that is a fault."""
    if calm := watch.until(target.is_calm, CALM_S):
        return calm
    faults.append(f"not calm after {CALM_S} s: {target.metrics()}")
    return False


def left_in_worker(target: Target) -> list[str]:
    """What is wrong with what a calm server's worker holds."""
    look = target.look()
    faults = [look["broken"]] * bool(look["broken"])
    if look["requests"] > 1:  # the last one leaves with the next step
        faults.append(f"the worker still knows {look['requests']} requests")
    return faults


def _refusals(target: Target) -> list[str]:
    """Returns what was not refused as it should be."""
    faults = []
    for part in traffic.nonsense(target.longest):
        status, text = target.client.status_of(part)
        if not 400 <= status < 500:
            faults.append(f"{str(part)[:60]} gave HTTP {status}: {text[:200]}")
    return faults


def _compare(
    target: Target, asks: Sequence[Ask], answers: Sequence[Answer], findings: Findings
) -> None:
    """Asks for everything again, one at a time with a cold cache."""
    longest: dict[tuple[int, ...], Ask] = {}
    for ask, answer in zip(asks, answers, strict=True):
        if any(answer.tokens) and ask.max_tokens >= longest.get(ask.prompt, ask).max_tokens:
            longest[ask.prompt] = ask._replace(samples=1, hang_up_after=None)
    for ask in longest.values():
        if not target.comes_free():
            findings.faults.append("blocks are held though nothing runs")
        alone = findings.alone[ask.prompt] = target.client.complete(ask)
        if alone.error:
            findings.faults.append(f"alone, it failed: {alone.error}")
        findings.counts["alone"] += 1
    for ask, answer in zip(asks, answers, strict=True):
        if not any(answer.tokens):
            continue
        alone = findings.alone[ask.prompt]
        for tokens, logprobs in zip(answer.tokens, answer.logprobs, strict=True):
            note(findings, ask, (tokens, logprobs), alone, "alone")


def note(
    findings: Findings,
    ask: Ask,
    got: tuple[Sequence[int], Sequence[float]],
    expected: Answer,
    where: str,
) -> None:
    """Compares an answer with what the prompt got elsewhere."""
    findings.counts[f"compared with {where}"] += 1
    logprobs = zip(got[1], expected.logprobs[0], strict=False)
    found = judge.difference(*got, expected.tokens[0], expected.logprobs[0])
    if found is None:
        gaps = [abs(one - other) for one, other in logprobs]
        findings.largest_gap = max([findings.largest_gap, *gaps])
        return
    if found.tie:
        findings.counts["ties"] += 1
        return
    findings.counts["differences"] += 1
    findings.faults.append(
        f"a prompt of {len(ask.prompt)} tokens got another answer than {where}, from token "
        f"{found.at} of {len(got[0])} on (log-probabilities {found.gap:.2g} apart)"
    )
