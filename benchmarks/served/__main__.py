# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Starts a real `vllm serve` for every row of the table of features, beside stock vLLM's.

Both are asked the same, over HTTP, at once and twice: what our backend serves densely must be stock
vLLM's answer, what it serves sparsely must be Hugging Face's under the mask, and the counters must
say that nothing else happened. A row that fails is noted and the next one runs. Exit status 1: some
failed.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks import harness, results
from benchmarks.served import asks, judges
from benchmarks.served.checkpoints import Checkpoints
from benchmarks.served.forked import ForkedServer
from benchmarks.served.rows import ROWS, Row
from benchmarks.soak import serving, watch
from benchmarks.soak.client import Client
from vllm_sparse.demo.server import ServerError

if TYPE_CHECKING:
    from benchmarks.served.asks import Answer, Ask

_CALM_S = 30
_TOLD = ("vllm:sparse_", "vllm:spec_decode_num", "vllm:prefix_cache_hits", "vllm:external_prefix")


def main(arguments: list[str] | None = None) -> int:
    """Command line entry point; returns the exit status."""
    parser = harness.parser("served", __doc__)
    parser.set_defaults(out=results.FOLDER / "serve-matrix.json")
    parser.add_argument("--rows", nargs="+", metavar="ROW", choices=[row.name for row in ROWS])
    parser.add_argument("--resume", action="store_true", help="keep the file's other rows")
    parser.add_argument(
        "--forked", action="store_true", help="fork ours too, as stock's always: less faithful"
    )
    parser.add_argument("--logs", type=Path, help="folder for the servers' logs")
    options = harness.parse(parser, arguments)
    torch.set_num_threads(1)  # more do not survive a fork, and a server would wait for them
    chosen = [row for row in ROWS if row.name in (options.rows or [row.name])]
    rows: dict[str, Any] = {}
    body = {"rows": rows}
    with (
        results.Recorder(options.out, "served", body, resume=options.resume) as record,
        tempfile.TemporaryDirectory() as folder,
    ):
        logs = options.logs or Path(folder)
        logs.mkdir(parents=True, exist_ok=True)
        run = Run(Path(folder), logs, options.forked)
        for row in chosen:
            found = body["rows"][row.name] = run.row(row)
            record.save()
            said = "; ".join(found["faults"]) or "as it should be"
            harness.progress(f"{row.name}: {said} ({found['seconds']:.0f} s)")
    failed = [row.name for row in chosen if body["rows"][row.name]["faults"]]
    harness.progress(f"{len(chosen) - len(failed)} of {len(chosen)} rows as they should be")
    return 1 if failed else 0


class Run:
    """The rows of one run, which share checkpoints and answers of stock vLLM.

    Args:
        folder: For checkpoints.
        logs: Folder for what servers print.
        forks: Also servers of ours, which else are processes of the command `vllm`.
    """

    def __init__(self, folder: Path, logs: Path, forks: bool) -> None:
        self._checkpoints, self._logs = Checkpoints(folder), logs
        self._ours = ForkedServer if forks else serving.Server
        self._stock: dict[tuple, dict[str, Answer]] = {}

    def row(self, row: Row) -> dict[str, Any]:
        """What one row's servers did, as JSON holds it."""
        began, found = time.monotonic(), {
            "backend": row.backend, "options": [*row.options, *row.own],
            "judge": "" if row.refused else row.judge,
            "processes": "forked" if self._ours is ForkedServer else "spawned",
        }  # fmt: skip
        try:
            self._refused(row, found) if row.refused else self._served(row, found)
        except ServerError as error:
            found["faults"] = [str(error)]
        except Exception as error:
            found["faults"] = [f"{type(error).__name__}: {error}"]
        return {**found, "seconds": round(time.monotonic() - began, 1)}

    def _log(self, row: Row, subject: serving.Subject) -> Path:
        name = f"{row.name} {(subject.backend and 'ours') or 'stock'}.log"
        return self._logs / name.replace(",", "").replace(" ", "-")

    def _server(self, row: Row, subject: serving.Subject) -> serving.Server:
        return serving.server(
            self._checkpoints.path(row.model), self._log(row, subject), subject,
            *row.arguments(self._checkpoints, bool(subject.backend)), **row.environment,
            kind=self._ours if subject.backend else ForkedServer,
        )  # fmt: skip

    def _refused(self, row: Row, found: dict[str, Any]) -> None:
        """Ours must not start."""
        server = self._server(row, row.subject())
        try:
            with server:
                found["faults"] = ["it starts"]
        except ServerError:
            said = row.refused in self._log(row, row.subject()).read_text(errors="replace")
            found["faults"] = [] if said else [f"no word of {row.refused!r}: {server.log_tail()}"]

    def _served(self, row: Row, found: dict[str, Any]) -> None:
        """Ours must answer as it should."""
        batch = asks.batch(row.own_budgets)
        with self._server(row, row.subject()) as server:
            client = _client(server)
            before = server.metrics()
            waves = [asks.ask_all(client, batch) for _ in range(2)]
            watch.until(lambda: not server.metrics()["vllm:num_requests_running"], _CALM_S)
            time.sleep(1)  # vLLM counts after it has answered
            after = server.metrics()
            more = asks.ask_all(client, asks.features()) if row.features else {}
            status, text = _embed(server) if row.features else (400, "")
        grown = {name: value - before.get(name, 0.0) for name, value in after.items()}
        found["counters"] = {
            name.removeprefix("vllm:"): value
            for name, value in grown.items()
            if name.startswith(_TOLD) and value and not name.endswith("_created")
        }
        stock = self._answers_of_stock(row)
        faults = judges.of_batch(batch, waves, stock, row.judge == "stock")
        faults += judges.of_counters(row, batch, grown)
        if more:
            faults += judges.of_features(more, stock, waves[0]["sparse"])
        if not 400 <= status < 500:
            faults.append(f"an embedding is answered with status {status}: {text[:200]}")
        log = self._log(row, row.subject()).read_text(errors="replace")
        found["faults"] = faults + self._against_hugging_face(row, batch, waves[0], log)

    def _against_hugging_face(
        self, row: Row, batch: list[Ask], answers: dict[str, Answer], log: str
    ) -> list[str]:
        """What is wrong with tokens of sparse requests."""
        judge, faults = judges.JUDGES.get(row.judge), []
        for ask in batch:
            answer = answers[ask.name]
            if judge is None or not ask.sparse or answer.error:
                continue
            adapted = ask.adapted and "--enable-lora" in row.options
            model = self._checkpoints.for_hugging_face("merged" if adapted else row.model)
            try:
                judge(row, model, log, [list(ask.prompt)], answer.tokens)
            except AssertionError as error:
                faults.append(f"{ask.name}: other than Hugging Face: {error}")
        return faults

    def _answers_of_stock(self, row: Row) -> dict[str, Answer]:
        """What stock vLLM answers with the same options."""
        key = row.model, row.options, row.blocks, row.block_tokens
        if key not in self._stock:
            subject = row.subject()._replace(backend="")
            with self._server(row, subject) as server:
                client, answers = _client(server), {}
                for batch in (asks.batch(True), asks.batch(False), asks.features()):
                    answers |= asks.ask_all(client, batch)
            self._stock[key] = answers
        return self._stock[key]


def _client(server: serving.Server) -> Any:
    import openai

    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def _embed(server: serving.Server) -> tuple[int, str]:
    """What a server that generates says to a request for an embedding."""
    body = {"model": serving.NAME, "input": "w30 w31"}
    return Client(server.url, serving.NAME).post("/v1/embeddings", body)


if __name__ == "__main__":
    sys.exit(main())
