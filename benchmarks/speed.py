# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Decode step and time of prompts: stock vLLM against our backends, measured in turns.

Both engines are alive at once; one is stopped (SIGSTOP) while the other is measured, a few steps or
one prompt at a time, so that whatever else the machine does meets both alike. A step's time is that
of one engine step in which every request of the batch decodes one token. What a run that is ended
early has measured is in the result file. With ``--tree old=FOLDER``, a checkout of another commit,
``--arms rocket-512@old,rocket-512`` measures before and after.

The most that a sparse method can gain is stock's step at this context over stock's step at 128
tokens with the same batch. The report gives this bound, the speed-up, and the share of the bound.
"""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from benchmarks import arms, corpus, harness, tables
from benchmarks.neighbours import Neighbours
from benchmarks.results import Recorder
from benchmarks.worker import alive

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks.worker import Worker

    Turns = dict[str, list[list[float]]]

SHORT_TOKENS = 128
DROPPED_STEPS = 4


@dataclass(frozen=True)
class Cell:
    """One measurement: how many requests decode together, how long, about one document or several.

    `context` counts prompt and generation, in tokens; each engine gets `rounds` turns of `steps`.
    """

    model: str
    context: int
    batch: int
    shared: bool = False
    rounds: int = 6
    steps: int = 10

    @property
    def name(self) -> str:
        """A name that is unique and short."""
        kind = "-shared" if self.shared else ""
        return f"{self.model}-{self.context}-b{self.batch}{kind}"

    @property
    def generated(self) -> int:
        """Tokens generated per request, a whole number of blocks."""
        tokens = self.rounds * self.steps + DROPPED_STEPS + 2
        return -(-tokens // harness.BLOCK_TOKENS) * harness.BLOCK_TOKENS


CELLS = {
    cell.name: cell
    for cell in (
        Cell("smollm2", 8192, 8),
        Cell("smollm2", 8192, 8, shared=True),
        Cell("qwen", 16384, 4),
        Cell("smollm2", 1024, 1, rounds=10, steps=12),
    )
}


@dataclass
class Measured:
    """Seconds by arm, as far as they were measured; cores that others used in each turn.

    Decode steps at 128 tokens and at the cell's context are listed by turn, seconds to the first
    and to the second token, by which policies have compacted it, by prompt.
    """

    short: Turns = field(default_factory=dict)
    long: Turns = field(default_factory=dict)
    prefills: dict[str, list[float]] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    others: list[float] = field(default_factory=list)


def measure(
    cell: Cell,
    chosen: list[arms.Arm],
    save: Callable[[dict], None],
    *,
    prefills: int = 8,
    patience_s: float = 0.0,
) -> dict[str, Any]:
    """Measures one cell."""
    tokenizer = harness.tokenizer_of(cell.model)
    prompts = _prompts(cell, tokenizer)
    # Centred on 128 tokens over the steps that are measured.
    length = max(16, SHORT_TOKENS - cell.rounds * cell.steps // 2)
    short = corpus.documents(tokenizer, cell.batch, length)
    timed = prompts[:1] if cell.shared else prompts
    timed = [timed[index % len(timed)] for index in range(max(1, prefills))]
    arguments = harness.engine_args(
        harness.resolve_model(cell.model),
        max_model_len=cell.context,
        pool_tokens=(cell.batch + 1) * cell.context + 2 * cell.batch * SHORT_TOKENS,
    )
    measured = Measured()
    result = {
        "cell": asdict(cell),
        "prompt_tokens": cell.context - cell.generated,
        "engine_args": {key: value for key, value in arguments.items() if key != "model"},
    }

    def keep(metrics: dict[str, dict] | None = None) -> dict[str, Any]:
        result.update(evaluate(cell, chosen, measured, metrics or {}))
        save(result)
        return result

    with alive(chosen, arguments, lambda worker: _warm_up(worker, cell, short)) as workers:
        turns = _Turns(cell, workers, Neighbours(workers, patience_s), measured.others, keep)
        # Before and after, in case the machine's speed drifts.
        turns.decode(short, measured.short, "128 tokens", -(-cell.rounds // 2))
        turns.prefill(timed, measured.prefills, measured.seconds)
        turns.decode(prompts, measured.long, f"{cell.context} tokens", cell.rounds)
        turns.decode(short, measured.short, "128 tokens", cell.rounds // 2)
        metrics = {}
        for worker in workers:
            with worker.running():
                metrics[worker.arm.name] = worker.call("counters")
    return keep(metrics)


def _prompts(cell: Cell, tokenizer: Any) -> list[list[int]]:
    """Documents that leave room for the generation; shared ones differ in the last 32 tokens."""
    length = cell.context - cell.generated
    if not cell.shared:
        return corpus.documents(tokenizer, cell.batch, length)
    document = corpus.documents(tokenizer, 1, length - 32)[0]
    return [document + tail for tail in corpus.documents(tokenizer, cell.batch + 1, 32)[1:]]


def _warm_up(worker: Worker, cell: Cell, short: list[list[int]]) -> None:
    worker.call("begin", prompts=short, max_tokens=cell.generated)
    worker.call("decode", steps=4, batch=cell.batch)
    worker.call("finish")
    worker.call("first_two", prompt=(short[0] * (cell.context // 16))[: cell.context // 2])
    worker.call("forget")


@dataclass
class _Turns:
    """Measures the workers in turns, in alternating order."""

    cell: Cell
    workers: list[Worker]
    neighbours: Neighbours
    others: list[float]
    keep: Callable[[], object]

    def _each(self, index: int) -> Iterator[Worker]:
        for worker in harness.alternating(self.workers, index):
            self.neighbours.wait()
            with worker.running(), self.neighbours.observed(self.others):
                yield worker

    def prefill(
        self,
        prompts: list[list[int]],
        first: dict[str, list[float]],
        second: dict[str, list[float]],
    ) -> None:
        """Appends the seconds that each prompt takes to its first and second token, per arm."""
        for index, prompt in enumerate(prompts):
            for worker in self._each(index):
                if prompt in prompts[:index]:
                    worker.call("forget")
                times = worker.call("first_two", prompt=prompt)
                for into, seconds in zip((first, second), times, strict=True):
                    into.setdefault(worker.arm.name, []).append(seconds)
            self.keep()
            harness.progress(f"{self.cell.name}: prefill {index + 1}/{len(prompts)}")

    def decode(self, prompts: list[list[int]], into: Turns, label: str, rounds: int) -> None:
        """Appends the seconds of the decode steps, per arm and round."""
        cell = self.cell
        if rounds == 0:
            return
        for worker in self.workers:
            with worker.running():
                if cell.shared:
                    worker.call("prefill", prompt=prompts[0])  # so that the others share it
                worker.call("begin", prompts=prompts, max_tokens=cell.generated)
                worker.call("decode", steps=0, batch=cell.batch, dropped=DROPPED_STEPS)
        for index in range(rounds):
            for worker in self._each(index):
                # The first step of a turn finds the caches cold: it is not counted.
                turn = worker.call("decode", steps=cell.steps - 1, batch=cell.batch, dropped=1)
                into.setdefault(worker.arm.name, []).append(turn)
            self.keep()
        for worker in self.workers:
            with worker.running():
                worker.call("finish")
        medians = {name: round(_milliseconds(each)["median"], 1) for name, each in into.items()}
        harness.progress(f"{cell.name}: step at {label}, ms: {medians}")


def _milliseconds(turns: list[list[float]]) -> dict[str, float]:
    return harness.summary([1e3 * second for turn in turns for second in turn])


def evaluate(
    cell: Cell, chosen: list[arms.Arm], measured: Measured, metrics: dict[str, dict]
) -> dict[str, Any]:
    """Returns ``arms`` and ``bound`` of a result, as far as they follow from what was measured.

    Args:
        cell: What is measured.
        chosen: The arms, stock vLLM first.
        measured: Seconds; some may be missing.
        metrics: Of each arm.
    """
    stock = chosen[0].name
    medians = {
        key: _milliseconds(turns[stock])["median"]
        for key, turns in (("long", measured.long), ("short", measured.short))
        if stock in turns
    }
    bound = medians["long"] / medians["short"] if len(medians) == 2 else None
    rows: dict[str, dict] = {}
    for arm in chosen:
        row = rows[arm.name] = {"settings": arm.settings}
        if arm.name in measured.short:
            row["step_ms_at_128_tokens"] = _milliseconds(measured.short[arm.name])
        if arm.name in measured.long:
            long = row["step_ms"] = _milliseconds(measured.long[arm.name])
            row["decode_tokens_per_second"] = cell.batch * 1e3 / long["median"]
        pairs = list(zip(*_both(measured.long, stock, arm.name), strict=False))
        if pairs:
            ratios = [statistics.median(ours) / statistics.median(own) for ours, own in pairs]
            row["speedup"] = medians["long"] / long["median"]
            row["speedup_by_round"] = harness.summary(ratios)
            row["share_of_bound"] = row["speedup"] / bound if bound else None
        for kind, found in (("prefill", measured.prefills), ("second_token", measured.seconds)):
            if arm.name in found:
                row[f"{kind}_seconds"] = harness.summary(found[arm.name])
            pairs = list(zip(*_both(found, stock, arm.name), strict=False))
            if pairs:
                ratio = statistics.median(own / ours for ours, own in pairs)
                row[f"{kind}_overhead_percent"] = 100 * (ratio - 1)
        row["metrics"] = metrics.get(arm.name, {})
    others = harness.summary(measured.others) if measured.others else None
    return {"cores_used_by_others": others, "bound": bound, "arms": rows}


def _both(found: dict[str, list], stock: str, name: str) -> tuple[list, list]:
    return found.get(stock, []), found.get(name, [])


def main(arguments: list[str] | None = None) -> None:
    """Command line entry point."""
    parser = harness.parser("speed", __doc__, "fewer turns and prefills")
    parser.add_argument("--cells", nargs="+", choices=[*CELLS, "custom"], default=list(CELLS))
    parser.add_argument("--model", default="smollm2", help="of a custom cell: name, alias or path")
    parser.add_argument("--context", type=int, default=8192, help="of a custom cell")
    parser.add_argument("--batch", type=int, default=8, help="of a custom cell")
    parser.add_argument("--shared", action="store_true", help="custom cell: one document for all")
    arms.add_options(parser, "dense,rocket-512", "; the first one is the baseline", trees=True)
    parser.add_argument("--prefills", type=int, default=8, help="prompts that are timed")
    parser.add_argument("--rounds", type=int, help="turns of each engine")
    parser.add_argument(
        "--patience", type=float, default=120, help="seconds per cell to wait for a quiet machine"
    )
    options = harness.parse(parser, arguments, {"prefills": 2})
    chosen = arms.parse_arms(parser, options)
    custom = Cell(options.model, options.context, options.batch, options.shared)
    body: dict[str, Any] = {"trees": arms.commits(chosen), "cells": []}
    with Recorder(options.out, "speed", body) as record:
        for name in options.cells:
            cell = custom if name == "custom" else CELLS[name]
            rounds = max(2, cell.rounds // 2) if options.quick else cell.rounds
            done = list(record.body["cells"])

            def save(result: dict, done: list[dict] = done) -> None:
                record.body["cells"] = [*done, result]
                record.save()

            result = measure(
                replace(cell, rounds=options.rounds or rounds), chosen, save,
                prefills=options.prefills, patience_s=options.patience,
            )  # fmt: skip
            print(tables.speed({"cells": [result]}), flush=True)


if __name__ == "__main__":
    main()
