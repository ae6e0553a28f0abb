# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Searches for launches that are faster than those that are shipped, kernel after kernel.

Coordinate descent: block, warps and stages are doubled, halved or changed by one for as long as
that helps. What counts is the geometric mean over shapes, so that no shape is paid for by another.
"""

from __future__ import annotations

import dataclasses
import inspect
import statistics
import time
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from vllm_sparse.kernels.triton import launch
from vllm_sparse.kernels.types import Ranking

from benchmarks.gpu import bounds, kernels, kernels_sparda, parity, parity_sparda, timing
from benchmarks.gpu.batches import call, make_decode, make_prompts
from benchmarks.gpu.batches_sparda import make_pool, pinned
from benchmarks.gpu.models import ITEM_BYTES, LLAMA, MINICPM, TINY, Shape

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor
    from vllm_sparse.kernels.triton.launch import Launch

    from benchmarks.gpu.stages import Report

    Run = Callable[[], object]
    Runs = list[Run]
    Seconds = tuple[float, ...]

MOST_CANDIDATES = 8
NOISE = 0.03  # a candidate must be faster by more
BLOCKS, WARPS, STAGES = (16, 8192), (1, 16), (1, 7)

CELLS = (kernels.Cell(32768, 1024, 27), kernels.Cell(131072, 1024, 1))
PAGED_CELLS = (kernels_sparda.Cell(32768, 16), kernels_sparda.Cell(131072, 1))
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
HOST_BYTES, TINY_HOST_BYTES = kernels_sparda.HOST_BYTES, 10 << 20


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
    others: Sequence[Run] = ()


class Found(NamedTuple):
    """What a search has found.

    Attributes:
        best: The fastest launch.
        times: Of each shape, by launch in the order of trial; ``None`` for one that cannot be used.
        cut: Whether time ran out.
    """

    best: Launch
    times: dict[Launch, Seconds | None]
    cut: bool


def search(
    default: Launch,
    measure: Callable[[Launch], Seconds | None],
    valid: Callable[[Launch], bool] = lambda candidate: True,
    fits: Callable[[Launch], bool] = lambda candidate: True,
    has_time: Callable[[], bool] = lambda: True,
) -> Found:
    """Descends from a launch.

    Args:
        default: Where to start.
        measure: Seconds of each shape with a launch; ``None`` if it cannot be used.
        valid: Whether a launch may be tried.
        fits: Whether a faster launch can be used for everything that is not measured.
        has_time: Whether another one may be measured.
    """
    best, times = default, {default: measure(default)}
    moved = True
    while moved:
        moved = False
        for move in _moves(default):
            while (candidate := move(best)) not in times:
                if not _is_sane(candidate) or not valid(candidate):
                    break
                if len(times) > MOST_CANDIDATES:
                    return Found(best, times, False)
                if not has_time():
                    return Found(best, times, True)
                times[candidate] = measure(candidate)
                if not _cost(times[candidate]) < (1 - NOISE) * _cost(times[best]):
                    break
                if not fits(candidate):
                    times[candidate] = None
                    break
                best, moved = candidate, True
    return Found(best, times, False)


def _moves(default: Launch) -> Iterator[Callable[[Launch], Launch]]:
    yield lambda at: at._replace(block=2 * at.block)
    yield lambda at: at._replace(block=at.block // 2)
    yield lambda at: at._replace(num_warps=2 * at.num_warps)
    yield lambda at: at._replace(num_warps=at.num_warps // 2)
    if default.num_stages > 1:  # otherwise the kernel has no loop to pipeline
        # See the table: loops that gather have half as many buffers as stages, and 5 of them.
        step = 1 if default.num_stages < 5 else 2
        yield lambda at: at._replace(num_stages=at.num_stages + step)
        yield lambda at: at._replace(num_stages=at.num_stages - step)


def _is_sane(candidate: Launch) -> bool:
    limits = zip(candidate, (BLOCKS, WARPS, STAGES), strict=True)
    return all(least <= value <= most for value, (least, most) in limits)


def _cost(seconds: Seconds | None) -> float:
    return float("inf") if seconds is None else statistics.geometric_mean(seconds)


def rocketkv(report: Report, options: argparse.Namespace) -> None:
    """Tunes the kernels of ROCKETKV, and the one that SPARDA has in common with it."""
    device = torch.device(options.device)
    generator = torch.Generator(device).manual_seed(options.seed)
    _tune_all(report, device, ROCKETKV, _rocketkv(options, generator))


def sparda(report: Report, options: argparse.Namespace) -> None:
    """Tunes the kernels that only SPARDA has."""
    device = torch.device(options.device)
    generator = torch.Generator(device).manual_seed(options.seed)
    _tune_all(report, device, SPARDA, _sparda(options, generator))


def _tune_all(
    report: Report, device: torch.device, names: Sequence[str], inputs: Iterator[Kernel]
) -> None:
    """Tunes one kernel after the other, each beside what was found for those before."""
    table = launch.launches(device)
    before = dict(table.launches)
    report.note(launches=table.origin, most_candidates=MOST_CANDIDATES, no_time_for=list(names))
    try:
        for done in range(1, len(names) + 1):
            if report.left_s < kernels.RESERVE_S:
                break
            _tune(report, device, next(inputs), table.launches)
            report.note(no_time_for=list(names[done:]))
    finally:
        table.launches.update(before)


def _tune(
    report: Report,
    device: torch.device,
    kernel: Kernel,
    table: dict[str, tuple[Launch, Launch]],
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
        partial(launch.valid, kernel.name),
        lambda candidate: tried(candidate, once) is not None,
        lambda: report.left_s > kernels.RESERVE_S + slowest,
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
    from vllm_sparse.kernels.triton import append, attention, compaction, pages, prompt, topk

    shape, cells = (TINY, kernels.TINY_CELLS) if options.tiny else (LLAMA, CELLS)
    device = generator.device
    case = parity.TINY[0] if options.tiny else parity.CASES[0]
    # Heads of as many bytes, or it would be the entry for larger ones.
    wide = dataclasses.replace(case, dim=case.dim // 2, dtype=torch.float32)
    step = make_decode(wide, device, generator)
    call(append.append_tokens, step)
    step["scores"] = call(pages.score_pages, step)
    step["slots"] = call(pages.select_slots, step)

    runs = _by_shape(
        ("score pages", "select slots", "attend slots"),
        {_name(shape, cell): _decode(shape, cell, generator) for cell in cells},
    )
    yield Kernel(
        "attend",
        runs["attend slots"] | _frames(options, generator),
        [
            partial(call, attention.attend_slots, step),
            partial(call, attention.attend_slots, {**step, "slots": None}),
        ],
    )
    yield Kernel("score_pages", runs["score pages"], [partial(call, pages.score_pages, step)])
    yield Kernel("select_slots", runs["select slots"])
    del runs, step

    window = min(kernels.WINDOW, wide.longest // 8)
    prompts = make_prompts(wide, device, generator, window=window, kept=wide.longest // 3)
    prompts["max_count"] = prompts["max_kept"] - window
    prompts["score"] = call(prompt.score_prompt, prompts)
    prompts["chosen"] = call(topk.top_indices, prompts)
    runs = _by_shape(
        ("score prompt", "top indices", "compact tokens"),
        {_name(shape, cell): _stage1(shape, cell, generator) for cell in cells},
    )
    score = partial(call, prompt.score_prompt, prompts)
    compact = partial(call, compaction.compact_tokens, prompts)
    yield Kernel("prompt", runs["score prompt"], [score])
    yield Kernel("top_indices", runs["top indices"])
    yield Kernel("compact", runs["compact tokens"], [compact])
    yield Kernel("pool", runs["score prompt"])


def _decode(
    shape: Shape, cell: kernels.Cell, generator: torch.Generator
) -> Iterator[tuple[str, Runs]]:
    """The newest token is stored before scores are made of it."""
    for name, runs, _ in kernels._kernels(shape, cell, generator.device, generator):
        if name == "append":
            for run in runs:
                run()
        yield name, runs


def _stage1(
    shape: Shape, cell: kernels.Cell, generator: torch.Generator
) -> Iterator[tuple[str, Runs, int]]:
    settings = {**kernels.SETTINGS, "token_budget": cell.budget}
    split = bounds.split_of(shape, cell.context, settings, cell.block_size)
    return kernels._stage1(shape, cell, split, generator.device, generator)


def _sparda(options: argparse.Namespace, generator: torch.Generator) -> Iterator[Kernel]:
    shape, cells = _paged(options)
    runs = _by_shape(
        ("select blocks",),
        {_name(shape, cell): kernels_sparda._selection(shape, cell, generator) for cell in cells},
    )
    yield Kernel("score_blocks", runs["select blocks"], [_wide_selection(options, generator)])
    yield Kernel("choose_blocks", runs["select blocks"])
    del runs

    size = TINY_HOST_BYTES if options.tiny else HOST_BYTES
    piece = (cells[0].blocks.block_size, 2 * shape.head_dim)
    count = size // (ITEM_BYTES * piece[0] * piece[1])
    source = pinned(torch.ones(count, *piece, dtype=torch.bfloat16), generator.device)[1]
    runs = _by_shape(
        ("resolve", "copy pieces"),
        {_name(shape, cell): _paging(shape, cell, source, generator) for cell in cells},
    )
    yield Kernel("replace", runs["resolve"])
    yield Kernel("wanted", runs["resolve"])
    yield Kernel("copy_pieces", runs["copy pieces"])
    del runs, source

    parts, wide = (_parts(options, generator, dtype) for dtype in (torch.bfloat16, torch.float32))
    yield Kernel("attend_part", parts, [run for runs in wide.values() for run in runs])
    yield Kernel("list_blocks", {name: runs for name, runs in parts.items() if "chosen" in name})


def _paged(options: argparse.Namespace) -> tuple[Shape, tuple[kernels_sparda.Cell, ...]]:
    return (TINY, kernels_sparda.TINY_CELLS) if options.tiny else (MINICPM, PAGED_CELLS)


def _frames(options: argparse.Namespace, generator: torch.Generator) -> dict[str, Runs]:
    """SPARDA attends with the same launch as ROCKETKV."""
    shape, cells = _paged(options)
    return _by_shape(
        ("attend frames",),
        {
            f"{_name(shape, cell)}, frames": kernels_sparda._attention(shape, cell, generator)
            for cell in cells
        },
    )["attend frames"]


def _paging(
    shape: Shape, cell: kernels_sparda.Cell, source: Tensor, generator: torch.Generator
) -> Iterator[tuple[str, Runs]]:
    """The grid of copies is the engine's."""
    from vllm_sparse.kernels.triton import sparda_paging

    programs = inspect.signature(sparda_paging.copy_pieces).parameters["programs"].default
    for name, runs, _, _, further in kernels_sparda._paging(shape, cell, source, generator):
        if further.get("programs", programs) == programs:
            yield name, runs


