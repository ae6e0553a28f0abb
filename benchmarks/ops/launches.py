# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Which operations decide each entry of the launch table, and the search for faster ones."""

from __future__ import annotations

import dataclasses
import inspect
import time
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from benchmarks.gpu.shapes import LLAMA, MINICPM, TINY
from benchmarks.ops import kernels, rocketkv, sparda, sparda_timings, timing
from benchmarks.ops.kernels import call, triton
from benchmarks.ops.rocketkv_inputs import make_decode
from benchmarks.ops.search import MOST_CANDIDATES, search
from benchmarks.ops.sparda_inputs import make_pool
from benchmarks.ops.timings import RESERVE_S

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator, Sequence

    from benchmarks.gpu.stages import Report
    from benchmarks.ops.registry import Arguments, Op, Runs, Timed
    from benchmarks.ops.search import Launch, Seconds

# Entries of the table. Those that take most of a step come first, then those of prompts.
ROCKETKV = (
    *("attend", "score_pages", "select_slots"),
    *("prompt", "top_indices", "compact", "pool"),
)
SPARDA = (
    *("score_blocks", "choose_blocks", "replace", "wanted", "copy_pieces"),
    *("attend_part", "list_blocks"),
)
CHUNK, TINY_CHUNK = 2048, 64  # tokens of a prompt that are computed at once
STAGED, TINY_STAGED = 32, 4  # blocks that come back to the device at once
HOST_BYTES, TINY_HOST_BYTES = sparda_timings.HOST_BYTES, 10 << 20


class Kernel(NamedTuple):
    """What a search needs.

    Attributes:
        name: Of an entry of the table.
        runs: By shape, what `timing.seconds_each` times.
        others: Run once with a launch that is about to be chosen. What is not tuned for, float32
            above all, has the same launches and must fit too.
    """

    name: str
    runs: dict[str, Runs]
    others: Sequence[Callable[[], object]] = ()


def tune_rocketkv(report: Report, options: argparse.Namespace) -> None:
    """Tunes the kernels of ROCKETKV, and the one that SPARDA has in common with it."""
    _tune_all(report, options, ROCKETKV, _rocketkv)


def tune_sparda(report: Report, options: argparse.Namespace) -> None:
    """Tunes the kernels that only SPARDA has."""
    _tune_all(report, options, SPARDA, _sparda)


def _tune_all(
    report: Report,
    options: argparse.Namespace,
    names: Sequence[str],
    inputs: Callable[..., Iterator[Kernel]],
) -> None:
    """Tunes one kernel after the other, each beside what was found for those before."""
    device = torch.device(options.device)
    every = inputs(options, torch.Generator(device).manual_seed(options.seed))
    table = kernels.launches().launches(device)
    before = dict(table.launches)
    report.note(launches=table.origin, most_candidates=MOST_CANDIDATES, no_time_for=list(names))
    try:
        for done in range(1, len(names) + 1):
            if report.left_s < RESERVE_S:
                break
            _tune(report, device, next(every), table.launches)
            report.note(no_time_for=list(names[done:]))
    finally:
        table.launches.update(before)


