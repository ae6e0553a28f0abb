# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Step time and device memory of one request against how much it has generated, arms in turns.

Engines are alive at once and one runs at a time, a few hundred tokens each, so that whatever else
the machine does meets all alike. A cell is ``PROMPT+GENERATED``, with ``-sampled`` for temperature
1 instead of 0; generations never end early. Engine and model share one process, whose CPU seconds
are counted beside the time of each step.

Cells that the result file has in full are not measured again; one that was cut short is, from its
beginning: a prompt that holds what was generated is served otherwise than a generation.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import arms, corpus, harness, offload
from benchmarks.gpu.shapes import random_prompt, save_random_llama
from benchmarks.neighbours import Neighbours
from benchmarks.published import allocated
from benchmarks.results import OtherResultError, Recorder
from benchmarks.worker import alive

if TYPE_CHECKING:
    import argparse

    from benchmarks.worker import Worker

RANDOM = "random"
SHAPE = {"layers": 4, "hidden": 256, "heads": 8, "kv_heads": 2, "head_dim": 64, "vocab": 2048}
ARMS = "dense,rocketkv-512,stage2-512,sparda-32"
MIN_CONTEXT = 64  # short prompts too are served sparsely where the policy can
PART = 1000  # generated tokens behind one point of a curve
_CELL = re.compile(r"(\d+)\+(\d+)(-sampled)?")


@dataclass(frozen=True)
class Cell:
    """A prompt and what is generated after it, in tokens."""

    name: str
    prompt: int
    generated: int
    sampled: bool

    @classmethod
    def of(cls, name: str) -> Cell:
        """The cell of a name.

        Raises:
            ValueError: It is none.
        """
        found = _CELL.fullmatch(name)
        if not found:
            raise ValueError(f"unknown cell {name!r}: expected PROMPT+GENERATED[-sampled]")
        return cls(name, int(found[1]), int(found[2]), bool(found[3]))

    @property
    def context(self) -> int:
        """Tokens that an engine has to have room for."""
        return self.prompt + self.generated + 2


def measure(
    cell: Cell, workers: list[Worker], prompt: list[int], turn: int, record: Recorder, found: dict
) -> None:
    """Generates on all arms, and notes each thousand tokens as soon as all have them.

    Args:
        cell: What to do.
        workers: Paused engines, of which each has its arm.
        prompt: Token ids.
        turn: Tokens that an arm generates before it is the next one's turn; divides `PART`.
        record: Saved after each point.
        found: Gets ``arms``, ``cores_used_by_others``, and ``complete`` in the end.
    """
    found["cores_used_by_others"] = others = []
    rows = found["arms"] = {
        worker.arm.name: {"settings": worker.arm.settings, "curve": []} for worker in workers
    }
    neighbours = Neighbours(workers, 0.0)
    request = {"max_tokens": cell.generated + 1, "temperature": float(cell.sampled)}
    for worker in workers:
        with worker.running():
            rows[worker.arm.name]["prompt_seconds"] = worker.call(
                "begin", prompts=[prompt], **request
            )
    for first in range(0, cell.generated, PART):
        last = min(first + PART, cell.generated)
        seconds: dict[str, list[float]] = {worker.arm.name: [] for worker in workers}
        cpu = dict.fromkeys(seconds, 0.0)
        for begin in range(first, last, turn):
            # The first token comes with the prompt.
            steps = min(turn, last - begin) - (begin == 0)
            for worker in harness.alternating(workers, begin // turn):
                with worker.running(), neighbours.observed(others):
                    took = worker.call("stretch", steps=steps)
                seconds[worker.arm.name] += took["seconds"]
                cpu[worker.arm.name] += took["cpu"]
        for worker in workers:
            name = worker.arm.name
            with worker.running():
                held = offload.per_request(worker.call("held"), 1)
            own = seconds[name]
            point = {
                "generated": last,
                "step_ms": 1e3 * statistics.median(own),
                "mean_ms": 1e3 * statistics.mean(own),
                "cpu_ms": 1e3 * cpu[name] / len(own),
                "blocks": held["measured"]["blocks"],
                "device_bytes": held["device_bytes"],
                "allocated_bytes": sum(allocated(held).values()),
                "host_bytes": held["host_bytes"],
            }
            rows[name]["curve"].append(point)
        record.save()
        shown = (f"{name} {row['curve'][-1]['step_ms']:.1f} ms" for name, row in rows.items())
        harness.progress(f"{cell.name}: {last} tokens: {', '.join(shown)}")
    for worker in workers:
        with worker.running():
            worker.call("finish")
    found["complete"] = True


def prompt_of(options: argparse.Namespace, model: Path, length: int) -> list[int]:
    """A document, or for the random model random tokens."""
    if options.model == RANDOM:
        return random_prompt(0, length, SHAPE["vocab"])
    return corpus.documents(harness.tokenizer_of(str(model)), 1, length)[0]


def run(options: argparse.Namespace, chosen: list[arms.Arm], record: Recorder) -> None:
    """Measures the cells that the file lacks."""
    cells = [Cell.of(name) for name in options.cells]
    found = record.body["cells"]
    missing = [cell for cell in cells if not found.get(cell.name, {}).get("complete")]
    if not missing:
        return
    longest = max(cell.context for cell in cells)
    with contextlib.ExitStack() as stack:
        overrides: dict[str, Any] = {"distributed_executor_backend": "uni", "enforce_eager": True}
        if options.model == RANDOM:
            model = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vllm-sparse-")))
            save_random_llama(model, max_position_embeddings=longest, **SHAPE)
            overrides["skip_tokenizer_init"] = True
        else:
            model = harness.resolve_model(options.model)
        arguments = harness.engine_args(
            model, longest, longest * 3 // 2, max_num_seqs=1,  # blocks with an index are larger
            enable_prefix_caching=False, **overrides,
        )  # fmt: skip
        workers = stack.enter_context(alive(chosen, arguments))
        for cell in missing:
            prompt = prompt_of(options, model, cell.prompt)
            measure(cell, workers, prompt, options.turn, record, found.setdefault(cell.name, {}))
            record.save()


def main(arguments: list[str] | None = None) -> None:
    """Command line entry point."""
    parser = harness.parser("generations", __doc__, "2,000 tokens after 256")
    parser.add_argument(
        "--model", default=RANDOM, help=f"name, alias, path, or {RANDOM}: four random layers"
    )
    parser.add_argument(
        "--cells", nargs="+", metavar="PROMPT+GENERATED[-sampled]",
        default=["512+32000", "16384+4000", "512+4000-sampled"],
    )  # fmt: skip
    parser.add_argument("--turn", type=int, default=250, help="tokens before the next arm's turn")
    arms.add_options(parser, ARMS, "; the first one is stock vLLM", trees=True)
    harness.add_threads(parser)
    options = harness.parse(parser, arguments, {"cells": ["256+2000"]})
    chosen = arms.parse_arms(parser, options, {"min_context": MIN_CONTEXT}, baseline=True)
    os.environ.setdefault("OMP_NUM_THREADS", str(options.threads))
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    names = ",".join(arm.name for arm in chosen)
    body: dict[str, Any] = {"model": options.model, "compared": names, "cells": {}}
    if trees := arms.commits(chosen):
        body["compared"] += f" of {json.dumps(trees, sort_keys=True)}"
    body["trees"] = trees
    if options.model == RANDOM:
        body["shape"] = SHAPE
    try:
        with Recorder(options.out, "generations", body, resume=True) as record:
            run(options, chosen, record)
    except (OtherResultError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
