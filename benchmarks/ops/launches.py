# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Which operations decide each entry of the launch table, and the search for faster ones."""

from __future__ import annotations

import inspect
import time
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from vllm_sparse.kernels.triton import launch

from benchmarks.gpu.shapes import LLAMA, MINICPM, TINY
from benchmarks.ops import rocketkv, sparda, sparda_timings, timings
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
    *("attend", "select_slots"),
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
    """An entry of the table, and by shape the runs that it is timed with.

    `others` run once with a launch that is about to be chosen: what is not tuned for, float32 above
    all, has the same launches and must fit too.
    """

    name: str
    runs: dict[str, Runs]
    others: Sequence[Callable[[], object]] = ()


def tune(kind: str, report: Report, options: argparse.Namespace) -> None:
    """Tunes one kernel after the other, each beside what was found for those before.

    Args:
        kind: ``rocketkv``, with what SPARDA has in common with it, or ``sparda``.
        report: Gets a row for each kernel and shape.
        options: From the command line.
    """
    device = torch.device(options.device)
    names, inputs = {"rocketkv": (ROCKETKV, _rocketkv), "sparda": (SPARDA, _sparda)}[kind]
    every = inputs(options.tiny, torch.Generator(device).manual_seed(options.seed))
    table = launch.launches(device)
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
        return tuple(timings.seconds_each(runs, device) for runs in kernel.runs.values())

    def once() -> Seconds:
        for run in kernel.others:
            run()
        return ()

    found = search(
        default,
        lambda candidate: tried(candidate, seconds),
        partial(launch.valid, kernel.name),
        lambda candidate: tried(candidate, once) is not None,
        lambda: report.left_s > RESERVE_S + slowest,
    )
    table[kernel.name] = (found.best, large)
    first, best = found.times[default], found.times[found.best]
    for index, shape in enumerate(kernel.runs):
        report.add(
            kernel=kernel.name, shape=shape, shipped=list(default),
            shipped_us=None if first is None else round(1e6 * first[index], 2),
            launch=None if best is None else list(found.best), larger_heads=list(large),
            us=None if best is None else round(1e6 * best[index], 2), tried=len(found.times) - 1,
            unusable={tiles: reason[:200] for tiles, reason in reasons.items()},
            cut=found.cut,
        )  # fmt: skip


# Inputs, built when their turn comes.


def _rocketkv(tiny: bool, generator: torch.Generator) -> Iterator[Kernel]:
    shape, cells = (TINY, rocketkv.TINY_CELLS) if tiny else (LLAMA, rocketkv.TUNED_CELLS)
    case = rocketkv.in_float32((rocketkv.TINY_CASES if tiny else rocketkv.CASES)[0])
    wide = _once(rocketkv.STEP, make_decode(case, generator.device, generator))
    names = ("select slots", "attend slots")
    runs = _runs(names, shape, cells, rocketkv.decode_timings, generator)
    # SPARDA attends with the same launch.
    frames = _paged(tiny, ("attend frames",), sparda_timings.attention, generator)
    both = runs["attend slots"] | {
        f"{name}, frames": found for name, found in frames["attend frames"].items()
    }
    yield Kernel("attend", both, [wide["attend slots"], wide["attend all kept"]])
    yield Kernel("select_slots", runs["select slots"], [wide["select slots"]])
    del runs, frames, both

    wide = _once(rocketkv.PROMPT, rocketkv.wide_prompts(case, generator.device, generator))
    names = ("score prompt", "top indices", "compact tokens")
    runs = _runs(names, shape, cells, rocketkv.prompt_timings, generator)
    yield Kernel("prompt", runs["score prompt"], [wide["score prompt"]])
    yield Kernel("top_indices", runs["top indices"])
    yield Kernel("compact", runs["compact tokens"], [wide["compact tokens"]])
    yield Kernel("pool", runs["score prompt"])


def _once(ops: Sequence[Op], arguments: Arguments) -> dict[str, Callable[[], object]]:
    """Runs a chain, and returns its operations to be run again."""
    runs = {}
    for op in ops:
        runs[op.name] = partial(call, triton(op.kernel), {**arguments, **op.fixed})
        found = runs[op.name]()
        if op.gives:
            arguments[op.gives] = found
    return runs