def _tune(
    report: Report, device: torch.device, kernel: Kernel, table: dict[str, tuple[Launch, Launch]]
) -> None:
    """Adds a row for each shape and leaves the best launch in the table."""
    default, large = table[kernel.name]
    reasons: dict[str, str] = {}
    slowest = 0.0

    def tried(candidate: Launch, work: Callable[[], Seconds]) -> Seconds | None:
        """What the work returns; ``None`` if it cannot be done with the launch."""
        nonlocal slowest
        table[kernel.name] = (candidate, large)
        started = time.monotonic()
        try:
            return work()
        except Exception as error:  # those of Triton have no base class of their own
            reasons[str(list(candidate))] = " ".join(f"{type(error).__name__}: {error}".split())
            if device.type == "cuda":
                torch.cuda.synchronize()  # raises if the context is lost
            return None
        finally:
            slowest = max(slowest, time.monotonic() - started)

    def seconds() -> Seconds:
        return tuple(timing.seconds_each(runs, device) for runs in kernel.runs.values())

    def once() -> Seconds:
        for run in kernel.others:
            run()
        return ()

    found = search(
        default,
        lambda candidate: tried(candidate, seconds),
        partial(kernels.launches().valid, kernel.name),
        lambda candidate: tried(candidate, once) is not None,
        lambda: report.left_s > RESERVE_S + slowest,
    )
    table[kernel.name] = (found.best, large)
    first, best = found.times[default], found.times[found.best]
    for index, shape in enumerate(kernel.runs):
        report.add(
            kernel=kernel.name,
            shape=shape,
            shipped=list(default),
            shipped_us=None if first is None else round(1e6 * first[index], 2),
            launch=None if best is None else list(found.best),
            larger_heads=list(large),
            us=None if best is None else round(1e6 * best[index], 2),
            tried=len(found.times) - 1,
            unusable={tiles: reason[:200] for tiles, reason in reasons.items()},
            cut=found.cut,
        )


# Inputs, built when their turn comes.


def _rocketkv(options: argparse.Namespace, generator: torch.Generator) -> Iterator[Kernel]:
    tiny = options.tiny
    shape, cells = (TINY, rocketkv.TINY_CELLS) if tiny else (LLAMA, rocketkv.TUNED_CELLS)
    case = rocketkv.in_float32((rocketkv.TINY_CASES if tiny else rocketkv.CASES)[0])
    step = make_decode(case, generator.device, generator)
    wide = _once(rocketkv.STEP, step)
    runs = _by_shape(
        ("score pages", "select slots", "attend slots"),
        {
            f"{shape.name}, {cell.context} x {cell.batch}": rocketkv.decode_timings(
                shape, cell, generator
            )
            for cell in cells
        },
    )
    frames = {f"{name}, frames": found for name, found in _frames(options, generator).items()}
    others = [wide["attend slots"], wide["attend all kept"]]
    yield Kernel("attend", runs["attend slots"] | frames, others)
    yield Kernel("score_pages", runs["score pages"], [wide["score pages"]])
    yield Kernel("select_slots", runs["select slots"])
    del runs, step, frames

    wide = _once(rocketkv.PROMPT, rocketkv.wide_prompts(case, generator.device, generator))
    runs = _by_shape(
        ("score prompt", "top indices", "compact tokens"),
        {
            f"{shape.name}, {cell.context} x {cell.batch}": rocketkv.prompt_timings(
                shape, cell, generator
            )
            for cell in cells
        },
    )
    yield Kernel("prompt", runs["score prompt"], [wide["score prompt"]])
    yield Kernel("top_indices", runs["top indices"])
    yield Kernel("compact", runs["compact tokens"], [wide["compact tokens"]])
    yield Kernel("pool", runs["score prompt"])


def _once(ops: Sequence[Op], arguments: Arguments) -> dict[str, Callable[[], object]]:
    """Runs a chain, and returns its operations to be run again."""
    runs = {}
    for op in ops:
        own = {**arguments, **op.fixed}
        runs[op.name] = partial(call, triton(op.kernel), own)
        found = runs[op.name]()
        if op.gives:
            arguments[op.gives] = found
    return runs


def _sparda(options: argparse.Namespace, generator: torch.Generator) -> Iterator[Kernel]:
    runs = _paged(options, ("select blocks",), generator, sparda_timings.selection)
    others = [_wide_selection(options, generator)]
    yield Kernel("score_blocks", runs["select blocks"], others)
    yield Kernel("choose_blocks", runs["select blocks"])
    del runs

    size = TINY_HOST_BYTES if options.tiny else HOST_BYTES
    runs = _paged(options, ("resolve", "copy pieces"), generator, partial(_paging, size))
    yield Kernel("replace", runs["resolve"])
    yield Kernel("wanted", runs["resolve"])
    yield Kernel("copy_pieces", runs["copy pieces"])
    del runs

    parts, wide = (_parts(options, generator, dtype) for dtype in (torch.bfloat16, torch.float32))
    yield Kernel("attend_part", parts, [run for runs in wide.values() for run in runs])
    yield Kernel("list_blocks", {name: runs for name, runs in parts.items() if "chosen" in name})


