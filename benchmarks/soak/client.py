# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""A client of the completions API that can go away in the middle of an answer."""

from __future__ import annotations

import contextlib
import http.client
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from benchmarks.soak.traffic import Ask

PATIENCE_S = 300


@dataclass
class Answer:
    """What a client got.

    Attributes:
        tokens: Token ids of each sample.
        logprobs: Of these tokens.
        finished: Samples that came to their end.
        hung_up: The client went away, as it was to.
        error: What went wrong, if anything.
    """

    tokens: list[list[int]]
    logprobs: list[list[float]]
    finished: int = 0
    hung_up: bool = False
    error: str = ""


@dataclass(frozen=True)
class Client:
    """Talks to one server.

    Attributes:
        url: Of the server.
        model: Served name.
        patience_s: How long nothing may come before that is an error.
    """

    url: str
    model: str
    patience_s: float = PATIENCE_S
    _headers: dict[str, str] = field(default_factory=lambda: {"Content-Type": "application/json"})

    def complete(self, ask: Ask) -> Answer:
        """Asks, and reads the answer token by token."""
        answer = Answer([[] for _ in range(ask.samples)], [[] for _ in range(ask.samples)])
        time.sleep(ask.after_s)
        try:
            with self.sent("/v1/completions", self._body(ask)) as connection:
                if ask.hang_up_after == 0:
                    answer.hung_up = True
                    return answer
                response = connection.getresponse()
                if response.status == 200:
                    self._read(response, ask, answer)
                else:
                    answer.error = f"HTTP {response.status}: {response.read(500)!r}"
        except (OSError, http.client.HTTPException) as error:
            answer.error = f"{type(error).__name__}: {error}"
        return answer

    @contextlib.contextmanager
    def sent(self, path: str, body: str) -> Iterator[http.client.HTTPConnection]:
        """Posts a body and leaves the connection to who reads the answer, or does not."""
        address = urllib.parse.urlsplit(self.url).netloc
        connection = http.client.HTTPConnection(address, timeout=self.patience_s)
        with contextlib.closing(connection):
            connection.request("POST", path, body, self._headers)
            yield connection

    def complete_all(self, asks: Sequence[Ask], at_once: int) -> list[Answer]:
        """Asks with so many clients at once."""
        with ThreadPoolExecutor(at_once) as pool:
            return list(pool.map(self.complete, asks))

    def post(self, path: str, body: Any = None) -> tuple[int, str]:
        """Posts JSON, and returns status and text."""
        data = b"" if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, self._headers)
        try:
            with urllib.request.urlopen(request, timeout=self.patience_s) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode(errors="replace")

    def status_of(self, part: dict[str, Any]) -> tuple[int, str]:
        """Sends a small request with a part replaced."""
        body = {"model": self.model, "prompt": [1, 2, 3], "max_tokens": 1, "temperature": 0.0}
        return self.post("/v1/completions", {**body, **part})

    def _body(self, ask: Ask) -> str:
        # vLLM wants real sampling for several samples; of the best token alone it is greedy.
        sampling = {"temperature": 1.0, "top_k": 1} if ask.samples > 1 else {"temperature": 0.0}
        return json.dumps({
            "model": self.model, "prompt": ask.prompt, "max_tokens": ask.max_tokens,
            "n": ask.samples, "stream": True, "ignore_eos": True, "return_token_ids": True,
            "logprobs": 0, **sampling,
        })  # fmt: skip

    @staticmethod
    def _read(response: http.client.HTTPResponse, ask: Ask, answer: Answer) -> None:
        while line := response.readline():
            if not line.startswith(b"data: "):
                continue
            if line.strip() == b"data: [DONE]":
                break
            event = json.loads(line[6:])
            if "error" in event:
                answer.error = f"in the stream: {event['error']}"
                return
            for choice in event["choices"]:
                index = choice["index"]
                answer.tokens[index] += choice["token_ids"] or ()
                answer.logprobs[index] += (choice["logprobs"] or {}).get("token_logprobs", ())
                answer.finished += choice["finish_reason"] is not None
            if ask.hang_up_after and len(answer.tokens[0]) >= ask.hang_up_after:
                answer.hung_up = True
                return
        if answer.finished < ask.samples:
            answer.error = "the stream ended early"
