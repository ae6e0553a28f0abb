# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Decode steps and prefills of one engine, batch after batch, each next to its bound.

A batch grows while it decodes: what was prefilled for eight requests serves for the largest batch
too. Requests of stock vLLM have prompts of their own, so that nothing is read twice from a cache.
Those of an arm that evicts share their prompt but for the end: what they decode from, their tails,
is private anyway, and only the tails have to be prefilled.
"""

from __future__ import annotations

import contextlib
import time
import traceback
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from benchmarks import arms, commands, harness, live, predictions
from benchmarks.gpu import llms, shapes
from benchmarks.gpu.stages import CheckFailedError, NotAvailableError, report_of
from benchmarks.ops import timings
from benchmarks.ops.rocketkv import split_of
from vllm_sparse.planner import bounds

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from benchmarks.arms import Arm
    from benchmarks.gpu.stages import Report

DENSE, COMPILED = "dense", "dense-compiled"
# Tokens per block of arms that do not have the backend's own.
BLOCK_SIZES = {"dense-blocks-of-64": 64, "rocket-1024-blocks-of-128": 128}
MOST, AS_DENSE = "most", "most of dense"  # batches known only when the engines are up
MAX_SEQS = 256
GROWTH = 768  # tokens that a request may generate while the batch grows
STEPS, DROPPED_STEPS = 64, 4
PROFILED_STEPS = 5
RESERVE_S = 8.0
SCATTERED = 0.25  # least share of selected pages that must lie apart
CAPTURED = [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256]
TAIL = 64  # tokens at the end of a shared prompt that differ


class Cell(NamedTuple):
    """Batches of one context, in ascending order, and how many cold prefills are timed.

    A batch is a number, `AS_DENSE` (as many as fit stock vLLM) or `MOST` (as many as fit here).
    """

    context: int
    batches: tuple[int | str, ...]
    prefills: int = 3


K = 1024
_MORE = (Cell(8 * K, (1, 8, AS_DENSE, MOST)), Cell(128 * K, (1, AS_DENSE, MOST), 2))
# The most wanted first, in case time runs out.
CELLS: dict[str, tuple[Cell, ...]] = {
    DENSE: (
        Cell(32 * K, (1, 8, MOST)), Cell(128 * K, (1,), 1), Cell(16 * K, (1,)),
    ),
    "rocket-1024": (
        Cell(32 * K, (1, 8, AS_DENSE, MOST)), Cell(128 * K, (1,), 1), Cell(16 * K, (1,)),
    ),
    "rocket-256": (
        Cell(32 * K, (1, 8, AS_DENSE, MOST), 1), Cell(128 * K, (1,), 1), Cell(16 * K, (1,), 1),
    ),
    "stage1-1024": (Cell(32 * K, (1, 8, AS_DENSE), 1),),
    "stage2-1024": (Cell(32 * K, (1, 8), 1),),
    "dense-again": (Cell(32 * K, (1,)),),
    COMPILED: (Cell(32 * K, (1, 8)),),
    "dense-blocks-of-64": (Cell(32 * K, (1, 8)),),
    "rocket-1024-blocks-of-128": (Cell(32 * K, (1, 8, AS_DENSE), 1),),
    # Many or long prompts: minutes of prefill.
    "dense-more": (Cell(8 * K, (1, 8, MOST)), Cell(128 * K, (1, MOST), 2)),
    "rocket-1024-more": _MORE,
    "rocket-256-more": _MORE,
}  # fmt: skip
TINY_CELLS = (Cell(512, (1, 2), 1),)


def arm_of(name: str, options: argparse.Namespace) -> Arm:
    """The arm of a stage."""
    if name.startswith(DENSE):
        return llms.stock_arm(options)
    name = name.removesuffix("-more").partition("-blocks")[0]
    if options.tiny:
        name = f"{name.rpartition('-')[0]}-64"
    own = {"min_context": 64, "generation_reserve": 32} if options.tiny else None
    return arms.parse_arm(name, own)


def measure(name: str, report: Report, options: argparse.Namespace) -> None:
    """Measures all cells of an arm, as long as there is time.

    Raises:
        CheckFailedError: Steps would not run in graphs, or some cell could not be measured.
    """
    shape = shapes.TINY if options.tiny else shapes.LLAMA
    cells = TINY_CELLS if options.tiny else CELLS[name]
    device = torch.device(options.device)
    copy = timings.copy_bytes_per_s(device, 0.01 if options.tiny else 2.0)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    longest = max(cell.context for cell in cells) + 2 * GROWTH
    model = shapes.write_config(options.work / "shape", shape, longest)
    arm = arm_of(name, options)
    started = time.perf_counter()
    mode = llms.COMPILED if options.compile or name == COMPILED else llms.GRAPHS
    if device.type == "cpu":
        mode = llms.EAGER
    arguments = {**mode, **_arguments(longest, options)}
    if name in BLOCK_SIZES:
        arguments["block_size"] = BLOCK_SIZES[name]
    llm = llms.build(arm, options, model, **arguments)
    report.note(
        **llms.facts(llm, started), arm=arm.name, settings=arm.settings, shape=shape.name,
        copy_gb_per_s=round(copy / 1e9, 1), seed=options.seed,
        **predictions.facts(predictions.expected_of(device, copy)),
    )  # fmt: skip
    llms.check_graphs(report.facts, mode)
    subject = _Subject(llm, arm, copy, report, options)
    subject.warm_up()
    report.note(
        largest={str(cell.context): subject.most(cell.context) for cell in cells},
        held={str(cell.context): subject.held(cell.context) for cell in cells},
    )
    measure_cells(subject, cells, report)
    if device.type == "cuda":
        subject.profile(cells[0].context)


def measure_cells(subject: Any, cells: Sequence[Cell], report: Report) -> None:
    """Measures cells; one that fails costs no other one.

    Raises:
        CheckFailedError: Some failed; raised once all were tried.
    """
    wrong = []
    for number, cell in enumerate(cells):
        try:
            subject.measure(cell, look=number == 0)
        except Exception as error:
            traceback.print_exc()
            report.add(context=cell.context, failed=str(error)[:300])
            wrong.append(f"{cell.context}: {error}")
            subject.finish()
    if wrong:
        raise CheckFailedError("; ".join(wrong))


def _arguments(longest: int, options: argparse.Namespace) -> dict[str, Any]:
    if options.tiny:
        return {
            "load_format": "dummy", "max_model_len": longest, "max_num_seqs": 4,
            "kv_cache_memory_bytes": 64 << 20, "max_num_batched_tokens": 1024,
            **({"block_size": 32} if options.device == "cpu" else {}),
        }  # fmt: skip
    return {
        "load_format": "dummy", "max_model_len": longest, "max_num_seqs": MAX_SEQS,
        "max_num_batched_tokens": 16 * K, "gpu_memory_utilization": 0.9,
        "cudagraph_capture_sizes": CAPTURED,
    }  # fmt: skip


class _Subject:
    """An engine under measurement."""

    def __init__(
        self, llm: Any, arm: Arm, copy: float, report: Report, options: argparse.Namespace
    ) -> None:
        self._llm, self._arm, self._copy = llm, arm, copy
        self._shape = shapes.TINY if options.tiny else shapes.LLAMA
        self._report, self._options = report, options
        self._block_size = report.facts["block_size"]
        self._steps = 5 if options.tiny else STEPS
        scheduler = llm.llm_engine.vllm_config.scheduler_config
        self._max_seqs, self._chunk = scheduler.max_num_seqs, scheduler.max_num_batched_tokens
        self._preempted = 0
        self._longest = llm.llm_engine.vllm_config.model_config.max_model_len
        self._expected = predictions.expected_of(torch.device(options.device), copy)
        settings = arm.settings or {}
        self._on_gpu = options.device == "cuda" or settings.get("kernels") == "triton"
        self._shares_prompts = arm.settings is not None and settings.get("stage1", True)

    def split(self, context: int) -> bounds.Split | None:
        """What this arm holds and reads; None if it is dense."""
        if self._arm.settings is None:
            return None
        return split_of(self._shape, context, self._arm.settings, self._block_size)

    def held(self, context: int) -> int:
        """Tokens that a request holds once it decodes."""
        split = self.split(context)
        return context if split is None else split.held

    def most(self, context: int) -> int:
        """Requests that fit the pool while they decode."""
        held, pool = self.held(context), self._report.facts["pool_tokens"]
        return bounds.most_rows(pool, held + GROWTH, once=context - held)

    def warm_up(self) -> None:
        """Compiles what a prompt of several chunks and a step need."""
        prompt = self._prompt(self._chunk * 5 // 4, 10**6)
        commands.begin(self._llm, [prompt], self._steps + 2 * DROPPED_STEPS)
        commands.decode(self._llm, 2, 1)
        commands.finish(self._llm)

    def measure(self, cell: Cell, *, look: bool = False) -> None:
        """Times the prefills of a cell, then its batches.

        Raises:
            CheckFailedError: It is no fair load.
        """
        expected = self._prefill(cell)
        running = 0
        for wanted in cell.batches:
            batch = min(self._batch(wanted, cell.context), self._max_seqs)
            if batch <= running:
                continue
            row = {"context": cell.context, "wanted": wanted, "batch": batch}
            needed = (batch - running) * expected
            if needed > self._report.left_s - RESERVE_S:
                self._report.add(**row, skipped=f"would take {needed:.0f} s")
                break
            prompts = [self._request(cell.context, index) for index in range(running, batch)]
            try:
                seconds = commands.begin(self._llm, prompts, GROWTH * 2)
                steps = commands.decode(self._llm, self._steps, batch, DROPPED_STEPS)
            except RuntimeError as error:  # requests were preempted
                if self._options.device == "cuda":
                    torch.cuda.synchronize()  # raises if it was the device
                self._report.add(**row, skipped=str(error))
                break
            if len(prompts) > 1:
                expected = seconds / len(prompts)
            running = batch
            self._add(row, steps, seconds)
        split = self.split(cell.context)
        if look and running and split is not None and split.stage2 and self._on_gpu:
            self._look()
        commands.finish(self._llm)

    def finish(self) -> None:
        """Ends the requests of a cell that failed, if the engine still can."""
        with contextlib.suppress(Exception):
            commands.finish(self._llm)

    def _look(self) -> None:
        seed = self._options.seed
        ((runs, pages),) = self._llm.collective_rpc(live.locality, args=(seed,))
        self._report.note(selected_runs=runs, selected_pages=pages)
        if runs < SCATTERED * pages:
            raise CheckFailedError(
                f"{pages:.0f} selected pages are {runs:.0f} runs of slots: keys are too much alike "
                "for a fair load"
            )

    def profile(self, context: int) -> None:
        """Notes the device time of a step at batch 1, by kernel; last, as it slows what follows."""
        from torch.profiler import ProfilerActivity, profile

        if self._report.left_s < 3 * RESERVE_S:
            return
        try:
            commands.begin(self._llm, [self._request(context, 0)], GROWTH)
            commands.decode(self._llm, 1, 1, DROPPED_STEPS)
            with profile(activities=[ProfilerActivity.CUDA]) as found:
                commands.decode(self._llm, PROFILED_STEPS, 1)
                torch.cuda.synchronize()
            total: dict[str, list[float]] = {}
            for event in found.key_averages():
                entry = total.setdefault(event.key[:100], [0.0, 0])
                entry[0] += event.self_device_time_total / 1e3 / PROFILED_STEPS
                entry[1] += event.count / PROFILED_STEPS
            ordered = sorted(total.items(), key=lambda item: -item[1][0])
            self._report.note(
                profile={
                    "context": context,
                    "device_ms_per_step": round(sum(ms for _, (ms, _) in ordered), 3),
                    "kernels": [[key, round(ms, 4), n] for key, (ms, n) in ordered[:25]],
                }
            )
            commands.finish(self._llm)
        except Exception as error:  # a missing profiler must not cost the measurements
            self._report.note(profile_error=str(error)[:300])

    def _prefill(self, cell: Cell) -> float:
        """Times cold prompts; returns the seconds that a further request is expected to take."""
        known = [row["prefill_s"] for row in self._report.rows if _is_prefill(row, cell.context)]
        # A guess: half of it is attention at 128K, next to nothing at 8K.
        guess = 40e-6 * cell.context * (1 + cell.context / (128 * K))
        for index in range(cell.prefills):
            if min(known, default=guess) > self._report.left_s - RESERVE_S:
                break
            first, second = commands.first_two(self._llm, self._prompt(cell.context, 1000 + index))
            known.append(first)
            predicted = predictions.prefill_s(self._shape, cell.context)
            self._report.add(
                context=cell.context, prefill_s=first, second_token_s=second, predicted_s=predicted
            )
        share = self.held(cell.context) / cell.context if self._shares_prompts else 1.0
        return min(known, default=guess) * min(1.0, 1.5 * share)

    def _batch(self, wanted: int | str, context: int) -> int:
        if isinstance(wanted, int):
            return wanted
        if wanted == MOST:
            return self.most(context)
        try:
            suffix = "-more" if self._options.stage.endswith("-more") else ""
            dense = report_of(self._options, DENSE + suffix)
            return dense["facts"]["largest"][str(context)]
        except (NotAvailableError, KeyError):
            return bounds.most_rows(self._report.facts["pool_tokens"], context + GROWTH)

    def _add(self, cell: dict[str, Any], steps: list[float], seconds: float) -> None:
        step = harness.summary([1e3 * second for second in steps])
        batch, context = cell["batch"], cell["context"]
        split = self.split(context)
        read = bounds.step_bytes(self._shape, batch, context, split)
        least = 1e3 * read / self._copy
        before, self._preempted = self._preempted, self._preemptions()
        self._report.add(
            **cell, step_ms=step, tokens_per_s=batch * len(steps) / sum(steps), least_bytes=read,
            bound_ms=least, share_of_bound=least / step["median"], grown_in_s=round(seconds, 2),
            preemptions=self._preempted - before,
            predicted_ms=predictions.step_ms(
                self._shape, batch, context, split, self._longest, self._expected
            ),
        )  # fmt: skip

    def _preemptions(self) -> int:
        return int(commands.counters(self._llm).get("vllm:num_preemptions", 0))

    def _request(self, context: int, index: int) -> list[int]:
        """Prompt of a request of the batch; the first one's prefill has been timed."""
        if not self._shares_prompts:
            return self._prompt(context, 1000 + index)
        shared = self._prompt(context, 1000)
        return shared[:-TAIL] + shapes.random_prompt(index, TAIL, self._shape.vocab)

    def _prompt(self, context: int, number: int) -> list[int]:
        seed = self._options.seed * 10**8 + number
        return shapes.random_prompt(seed + context * 10**9, context, self._shape.vocab)


def _is_prefill(row: dict, context: int) -> bool:
    return "prefill_s" in row and row["context"] == context
