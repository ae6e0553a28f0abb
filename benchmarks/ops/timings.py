# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Operations alone: time a layer, bytes per second, and how far that is from a copy's.

Bytes are the fewest that the kernel must move, not what it moves. As many layers are run in turn as
it takes for what they read to outgrow the cache, in graphs that are replayed between events.
"""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any

import torch

from benchmarks import cost, predictions
from benchmarks.gpu import shapes
from benchmarks.ops import rocketkv, sparda, sparda_timings
from benchmarks.ops.registry import COLD_BYTES, Timed

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from benchmarks.gpu.stages import Report

RESERVE_S = 6.0
KINDS: dict[str, tuple[Any, Any, shapes.Shape]] = {
    "rocketkv": (rocketkv, rocketkv.timings, shapes.LLAMA),
    "sparda": (sparda, sparda_timings.timings, shapes.MINICPM),
}
REPLAYS = 15
HEAD_START_CYCLES = 1_000_000  # about half a millisecond, in which the host launches the work


def measure(kind: str, report: Report, options: argparse.Namespace) -> None:
    """Measures all cells, as long as there is time."""
    ops, timings, shape = KINDS[kind]
    device, size = torch.device(options.device), 0.01 if options.tiny else 2.0
    copy = copy_bytes_per_s(device, size)
    link = link_bytes_per_s(device, size / 2)
    report.note(
        shape=shapes.TINY.name if options.tiny else shape.name,
        copy_gb_per_s=round(copy / 1e9, 1),
        link_gb_per_s={key: round(value / 1e9, 2) for key, value in link.items()},
        seed=options.seed,
        **predictions.facts(expected := predictions.expected_of(device, copy)),
    )
    of_model = shapes.TINY if options.tiny else shape
    left_out = []
    for cell in ops.TINY_CELLS if options.tiny else ops.CELLS:
        if report.left_s < RESERVE_S:
            left_out.append(cell._asdict())
            continue
        generator = torch.Generator(device).manual_seed(options.seed)
        # Its tables are as wide as those of an engine only where there is a GPU.
        case = cost.Case(*cell[:3], rocketkv.LONGEST) if kind == "rocketkv" else None
        facts = {key: value for key, value in cell._asdict().items() if isinstance(value, int)}
        parts = timings(options.tiny, cell, device, generator)
        for work, found in each_seconds(parts, device):
            if isinstance(found, str):
                report.add(**facts, kernel=work.name, error=found)
                continue
            peak = {"copy": copy, "link": link["host_to_device"]}[work.over]
            report.add(
                **facts,
                kernel=work.name,
                **work.further,
                # What is read again may still be in the cache.
                warm=len(work.runs) * work.least < COLD_BYTES,
                layers=len(work.runs),
                us=round(1e6 * found, 2),
                predicted_us=predictions.kernel_us(work.name, work.least, expected, case, of_model),
                least_bytes=work.least,
                gb_per_s=round(work.least / found / 1e9, 2),
                **{f"share_of_{work.over}": round(work.least / found / peak, 4)},
            )
        if device.type == "cuda":
            torch.cuda.empty_cache()
    report.note(no_time_for=left_out)


def seconds_each(runs: Sequence[Callable[[], object]], device: torch.device) -> float:
    """Median seconds of one of the runs, which are alike but have inputs of their own.

    They are captured one after the other in one graph, as the layers of a model are, so that
    neither launches nor what the run before left in the cache count.

    Args:
        runs: Launch work on the device; do not wait for it.
        device: A CPU is timed too, for try-outs.
    """
    if device.type != "cuda":
        runs[0]()
        started = time.perf_counter()
        for run in runs:
            run()
        return (time.perf_counter() - started) / len(runs)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        runs[0]()  # compiles, allocates
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    return median_ms(graph.replay) / 1e3 / len(runs)


def each_seconds(
    parts: Mapping[str, Callable[[], Iterator[Timed]]], device: torch.device
) -> Iterator[tuple[Timed, float | str]]:
    """Times what the parts yield; a kernel or a set-up that fails costs nothing else.

    Triton's errors have nothing in common but that they are exceptions.

    Yields:
        What the part has yielded, and the seconds or why there are none. If its set-up fails, its
        name and no runs.
    """
    for name, part in parts.items():
        operations = part()
        while True:
            try:
                work = next(operations)
            except StopIteration:
                break
            except Exception as error:
                yield Timed(name, [], 0), _reason(error, device)
                break
            try:
                found: float | str = seconds_each(work.runs, device)
            except Exception as error:
                found = _reason(error, device)
            yield work, found


def _reason(error: Exception, device: torch.device) -> str:
    if device.type == "cuda":
        torch.cuda.synchronize()  # raises if the context is lost
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


def median_ms(run: Callable[[], object], repeats: int = REPLAYS) -> float:
    """Median milliseconds between events around a run."""
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # An idle device would count the time from the first event until the work arrives.
        torch.cuda._sleep(HEAD_START_CYCLES)
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def copy_bytes_per_s(device: torch.device, gib: float = 2.0) -> float:
    """Bytes read plus bytes written per second by a large copy on the device."""
    source = torch.randint(1 << 30, (int(gib * 2**30) // 4,), dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _seconds(lambda: target.copy_(source), device)


def link_bytes_per_s(device: torch.device, gib: float = 1.0) -> dict[str, float]:
    """Bytes per second of large copies from pinned host memory, and back to it."""
    host = torch.randint(
        1 << 30, (int(gib * 2**30) // 4,), dtype=torch.int32, pin_memory=device.type == "cuda"
    )
    there = torch.empty_like(host, device=device)
    return {
        "host_to_device": host.nbytes / _seconds(lambda: there.copy_(host, True), device),
        "device_to_host": host.nbytes / _seconds(lambda: host.copy_(there, True), device),
    }


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        return median_ms(run) / 1e3
    return seconds_each([run], device)
