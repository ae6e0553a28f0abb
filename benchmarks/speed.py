# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Decode step and prefill time: stock vLLM against our backends, measured in turns.

Both engines are alive at once; one is stopped (SIGSTOP) while the other is measured, a few steps or
one prompt at a time, so that whatever else the machine does meets both alike. A step's time is that
of one engine step in which every request of the batch decodes one token.

The most that a sparse method can gain is stock's step at this context over stock's step at 128
tokens with the same batch. The report gives this bound, the speed-up, and the share of the bound.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import harness
from benchmarks.engine import Neighbours, Worker

if TYPE_CHECKING:
    from vllm import LLM

SHORT_TOKENS = 128
DROPPED_STEPS = 4


@dataclass(frozen=True)
class Cell:
    """One measurement.

    Attributes:
        model: Name of the model.
        context: Length of prompt and generation together, in tokens.
        batch: Number of requests that decode together.
        shared: Whether all requests are about one document.
        rounds: How many times each engine gets its turn.
        steps: Decode steps per turn.
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


# Commands, executed in the worker process.


def prefill(llm: LLM, prompt: list[int]) -> float:
    """Returns the seconds from adding a request to its first token."""
    start = time.perf_counter()
    _add(llm, [prompt], max_tokens=1)
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
    return time.perf_counter() - start


def begin(llm: LLM, prompts: list[list[int]], max_tokens: int) -> float:
    """Adds a batch of requests and returns the seconds until every one of them decodes."""
    start = time.perf_counter()
    waiting = set(_add(llm, prompts, max_tokens))
    while waiting:
        for output in llm.llm_engine.step():
            waiting.discard(output.request_id)
    return time.perf_counter() - start


def decode(llm: LLM, steps: int, batch: int, dropped: int = 0) -> list[float]:
    """Returns the seconds of each of `steps` steps, after `dropped` unmeasured ones.

    Raises:
        RuntimeError: A step did not give every request one token.
    """
    seconds = []
    for _ in range(dropped + steps):
        start = time.perf_counter()
        outputs = llm.llm_engine.step()
        seconds.append(time.perf_counter() - start)
        if len(outputs) != batch or any(output.finished for output in outputs):
            raise RuntimeError(f"a step served {len(outputs)} of {batch} requests")
    return seconds[dropped:]


def finish(llm: LLM) -> None:
    """Aborts all requests; prefix cache and blocks stay as they are."""
    engine = llm.llm_engine
    engine.abort_request(list(engine.output_processor.request_states), internal=True)
    while engine.has_unfinished_requests():
        engine.step()


def forget(llm: LLM) -> None:
    """Empties the prefix cache."""
    if not llm.reset_prefix_cache():
        raise RuntimeError("the prefix cache could not be emptied")


def counters(llm: LLM) -> dict:
    """Returns the plugin's metrics and the number of preemptions."""
    from benchmarks.counters import sparse

    return sparse(llm)


def _add(llm: LLM, prompts: list[list[int]], max_tokens: int) -> list[str]:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    ids = []
    for prompt in prompts:
        request_id = str(next(llm.request_counter))
        llm.llm_engine.add_request(request_id, {"prompt_token_ids": prompt}, params)
        ids.append(request_id)
    return ids


# The benchmark.


