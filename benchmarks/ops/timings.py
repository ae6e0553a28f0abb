# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Operations alone: time a layer, bytes per second, and how far that is from a copy's.

Bytes are the fewest that the kernel must move, not what it moves. As many layers are run in turn as
it takes for what they read to outgrow the cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from benchmarks.gpu import shapes
from benchmarks.ops import rocketkv, sparda, sparda_timings, timing
from benchmarks.ops.registry import COLD_BYTES

if TYPE_CHECKING:
    import argparse

    from benchmarks.gpu.stages import Report

RESERVE_S = 6.0
KINDS: dict[str, tuple[Any, Any, shapes.Shape]] = {
    "rocketkv": (rocketkv, rocketkv.timings, shapes.LLAMA),
    "sparda": (sparda, sparda_timings.timings, shapes.MINICPM),
}


def measure(kind: str, report: Report, options: argparse.Namespace) -> None:
    """Measures all cells, as long as there is time."""
    ops, timings, shape = KINDS[kind]
    device, size = torch.device(options.device), 0.01 if options.tiny else 2.0
    copy = timing.copy_bytes_per_s(device, size)
    link = timing.link_bytes_per_s(device, size / 2)
    report.note(
        shape=shapes.TINY.name if options.tiny else shape.name,
        copy_gb_per_s=round(copy / 1e9, 1),
        link_gb_per_s={key: round(value / 1e9, 2) for key, value in link.items()},
        seed=options.seed,
    )
    left_out = []
    for cell in ops.TINY_CELLS if options.tiny else ops.CELLS:
        if report.left_s < RESERVE_S:
            left_out.append(cell._asdict())
            continue
        generator = torch.Generator(device).manual_seed(options.seed)
        facts = {key: value for key, value in cell._asdict().items() if isinstance(value, int)}
        parts = timings(options.tiny, cell, device, generator)
        for work, found in timing.each_seconds(parts, device):
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
                least_bytes=work.least,
                gb_per_s=round(work.least / found / 1e9, 2),
                **{f"share_of_{work.over}": round(work.least / found / peak, 4)},
            )
        if device.type == "cuda":
            torch.cuda.empty_cache()
    report.note(no_time_for=left_out)