def _paged(
    options: argparse.Namespace,
    names: tuple[str, ...],
    generator: torch.Generator,
    timings: Callable[..., Iterator[Timed]],
) -> dict[str, dict[str, Runs]]:
    shape, cells = (TINY, sparda.TINY_CELLS) if options.tiny else (MINICPM, sparda.TUNED_CELLS)
    found = {
        f"{shape.name}, {cell.context} x {cell.batch}": timings(shape, cell, generator)
        for cell in cells
    }
    return _by_shape(names, found)


def _frames(options: argparse.Namespace, generator: torch.Generator) -> dict[str, Runs]:
    """SPARDA attends with the same launch as ROCKETKV."""
    return _paged(options, ("attend frames",), generator, sparda_timings.attention)["attend frames"]


def _paging(size: int, shape: Any, cell: Any, generator: torch.Generator) -> Iterator[Timed]:
    """The grid of copies is the engine's."""
    programs = inspect.signature(triton("copy_pieces")).parameters["programs"].default
    for work in sparda_timings.paging(shape, cell, size, generator):
        if work.further.get("programs", programs) == programs:
            yield work


def _wide_selection(
    options: argparse.Namespace, generator: torch.Generator
) -> Callable[[], object]:
    """A softmax, whose tiles are products of matrices, which a Forecast's are not."""
    case = (sparda.TINY_CASES if options.tiny else sparda.CASES)[0]
    case = dataclasses.replace(case, dtype=torch.float32)
    pool = make_pool(case, generator.device, generator)
    arguments = sparda.selections(case, pool, generator)["softmax"]
    return partial(call, triton("select_blocks"), {**arguments, "dense_len": 0})


def _parts(
    options: argparse.Namespace, generator: torch.Generator, dtype: torch.dtype
) -> dict[str, Runs]:
    """A chunk of a prompt against a tile of what came before: all of it, and chosen blocks."""
    shape, cells = (TINY, sparda.TINY_CELLS) if options.tiny else (MINICPM, sparda.TUNED_CELLS)
    blocks, context = cells[0].blocks, cells[0].context
    tokens, staged = (TINY_CHUNK, TINY_STAGED) if options.tiny else (CHUNK, STAGED)
    group, size = shape.heads // shape.kv_heads, blocks.block_size
    device = generator.device

    def noise(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator, device=device).to(dtype)

    query = noise(tokens, shape.kv_heads, group, shape.head_dim).permute(1, 2, 0, 3)
    rows = noise(shape.kv_heads, staged * size, 2 * shape.head_dim).split(shape.head_dim, -1)
    share = blocks.top_k * size / context
    chance = torch.rand((shape.kv_heads, tokens, staged), generator=generator, device=device)
    scale = shape.head_dim**-0.5
    attend = triton("attend_part")
    return {
        f"{shape.name}, {tokens} x {staged * size}{name}": [
            partial(attend, query, *rows, chosen, False, scale, block_size=size)
        ]
        for name, chosen in (("", None), (", chosen", chance < share))
    }


def _by_shape(
    names: tuple[str, ...], found: dict[str, Iterator[Timed]]
) -> dict[str, dict[str, Runs]]:
    """The runs of these operations, by operation and shape.

    What follows the last of them is not even built.
    """
    runs: dict[str, dict[str, Runs]] = {name: {} for name in names}
    for shape, works in found.items():
        for work in works:
            if work.name in runs:
                runs[work.name][shape] = work.runs
            if work.name == names[-1]:
                break
    return runs