def measure(
    cell: Cell,
    arms: list[harness.Arm],
    *,
    prefills: int = 8,
    patience_s: float = 0.0,
    overrides: dict | None = None,
) -> dict:
    """Measures one cell.

    Args:
        cell: What to measure.
        arms: The sides of the comparison, stock vLLM first.
        prefills: Number of prompts whose prefill is timed on every side.
        patience_s: How long to wait in all for neighbours on the machine to be quiet.
        overrides: Further arguments of `LLM`, for every side.
    """
    from transformers import AutoTokenizer

    model = harness.resolve_model(cell.model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompts = _prompts(cell, tokenizer)
    short = _short_prompts(cell, tokenizer)
    timed = prompts[:1] if cell.shared else prompts
    timed = [timed[index % len(timed)] for index in range(max(1, prefills))]
    arguments = harness.engine_args(
        model,
        max_model_len=cell.context,
        pool_tokens=(cell.batch + 1) * cell.context + 2 * cell.batch * SHORT_TOKENS,
        **(overrides or {}),
    )
    with contextlib.ExitStack() as stack:
        workers = []
        for arm in arms:
            worker = stack.enter_context(Worker("benchmarks.speed", arm, arguments))
            harness.progress(f"{cell.name}: {arm.name} is up after {worker.start_seconds:.0f} s")
            _warm_up(worker, cell, short)
            worker.pause()
            workers.append(worker)

        neighbours = Neighbours(workers, patience_s)
        turns = _Turns(cell, workers, neighbours)
        # Before and after, in case the machine's speed drifts.
        steps_short = turns.decode(short, "128 tokens", rounds=-(-cell.rounds // 2))
        prefill_seconds = turns.prefill(timed)
        steps_long = turns.decode(prompts, f"{cell.context} tokens", rounds=cell.rounds)
        for name, rounds in turns.decode(short, "128 tokens", rounds=cell.rounds // 2).items():
            steps_short[name] += rounds
        metrics = {}
        for worker in workers:
            with worker.running():
                metrics[worker.arm.name] = worker.call("counters")
    result = _evaluate(cell, arms, steps_short, steps_long, prefill_seconds, metrics)
    return {
        "cell": asdict(cell),
        "prompt_tokens": cell.context - cell.generated,
        "engine_args": {key: value for key, value in arguments.items() if key != "model"},
        "cores_used_by_others": harness.summary(turns.cores_used_by_others),
        **result,
    }


def _prompts(cell: Cell, tokenizer) -> list[list[int]]:
    """Documents that leave room for the generation; shared ones differ in the last 32 tokens."""
    from benchmarks import corpus

    length = cell.context - cell.generated
    if not cell.shared:
        return corpus.documents(tokenizer, cell.batch, length)
    document = corpus.documents(tokenizer, 1, length - 32)[0]
    return [document + tail for tail in corpus.documents(tokenizer, cell.batch + 1, 32)[1:]]


def _short_prompts(cell: Cell, tokenizer) -> list[list[int]]:
    from benchmarks import corpus

    # Centred on 128 tokens over the steps that are measured.
    length = SHORT_TOKENS - cell.rounds * cell.steps // 2
    return corpus.documents(tokenizer, cell.batch, max(16, length))


def _warm_up(worker: Worker, cell: Cell, short: list[list[int]]) -> None:
    worker.call("begin", prompts=short, max_tokens=cell.generated)
    worker.call("decode", steps=4, batch=cell.batch)
    worker.call("finish")
    worker.call("prefill", prompt=(short[0] * (cell.context // 16))[: cell.context // 2])
    worker.call("forget")


class _Turns:
    """Measures the workers in turns, in alternating order."""

    def __init__(self, cell: Cell, workers: list[Worker], neighbours: Neighbours) -> None:
        self._cell = cell
        self._workers = workers
        self._neighbours = neighbours
        self.cores_used_by_others: list[float] = []

    def _turns(self, index: int):
        for worker in self._workers if index % 2 == 0 else self._workers[::-1]:
            self._neighbours.wait()
            with worker.running(), self._neighbours.observed(self.cores_used_by_others):
                yield worker

    def prefill(self, prompts: list[list[int]]) -> dict[str, list[float]]:
        """Returns the seconds that each prompt takes to its first token, per arm."""
        seconds: dict[str, list[float]] = {worker.arm.name: [] for worker in self._workers}
        for index, prompt in enumerate(prompts):
            for worker in self._turns(index):
                if prompt in prompts[:index]:
                    worker.call("forget")
                seconds[worker.arm.name].append(worker.call("prefill", prompt=prompt))
            harness.progress(f"{self._cell.name}: prefill {index + 1}/{len(prompts)}")
        return seconds

    def decode(
        self, prompts: list[list[int]], label: str, rounds: int
    ) -> dict[str, list[list[float]]]:
        """Returns the seconds of the decode steps, per arm and round."""
        cell = self._cell
        for worker in self._workers:
            with worker.running():
                if cell.shared:
                    worker.call("prefill", prompt=prompts[0])  # so that the others share it
                worker.call("begin", prompts=prompts, max_tokens=cell.generated)
                worker.call("decode", steps=0, batch=cell.batch, dropped=DROPPED_STEPS)
        seconds: dict[str, list[list[float]]] = {worker.arm.name: [] for worker in self._workers}
        for index in range(rounds):
            for worker in self._turns(index):
                # The first step of a turn finds the caches cold: it is not counted.
                turn = worker.call("decode", steps=cell.steps - 1, batch=cell.batch, dropped=1)
                seconds[worker.arm.name].append(turn)
        for worker in self._workers:
            with worker.running():
                worker.call("finish")
        medians = {
            name: round(_milliseconds(turns)["median"], 1) for name, turns in seconds.items()
        }
        harness.progress(f"{cell.name}: step at {label}, ms: {medians}")
        return seconds


def _milliseconds(turns: list[list[float]]) -> dict:
    return harness.summary([1e3 * second for turn in turns for second in turn])


def _evaluate(cell: Cell, arms, steps_short, steps_long, prefill_seconds, metrics) -> dict:
    stock = arms[0].name
    stock_long = _milliseconds(steps_long[stock])["median"]
    bound = stock_long / _milliseconds(steps_short[stock])["median"]
    rows = {}
    for arm in arms:
        long, short = _milliseconds(steps_long[arm.name]), _milliseconds(steps_short[arm.name])
        speedup = stock_long / long["median"]
        ratios = [
            statistics.median(ours) / statistics.median(theirs)
            for theirs, ours in zip(steps_long[arm.name], steps_long[stock], strict=True)
        ]
        prefill_ratios = [
            ours / theirs
            for ours, theirs in zip(prefill_seconds[arm.name], prefill_seconds[stock], strict=True)
        ]
        rows[arm.name] = {
            "settings": arm.settings,
            "step_ms": long,
            "step_ms_at_128_tokens": short,
            "decode_tokens_per_second": cell.batch * 1e3 / long["median"],
            "speedup": speedup,
            "speedup_by_round": harness.summary(ratios),
            "share_of_bound": speedup / bound,
            "prefill_seconds": harness.summary(prefill_seconds[arm.name]),
            "prefill_overhead_percent": 100 * (statistics.median(prefill_ratios) - 1),
            "metrics": metrics[arm.name],
        }
    return {"bound": bound, "arms": rows}


def main() -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__)
    parser.add_argument("--cells", nargs="+", choices=[*CELLS, "custom"], default=list(CELLS))
    parser.add_argument("--model", default="smollm2", help="of a custom cell: name, alias or path")
    parser.add_argument("--context", type=int, default=8192, help="of a custom cell")
    parser.add_argument("--batch", type=int, default=8, help="of a custom cell")
    parser.add_argument("--shared", action="store_true", help="custom cell: one document for all")
    harness.add_arm_options(parser, "dense,rocket-512", "; the first one is the baseline")
    parser.add_argument("--engine-arg", nargs="+", default=[], metavar="KEY=JSON")
    parser.add_argument("--prefills", type=int, default=8, help="prompts whose prefill is timed")
    parser.add_argument("--rounds", type=int, help="turns of each engine")
    parser.add_argument(
        "--patience", type=float, default=120, help="seconds per cell to wait for a quiet machine"
    )
    parser.add_argument("--quick", action="store_true", help="fewer turns and prefills")
    parser.add_argument("--out", type=Path, default=harness.RESULTS_DIR / "speed.json")
    options = parser.parse_args()

    harness.exit_cleanly()
    environment = harness.environment()
    arms = harness.parse_arms(parser, options)
    custom = Cell(options.model, options.context, options.batch, options.shared)
    results = []
    for name in options.cells:
        cell = custom if name == "custom" else CELLS[name]
        rounds = options.rounds or (max(2, cell.rounds // 2) if options.quick else cell.rounds)
        cell = Cell(**{**asdict(cell), "rounds": rounds})
        prefills = 2 if options.quick else options.prefills
        overrides = harness.parse_settings(options.engine_arg)
        results.append(
            measure(cell, arms, prefills=prefills, patience_s=options.patience, overrides=overrides)
        )
        harness.write_result(options.out, "speed", environment, {"cells": results})
        _print(results[-1])


def _print(result: dict) -> None:
    print(
        f"{result['cell']}  bound {result['bound']:.2f}x"
        f"  (cores used by others: {result['cores_used_by_others']['median']:.2f})"
    )
    for name, row in result["arms"].items():
        step, prefill_seconds = row["step_ms"], row["prefill_seconds"]
        print(
            f"  {name:14s} step {step['median']:.1f} ms ({step['p25']:.1f}-{step['p75']:.1f})"
            f"  at 128 {row['step_ms_at_128_tokens']['median']:.1f} ms"
            f"  speed-up {row['speedup']:.2f}x = {row['share_of_bound']:.0%} of the bound"
            f"  prefill {prefill_seconds['median']:.2f} s"
            f" ({row['prefill_overhead_percent']:+.1f} %)",
            flush=True,
        )


if __name__ == "__main__":
    main()
