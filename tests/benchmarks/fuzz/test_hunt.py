# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The hunt against a made-up server, which fails where it is told to."""

from __future__ import annotations

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

pytest.importorskip("hypothesis")

import hypothesis

from benchmarks.fuzz import bodies, hunt
from benchmarks.soak.client import Client
from benchmarks.soak.storm import Target
from benchmarks.soak.traffic import Ask

PROBE = Ask((1, 2, 3), 2)
EVENT = {"choices": [{"index": 0, "token_ids": [7, 8], "logprobs": {"token_logprobs": [-1, -2]},
                      "finish_reason": "length"}]}  # fmt: skip


@contextlib.contextmanager
def served(fails, event=EVENT, dies=lambda body: False):
    """A server that answers every request alike, but for those that it fails on or dies of."""
    dead = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(503 if dead else 200)
            self.end_headers()

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            dead.extend([True] * dies(body))
            self.send_response(500 if dead or fails(body) else 200)
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(f"data: {json.dumps(event)}\n\ndata: [DONE]\n\n".encode())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield Target(Client(f"http://127.0.0.1:{server.server_port}", "m"), dict, 64)
    finally:
        server.shutdown()
        server.server_close()


def hunted(target, seeds, examples=40):
    findings = hunt.Findings()
    probes = {PROBE: target.client.complete(PROBE)}
    for seed in seeds:
        hunt.hunt(target, probes, seed, findings, examples)
        yield findings


def test_answers_and_refusals_are_no_faults():
    with served(lambda body: False) as target:
        *_, findings = hunted(target, range(2), 10)
    assert not findings.failures
    assert not findings.faults
    assert findings.counts["2xx"] > 10
    assert findings.counts["clients that left"] > 0


@pytest.fixture
def patient(monkeypatch):
    """Clients read to the end: whoever leaves reads another text, or comes when it is too late."""
    right = bodies.requests

    def patient_requests(*of):
        return right(*of).map(lambda sent: sent._replace(leave_after=None))

    monkeypatch.setattr(bodies, "requests", patient_requests)


def test_what_fails_is_made_small_and_found_once(patient):
    with served(lambda body: "echo" in body and not body["echo"]) as target:
        # One seed in ten has no such request, so no single one is relied on.
        hunts = hunted(target, range(30))
        found = next(findings for findings in hunts if findings.failures)
        assert len(next(hunts).failures) == 1
        ((said, batch),) = found.failures.items()
        assert hunt.fails(target.client, batch)
    with served(lambda body: False) as target:
        assert not hunt.fails(target.client, batch)
    assert said.startswith("HTTP #")
    ((_, body, _),) = batch
    assert not body["echo"]
    fixed = {"model", "max_tokens", "temperature", "prompt", "messages"}
    assert body.keys() - fixed <= {"echo", "vllm_xargs"}


def test_an_error_within_a_stream_counts():
    lines = ['data: {"error": {"code": 500, "message": "no"}}', "data: [DONE]"]
    assert hunt._worst_status(200, lines) == 500
    assert hunt._worst_status(200, ['data: {"error": {"code": 400}}']) == 400
    assert hunt._worst_status(404, []) == 404


def test_another_answer_to_a_greedy_request_is_a_fault():
    with served(lambda body: False) as target:
        known = {PROBE: target.client.complete(PROBE)}
    other = json.loads(json.dumps(EVENT))
    other["choices"][0]["token_ids"][1] = 9
    other["choices"][0]["logprobs"]["token_logprobs"][1] = -2.5
    findings = hunt.Findings()
    with served(lambda body: False, other) as target:
        hunt.hunt(target, known, 0, findings, 5)
    (said,) = findings.failures
    assert "another token 1 than at the start" in said


def test_a_server_that_is_gone_ends_it():
    with served(lambda body: False) as target:
        known = {PROBE: target.client.complete(PROBE)}
    findings = hunt.Findings()
    with pytest.raises(hunt.Died):
        hunt.hunt(target, known, 0, findings, 5)
    assert findings.failures.keys() == {hunt.DEATH}


def test_a_batch_that_a_server_dies_of_is_kept_as_it_was(patient):
    """As vLLM's does, the server answers for a while that its engine is dead."""
    sent = []

    def killer(body):
        if body.get("prompt") == list(PROBE.prompt):
            return False
        sent.append(json.dumps(body))  # a NaN is not equal to itself
        return len(sent) >= 40  # two may be added before either is counted

    findings = hunt.Findings()

    def hunts(target):
        known = {PROBE: target.client.complete(PROBE)}
        for seed in range(30):
            hunt.hunt(target, known, seed, findings, 40)

    with served(lambda body: False, dies=killer) as target, pytest.raises(hunt.Died):
        hunts(target)
    assert findings.failures.keys() == {hunt.DEATH}
    kept = [json.dumps(request.body) for request in findings.failures[hunt.DEATH]]
    assert sent[39] in kept


def test_what_another_server_dies_of_it_shares_and_the_rest_is_asked_of_a_new_one():
    one, two, three = ([sent_with(echo)] for echo in ("kills", "fails", "is served"))
    started = []

    @contextlib.contextmanager
    def start():
        started.append(1)
        with served(
            lambda body: body["echo"] == "fails", dies=lambda body: body["echo"] == "kills"
        ) as target:
            yield target.client

    for failures in (
        {hunt.DEATH: one, "HTTP 500": two, "HTTP 501": three},
        {"HTTP 501": three, "HTTP 500": two, hunt.DEATH: one},
    ):
        assert set(hunt.shared(failures, start)) == {hunt.DEATH, "HTTP 500"}
    assert len(started) == 3


def sent_with(echo):
    return bodies.Sent(bodies.COMPLETIONS, {"echo": echo}, None)


@pytest.mark.parametrize(
    "wanted",
    [
        lambda sent: sent.path == bodies.COMPLETIONS,
        lambda sent: sent.path == bodies.CHAT,
        lambda sent: "vllm_sparse.sparse" in extra(sent),
        lambda sent: "vllm_sparse.token_budget" in extra(sent),
        lambda sent: not is_json(sent.body),
        lambda sent: sent.leave_after is not None,
    ],
    ids=["completion", "chat", "sparse", "budget", "no JSON", "leaves"],
)
def test_bodies_are_right_and_wrong(wanted):
    settings = hypothesis.settings(
        max_examples=5000, database=None, deadline=None, phases=[hypothesis.Phase.generate]
    )
    assert wanted(hypothesis.find(bodies.requests("m", 64), wanted, settings=settings))


def extra(sent):
    given = sent.body.get("vllm_xargs")
    return given if isinstance(given, dict) else {}


def is_json(body):
    try:
        json.dumps(body, allow_nan=False)
    except ValueError:
        return False
    return True
