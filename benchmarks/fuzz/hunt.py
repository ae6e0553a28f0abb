# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Sends generated requests, several at once, and makes those that a server fails on small."""

from __future__ import annotations

import http.client
import json
import re
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import hypothesis
from hypothesis import strategies as st

from benchmarks.fuzz import bodies
from benchmarks.soak import judge, storm

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from contextlib import AbstractContextManager

    from benchmarks.fuzz.bodies import Sent
    from benchmarks.soak.client import Answer, Client
    from benchmarks.soak.storm import Target
    from benchmarks.soak.traffic import Ask

AT_ONCE = 6
EXAMPLES = 40  # between two looks at what the server holds
DEATH = "the server died"
_TRIES = 3  # what a server dies of may depend on which requests meet in a step


class Died(BaseException):
    """The server is gone; no exception that a request could be made smaller for."""


class Fault(AssertionError):
    """An answer that must not be."""


class Answered(NamedTuple):
    """What became of a request.

    Attributes:
        status: Of HTTP, or of an error within a stream; 0 if the client left before.
        text: The beginning of what came.
    """

    status: int
    text: str


@dataclass
class Findings:
    """What happened.

    Attributes:
        counts: Requests by what became of them.
        failures: Requests that the server failed on, made small, by what it said.
        faults: What else must not be, in words.
    """

    counts: Counter[str] = field(default_factory=Counter)
    failures: dict[str, list[Sent]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)


def send(client: Client, sent: Sent) -> Answered:
    """Sends a request and reads its answer, or leaves.

    Raises:
        OSError: The connection was refused or broken.
    """
    with client.sent(sent.path, json.dumps(sent.body)) as connection:
        if sent.leave_after == 0:
            return Answered(0, "")
        response = connection.getresponse()
        lines = []
        while line := response.readline():
            lines.append(line.decode(errors="replace"))
            if len(lines) == sent.leave_after:
                break
        return Answered(_worst_status(response.status, lines), "".join(lines)[:2000])


def _worst_status(status: int, lines: Sequence[str]) -> int:
    """The status, or that of an error that came when the status had been sent."""
    codes = [status]
    for line in lines:
        if line.startswith("data: {") and '"error"' in line:
            error = json.loads(line[6:]).get("error") or {}
            codes.append(int(error.get("code") or 500))
    return max(codes)


def hunt(
    target: Target, probes: dict[Ask, Answer], seed: int, findings: Findings, examples: int
) -> None:
    """Sends some batches of generated requests beside requests whose answers are known.

    Args:
        target: The server.
        probes: Requests, and what they got alone at the start.
        seed: Of what is generated.
        findings: Is added to.
        examples: Batches.

    Raises:
        Died: The server does not answer any more; the findings have what it was asked last.
    """
    client = target.client
    last: list[Sent] = []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=examples, deadline=None, database=None, report_multiple_bugs=False,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
    )  # fmt: skip
    @hypothesis.given(
        st.lists(bodies.requests(client.model, target.longest), min_size=1, max_size=AT_ONCE),
        st.sampled_from(sorted(probes)),
    )
    def attempt(batch: list[Sent], probe: Ask) -> None:
        last[:] = batch
        with ThreadPoolExecutor(AT_ONCE + 1) as pool:
            beside = pool.submit(client.complete, probe)
            answers = list(pool.map(lambda sent: _outcome(client, sent, findings), batch))
        for answered in answers:
            if answered.status >= 500 and kind_of(answered) not in findings.failures:
                raise Fault(kind_of(answered))
        if said := _differs(beside.result(), probes[probe]):
            if not _is_healthy(client):
                raise Died
            raise Fault(f"beside it, a greedy request {said}")

    try:
        attempt()
    except Fault as fault:  # of the smallest batch that Hypothesis finds, which ran last
        findings.failures[str(fault)] = _smaller(client, list(last))
    except Died:
        findings.failures[DEATH] = list(last)
        raise


def settle(target: Target, probes: dict[Ask, Answer], findings: Findings) -> None:
    """Waits until nothing runs, and notes what is still held or what has changed."""
    if not storm.calms_down(target, findings.faults):
        return
    if not target.comes_free():
        findings.faults.append("blocks are held though nothing runs")
    for ask, expected in probes.items():
        if said := _differs(target.client.complete(ask), expected):
            findings.faults.append(f"afterwards a greedy request {said}")
    findings.faults += storm.left_in_worker(target)


def fails(client: Client, batch: Sequence[Sent]) -> bool:
    """Whether this server, too, fails on one of these requests, sent at once.

    Raises:
        Died: It does not answer any more.
    """
    with ThreadPoolExecutor(AT_ONCE) as pool:
        whole = [sent._replace(leave_after=None) for sent in batch]
        answers = list(pool.map(lambda sent: _outcome(client, sent, Findings()), whole))
    return any(answered.status >= 500 for answered in answers)


def shared(
    failures: Mapping[str, Sequence[Sent]], start: Callable[[], AbstractContextManager[Client]]
) -> list[str]:
    """Which failures another server has as well.

    Args:
        failures: By what the first one said.
        start: Starts the other; called anew when it has died.
    """
    found, left = [], list(failures)
    while left:
        with start() as client:
            try:
                while left:
                    said = left.pop()
                    if any(fails(client, failures[said]) for _ in range(_TRIES)):
                        found.append(said)
            except Died:
                found.append(said)
    return found


def _smaller(client: Client, batch: list[Sent]) -> list[Sent]:
    """A request that fails alone, without the parameters that it fails without, or the batch.

    To Hypothesis a batch is small if its choices are few and low, which needless ones may be.
    """
    try:
        for sent in batch:
            if not fails(client, [sent]):
                continue
            for key in tuple(sent.body) if isinstance(sent.body, dict) else ():
                body = {other: value for other, value in sent.body.items() if other != key}
                if fails(client, [sent._replace(body=body)]):
                    sent = sent._replace(body=body)
            return [sent]
    except Died:
        pass  # which whoever asks it next will find
    return batch


def kind_of(answered: Answered) -> str:
    """What a server said, without what is different every time."""
    return re.sub(r"[0-9a-f]{8,}|\d+", "#", f"HTTP {answered.status}: {answered.text[:300]}")


def _outcome(client: Client, sent: Sent, findings: Findings) -> Answered:
    try:
        answered = send(client, sent)
    except (OSError, http.client.HTTPException) as error:
        answered = Answered(599, f"{type(error).__name__}: {error}")
    if answered.status >= 500 and not _is_healthy(client):
        raise Died
    left = answered.status == 0 or sent.leave_after is not None
    findings.counts[f"{answered.status // 100}xx" if answered.status else "left at once"] += 1
    findings.counts["clients that left"] += left
    return answered


def _is_healthy(client: Client) -> bool:
    try:
        with urllib.request.urlopen(f"{client.url}/health", timeout=client.patience_s):
            return True
    except OSError:
        return False


def _differs(got: Answer, expected: Answer) -> str:
    """How an answer differs from what it was, in words; empty if it does not."""
    if got.error:
        return f"failed: {got.error}"
    found = judge.difference(
        got.tokens[0], got.logprobs[0], expected.tokens[0], expected.logprobs[0]
    )
    if found is None or found.tie:
        return ""
    return f"has another token {found.at} than at the start, {found.gap:.2g} apart"