def _sparda(tiny: bool, generator: torch.Generator) -> Iterator[Kernel]:
    runs = _paged(tiny, ("select blocks",), sparda_timings.selection, generator)
    # A softmax, whose tiles are products of matrices, which a Forecast's are not.
    case = rocketkv.in_float32((sparda.TINY_CASES if tiny else sparda.CASES)[0])
    arguments = sparda.selections(case, make_pool(case, generator.device, generator), generator)
    wide = partial(call, triton("select_blocks"), {**arguments["softmax"], "dense_len": 0})
    yield Kernel("score_blocks", runs["select blocks"], [wide])
    yield Kernel("choose_blocks", runs["select blocks"])
    del runs, arguments, wide

    paging = partial(_paging, TINY_HOST_BYTES if tiny else HOST_BYTES)
    runs = _paged(tiny, ("resolve", "copy pieces"), paging, generator)
    yield Kernel("replace", runs["resolve"])
    yield Kernel("wanted", runs["resolve"])
    yield Kernel("copy_pieces", runs["copy pieces"])
    del runs

    parts, wide = (_parts(tiny, generator, dtype) for dtype in (torch.bfloat16, torch.float32))
    yield Kernel("attend_part", parts, [run for runs in wide.values() for run in runs])
    yield Kernel("list_blocks", {name: runs for name, runs in parts.items() if "chosen" in name})


def _paging(size: int, shape: Any, cell: Any, generator: torch.Generator) -> Iterator[Timed]:
    """The grid of copies is the engine's."""
    programs = inspect.signature(triton("copy_pieces")).parameters["programs"].default
    for work in sparda_timings.paging(shape, cell, size, generator):
        if work.further.get("programs", programs) == programs:
            yield work


def _parts(tiny: bool, generator: torch.Generator, dtype: torch.dtype) -> dict[str, Runs]:
    """A chunk of a prompt against a tile of what came before: all of it, and chosen blocks."""
    shape, cells = _shapes(tiny)
    blocks, context = cells[0].blocks, cells[0].context
    tokens, staged = (TINY_CHUNK, TINY_STAGED) if tiny else (CHUNK, STAGED)
    group, size, device = shape.heads // shape.kv_heads, blocks.block_size, generator.device

    def noise(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator, device=device).to(dtype)

    query = noise(tokens, shape.kv_heads, group, shape.head_dim).permute(1, 2, 0, 3)
    rows = noise(shape.kv_heads, staged * size, 2 * shape.head_dim).split(shape.head_dim, -1)
    chance = torch.rand((shape.kv_heads, tokens, staged), generator=generator, device=device)
    chosen = chance < blocks.top_k * size / context
    attend = partial(triton("attend_part"), query, *rows, block_size=size)
    name = f"{shape.name}, {tokens} x {staged * size}"
    return {
        f"{name}{suffix}": [partial(attend, chosen=which, scale=shape.head_dim**-0.5)]
        for suffix, which in (("", None), (", chosen", chosen))
    }


def _shapes(tiny: bool) -> tuple[Any, Any]:
    return (TINY, sparda.TINY_CELLS) if tiny else (MINICPM, sparda.TUNED_CELLS)


def _paged(
    tiny: bool, names: tuple[str, ...], timings: Callable[..., Any], generator: torch.Generator
) -> dict[str, dict[str, Runs]]:
    return _runs(names, *_shapes(tiny), timings, generator)


def _runs(
    names: tuple[str, ...],
    shape: Any,
    cells: Sequence[Any],
    timings: Callable[..., Iterator[Timed]],
    generator: torch.Generator,
) -> dict[str, dict[str, Runs]]:
    """The runs of these operations, by operation and shape.

    What follows the last of them is not even built.
    """
    runs: dict[str, dict[str, Runs]] = {name: {} for name in names}
    for cell in cells:
        for work in timings(shape, cell, generator):
            if work.name in runs:
                runs[work.name][f"{shape.name}, {cell.context} x {cell.batch}"] = work.runs
            if work.name == names[-1]:
                break
    return runs