def _wide_selection(options: argparse.Namespace, generator: torch.Generator) -> Run:
    """A softmax, whose tiles are products of matrices, which a Forecast's are not."""
    from vllm_sparse.kernels.triton import sparda_select

    case = parity_sparda.TINY[0] if options.tiny else parity_sparda.CASES[0]
    case = dataclasses.replace(case, dtype=torch.float32)
    pool = make_pool(case, generator.device, generator)
    query = torch.randn(
        (case.rows, case.heads, case.dim), generator=generator, device=generator.device
    )
    ranking = Ranking(True, case.dim**-0.5, lag=1)
    arguments = (pool.compressed, query, pool.table, pool.positions, ranking, case.blocks)
    return partial(sparda_select.select_blocks, *arguments)


def _parts(
    options: argparse.Namespace, generator: torch.Generator, dtype: torch.dtype
) -> dict[str, Runs]:
    """A chunk of a prompt against a tile of what came before: all of it, and chosen blocks."""
    from vllm_sparse.kernels.triton import sparda_prefill

    shape, cells = _paged(options)
    blocks, context = cells[0].blocks, cells[0].context
    tokens, staged = (TINY_CHUNK, TINY_STAGED) if options.tiny else (CHUNK, STAGED)
    group, size = shape.heads // shape.kv_heads, blocks.block_size
    device = generator.device

    def noise(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device=device).to(dtype)

    query = noise(tokens, shape.kv_heads, group, shape.head_dim).permute(1, 2, 0, 3)
    rows = noise(shape.kv_heads, staged * size, 2 * shape.head_dim).split(shape.head_dim, -1)
    share = blocks.top_k * size / context
    chance = torch.rand((shape.kv_heads, tokens, staged), generator=generator, device=device)
    scale = shape.head_dim**-0.5
    return {
        f"{shape.name}, {tokens} x {staged * size}{name}": [
            partial(sparda_prefill.attend_part, query, *rows, chosen, False, scale, block_size=size)
        ]
        for name, chosen in (("", None), (", chosen", chance < share))
    }


def _name(shape: Shape, cell: kernels.Cell | kernels_sparda.Cell) -> str:
    return f"{shape.name}, {cell.context} x {cell.batch}"


def _by_shape(
    names: tuple[str, ...], found: dict[str, Iterator[tuple]]
) -> dict[str, dict[str, Runs]]:
    """The runs of these kernels, by kernel and shape.

    What follows the last of them is not even built.
    """
    runs: dict[str, dict[str, Runs]] = {name: {} for name in names}
    for shape, kernels_of_shape in found.items():
        for name, each, *_ in kernels_of_shape:
            if name in runs:
                runs[name][shape] = each
            if name == names[-1]:
                break
    return runs
