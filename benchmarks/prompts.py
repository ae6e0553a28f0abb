# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Times whole prompts of SPARDA, sparse and dense, against stock vLLM, in turns.

All engines are alive at once and one runs at a time, a prompt each, so that whatever else the
machine does meets all alike. Beside the time, CPU seconds of the model's process are given, which
other processes disturb less.

The most that a number of blocks can gain is stock's time without its attention to what is beyond
them, as if choosing cost nothing; the report gives this bound.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

from benchmarks import arms, corpus, harness
from benchmarks.neighbours import Neighbours
from benchmarks.results import Recorder
from benchmarks.worker import alive

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from benchmarks.worker import Worker

GENERATED = 1
ARMS = "dense,sparda-32,prompts-32,prompts-64"
PARTS = ("seconds", "cpu", "attention", "choose_blocks", "attend_part")


def share_of_pairs(tokens: int, blocks: int, block_size: int) -> float:
    """Pairs of a query and a key in so many blocks, of all causal pairs of a prompt.

    Args:
        tokens: Of the prompt.
        blocks: That a token reads, its own included.
        block_size: Tokens per block.
    """
    read = 0
    for block in range(-(-tokens // block_size)):
        own = min(block_size, tokens - block * block_size)  # query tokens of this block
        read += own * min(block, blocks - 1) * block_size + own * (own + 1) // 2
    return read / (tokens * (tokens + 1) / 2)


def measure(
    context: int,
    chosen: list[arms.Arm],
    options: argparse.Namespace,
    save: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Measures prompts of one length; returns what :func:`evaluate` does.

    Args:
        context: Tokens of prompt and output.
        chosen: The arms, the one that is compared with first.
        options: The command line's.
        save: Gets what is known after each prompt.
    """
    prompts = corpus.documents(
        harness.tokenizer_of(options.model), options.rounds, context - GENERATED
    )
    arguments = harness.engine_args(
        harness.resolve_model(options.model),
        max_model_len=context,
        pool_tokens=context + harness.BLOCK_TOKENS,
        max_num_seqs=1,
        enable_prefix_caching=False,
        **arms.parse_settings(options.engine_arg),
    )
    found: dict[str, list[dict[str, Any]]] = {}
    others: list[float] = []

    def warm_up(worker: Worker) -> None:
        worker.call("attach_clock")
        worker.call("prefill", prompt=prompts[0][: min(2048, context // 4)])

    with alive(chosen, arguments, warm_up) as workers:
        neighbours = Neighbours(workers, 0.0)
        for index, prompt in enumerate(prompts):
            for worker in harness.alternating(workers, index):
                with worker.running(), neighbours.observed(others):
                    took = worker.call("timed_prefill", prompt=prompt)
                found.setdefault(worker.arm.name, []).append(took)
                save(evaluate(context, chosen, found, others))
                harness.progress(
                    f"{context}: {worker.arm.name} {took['seconds']:.1f} s, cpu {took['cpu']:.1f}"
                )
    return evaluate(context, chosen, found, others)


def evaluate(
    context: int,
    chosen: list[arms.Arm],
    found: dict[str, list[dict[str, Any]]],
    others: list[float],
) -> dict[str, Any]:
    """What follows from what was measured; the first arm is the one compared with.

    Args:
        context: Tokens of prompt and output.
        chosen: The arms.
        found: Of each arm, what each prompt took; some may be missing.
        others: Cores that other processes used in each turn.
    """
    stock = found.get(chosen[0].name, [])
    rows: dict[str, dict[str, Any]] = {}
    for arm in chosen:
        taken = found.get(arm.name)
        if not taken:
            continue
        row = rows[arm.name] = {"settings": arm.settings}
        row |= {
            part: harness.summary([each[part] for each in taken])
            for part in PARTS
            if all(part in each for each in taken)
        }
        for part in ("seconds", "cpu"):
            ratios = [own[part] / each[part] for own, each in zip(stock, taken, strict=False)]
            if ratios:
                row[f"speedup_{part}"] = statistics.median(ratios)
        counted = taken[0]["counters"]
        visible = counted.get("vllm:sparse_prompt_blocks_visible_total")
        if visible:
            needed = counted["vllm:sparse_prompt_blocks_needed_total"]
            row["needed_share_of_blocks"] = needed / visible
        row["streamed_bytes"] = counted.get("vllm:sparse_streamed_bytes_total")
        blocks = (arm.settings or {}).get("sparse_prefill")
        if blocks and stock:
            share = share_of_pairs(context - GENERATED, int(blocks), 64)
            row["share_of_pairs"] = share
            row["bound"] = statistics.median(
                each["seconds"] / (each["seconds"] - (1 - share) * each["attention"])
                for each in stock
            )
    return {
        "context": context,
        "cores_used_by_others": harness.summary(others) if others else None,
        "arms": rows,
    }


def main(arguments: list[str] | None = None) -> None:
    """Command line entry point."""
    parser = harness.parser("prompts", __doc__, "8K, one prompt")
    harness.add_model(parser, "qwen")
    parser.add_argument("--contexts", type=int, nargs="+", default=[8192, 16384, 32768])
    parser.add_argument("--rounds", type=int, default=2, help="prompts of each length")
    parser.add_argument("--engine-arg", nargs="+", default=[], metavar="KEY=JSON")
    arms.add_options(parser, ARMS, "; the first one is the baseline", trees=True)
    options = harness.parse(parser, arguments, {"contexts": [8192], "rounds": 1})
    chosen = arms.parse_arms(parser, options, baseline=True)
    body = {"model": options.model, "engine_args": options.engine_arg, "cells": []}
    body["trees"] = arms.commits(chosen)
    with Recorder(options.out, "prompts", body) as record:
        for context in options.contexts:
            done = list(body["cells"])

            def save(cell: dict, done: list[dict] = done) -> None:
                body["cells"] = [*done, cell]
                record.save()

            save(measure(context, chosen, options, save))


if __name__ == "__main__":
    main()
