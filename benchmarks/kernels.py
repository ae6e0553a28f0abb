# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The C++ kernels alone: time a layer, and how far a decode step is from moving its bytes once.

What is timed is the registry's (`benchmarks.ops`): a whole decode step in both dtypes of the cache,
and the operations of it that have a kernel in C++, but for writing SPARDA's tokens. Layers have
inputs of their own, together larger than the processor's cache, and are visited in turn, as in a
model. The floor is the bytes that one layer must read over the bandwidth of a sequential read: the
best of several passes, since others can only slow one down.

What is timed is in the result file at once. A file that was cut short is gone on with, unless the
code has changed since.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from vllm_sparse.kernels.cpu.memory import back_with_huge_pages
from vllm_sparse.kernels.fp8 import FP8, Scales
from vllm_sparse.kernels.types import Blocks

from benchmarks import harness
from benchmarks.gpu.shapes import LLAMA
from benchmarks.ops import rocketkv, sparda, sparda_timings
from benchmarks.ops.kernels import cpu, has_cpp, reference
from benchmarks.ops.registry import COLD_BYTES, timed
from benchmarks.results import OtherResultError, Recorder, commit

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator
    from pathlib import Path

    from benchmarks.ops.registry import Arguments, Kernels, Runs, Timed
    from vllm_sparse.planner.shapes import Shape

WHOLE, *PARTS = rocketkv.STEP
# Operations beside the whole step that have a kernel in C++.
CPP = {op.name for op in (*PARTS, sparda.SELECT, sparda.ATTEND) if has_cpp(op.kernel)}
CPP |= {"resolve", "copy pieces"}
BLOCK_SIZE, GENERATED = 128, 128
SCALES = Scales(truncates=True)
PASSES = 7
# Options by name: default, and what they say.
OPTIONS = {
    "context": (8192, "tokens of each request"),
    "batch": (8, "requests"),
    "budget": (512, "token budget; SPARDA reads as many tokens in blocks"),
    "kv_heads": (3, "default: SmolLM2-135M's shape"),
    "group": (3, "query heads per KV head"),
    "dim": (64, "head size"),
    "layers": (30, "each with inputs of its own"),
    "rounds": (6, "over all layers"),
    "threads": (torch.get_num_threads(), "of the processor"),
}


def read_bandwidth(*tensors: torch.Tensor, passes: int = PASSES) -> float:
    """Bytes per second of the fastest of some sequential reads of all tensors."""
    numbers = [tensor.flatten().view(torch.int64) for tensor in tensors]
    seconds = []
    for _ in range(passes):
        started = time.perf_counter()
        for each in numbers:
            each.sum()
        seconds.append(time.perf_counter() - started)
    return sum(each.nbytes for each in numbers) / min(seconds)


def in_turns(works: dict[str, Runs], rounds: int) -> dict[str, dict[str, float]]:
    """Microseconds of a run of each, run by run in turns."""

    def took(run: Any) -> float:
        started = time.perf_counter()
        run()
        return (time.perf_counter() - started) * 1e6

    for runs in works.values():
        runs[0]()
    turns = [
        [took(run) for run in turn]
        for _ in range(rounds)
        for turn in zip(*works.values(), strict=True)
    ]
    return {
        name: {"us": statistics.median(times), "us_p10": sorted(times)[len(times) // 10]}
        for name, times in zip(works, zip(*turns, strict=True), strict=True)
    }


def measure(options: argparse.Namespace, record: Recorder) -> None:
    """Times what the file lacks."""
    result = record.body["result"]
    times = result.setdefault("variants", {})

    def add(works: dict[str, Runs], rounds: int = options.rounds, **further: int) -> None:
        if works.keys() <= times.keys():
            return
        times.update({name: {**each, **further} for name, each in in_turns(works, rounds).items()})
        record.save()
        harness.progress(", ".join(f"{name} {times[name]['us']:.0f} us" for name in works))

    def whole(steps: list[Arguments], kernels: Kernels = cpu, **further: Any) -> Runs:
        (work,) = timed([WHOLE], [{**step, **further} for step in steps], sizes, kernels)
        return work.runs

    heads = {"heads": options.kv_heads * options.group, "kv_heads": options.kv_heads}
    shape = replace(LLAMA, **heads, head_dim=options.dim, layers=options.layers)
    cell = rocketkv.Cell(options.context - GENERATED, options.budget, options.batch, BLOCK_SIZE)
    generator = torch.Generator().manual_seed(0)
    steps, sizes = rocketkv.decode_steps(shape, cell, generator, options.layers)
    split, read = sizes.split, WHOLE.least(sizes)
    kept = {"kept_tokens": split.held, "top_r": split.top_r, "top_k": split.top_k}
    result |= {**kept, "bytes_read": read}

    add({"fused, small pages": whole(steps)})
    narrow = [{**step, "cache": step["cache"].to(FP8), "scales": SCALES} for step in steps]
    for step in (*steps, *narrow):
        back_with_huge_pages(step["cache"])
    add({"fused": whole(steps), "fused, fp8": whole(narrow)})
    if "over_floor" not in result:
        bandwidth = read_bandwidth(*(step["cache"] for step in steps))
        floor = read / bandwidth * 1e6
        result |= {"sequential_read_gb_per_s": bandwidth / 1e9, "floor_us": floor}
        result["over_floor"] = times["fused"]["us"] / floor
        record.save()
    every = {f"fused, every kept token{end}": whole(own, read_all=True)
             for end, own in (("", steps), (", fp8", narrow))}  # fmt: skip
    add(every)
    add({"reference": whole(steps, reference)}, 1)
    for work in chain(timed(PARTS, steps, sizes, cpu), paged(shape, options, generator)):
        if work.name in CPP:  # the others only prepare its inputs
            add({work.name: work.runs}, least_bytes=work.least)


def paged(shape: Shape, options: argparse.Namespace, generator: torch.Generator) -> Iterator[Timed]:
    """SPARDA's operations."""
    blocks = Blocks(64, 16, 1, 2, max(4, options.budget // 64))
    cell = sparda.Cell(options.context, options.batch, blocks)
    own = {"generator": generator, "kernels": cpu}
    yield from sparda_timings.selection(shape, cell, layers=options.layers, **own)
    yield from sparda_timings.paging(shape, cell, COLD_BYTES, grids=(1,), **own)
    yield from sparda_timings.attention(shape, cell, layers=options.layers, **own)


def is_unfinished(path: Path) -> bool:
    """Whether a run of these very kernels was cut short that wrote this file."""
    if not path.exists():
        return False
    found, ours = json.loads(path.read_text()), commit()
    same = found.get("environment", {}).get("commit") == ours and ours is not None
    return found.get("complete") is False and same and not ours.endswith("-dirty")


def main(arguments: list[str] | None = None) -> None:
    """Command line entry point."""
    parser = harness.parser("kernels", __doc__)
    for name, (default, about) in OPTIONS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=about)
    options = harness.parse(parser, arguments)
    torch.set_num_threads(options.threads)
    body = {**{name: getattr(options, name) for name in OPTIONS}, "complete": False, "result": {}}
    try:
        with Recorder(options.out, "kernels", body, resume=is_unfinished(options.out)) as record:
            measure(options, record)
            record.body["complete"] = True
    except OtherResultError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
