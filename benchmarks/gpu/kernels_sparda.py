# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""SPARDA's kernels alone, as in `kernels`; copies are measured against the link.

A step reads as many blocks as the slab has frames, and every tenth is another one than in the step
before. So the steps of a cycle miss the same share, however often they are replayed.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from vllm_sparse.kernels.types import Blocks, Ranking

from benchmarks.gpu import bounds, timing
from benchmarks.gpu.batches_sparda import empty_table, pinned
from benchmarks.gpu.kernels import COLD_BYTES, MOST_LAYERS, RESERVE_S
from benchmarks.gpu.models import ITEM_BYTES, MINICPM, TINY, Shape

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from benchmarks.gpu.stages import Report

    Runs = list[Callable[[], object]]

ONE_IN = 10  # blocks that are new in a step
PROGRAMS = (8, 16, 32, 64)
HOST_BYTES = 1 << 30  # of pinned memory that pieces are copied from, far beyond any cache


class Cell(NamedTuple):
    """One shape.

    Attributes:
        context: Tokens of each request.
        batch: Requests.
        blocks: Which blocks are read; MiniCPM4.1's.
    """

    context: int
    batch: int
    blocks: Blocks = Blocks(64, 16, 1, 32, 96)


CELLS = (Cell(32768, 16), Cell(32768, 1), Cell(131072, 16), Cell(131072, 1))
TINY_CELLS = (Cell(600, 2, Blocks(32, 16, 1, 2, 10)),)


def measure(report: Report, options: argparse.Namespace) -> None:
    """Measures all cells, as long as there is time."""
    device = torch.device(options.device)
    shape, cells = (TINY, TINY_CELLS) if options.tiny else (MINICPM, CELLS)
    size = 0.01 if options.tiny else 1.0
    copy = timing.copy_bytes_per_s(device, size)
    link = timing.link_bytes_per_s(device, size)["host_to_device"]
    report.note(
        shape=shape.name,
        copy_gb_per_s=round(copy / 1e9, 1),
        link_gb_per_s=round(link / 1e9, 2),
        seed=options.seed,
    )
    generator = torch.Generator(device).manual_seed(options.seed)
    piece = (cells[0].blocks.block_size, 2 * shape.head_dim)
    count = int(size * HOST_BYTES) // (ITEM_BYTES * piece[0] * piece[1])
    source = pinned(torch.ones(count, *piece, dtype=torch.bfloat16), device)[1]
    left_out = []
    for cell in cells:
        if report.left_s < RESERVE_S:
            left_out.append((cell.context, cell.batch))
            continue
        parts = {
            "selection": partial(_selection, shape, cell, generator),
            "paging": partial(_paging, shape, cell, source, generator),
            "attention": partial(_attention, shape, cell, generator),
        }
        for (name, runs, *rest), found in timing.each_seconds(parts, device):
            row = {"context": cell.context, "batch": cell.batch, "kernel": name}
            if isinstance(found, str):
                report.add(**row, error=found)
                continue
            least, rate, further = rest
            peak = link if rate == "link" else copy
            report.add(
                **row,
                **further,
                runs=len(runs),
                us=round(1e6 * found, 2),
                least_bytes=least,
                gb_per_s=round(least / found / 1e9, 2),
                **{f"share_of_{rate}": round(least / found / peak, 4)},
            )
        if device.type == "cuda":
            torch.cuda.empty_cache()
    report.note(no_time_for=left_out)


def cycle(
    rows: int, kv_heads: int, top_k: int, pieces: int, generator: torch.Generator
) -> list[Tensor]:
    """What the steps of a cycle want: always as many pieces, every tenth not those of the last.

    Args:
        rows: Requests.
        kv_heads: KV heads.
        top_k: Blocks that each reads.
        pieces: Of the host pool.
        generator: Of the device.

    Returns:
        int32 ``[rows, kv_heads, top_k]`` for each step. The first follows on the last.
    """
    size = rows * kv_heads * top_k
    shuffled = torch.randperm(pieces, generator=generator, device=generator.device).int()
    present, other = shuffled[:size].clone(), shuffled[size : 2 * size].clone()
    steps = []
    for number in range(2 * ONE_IN):  # after two rounds each entry is what it was
        part = slice(number % ONE_IN, None, ONE_IN)
        present[part], other[part] = other[part].clone(), present[part].clone()
        steps.append(present.view(rows, kv_heads, top_k).clone())
    return steps


def _layers(read: int, device: torch.device) -> int:
    """As many layers as outgrow the cache."""
    return max(1, min(-(-COLD_BYTES // read), MOST_LAYERS)) if device.type == "cuda" else 2


# The parts yield name, runs over different inputs, least bytes, over what, and further facts.


def _selection(
    shape: Shape, cell: Cell, generator: torch.Generator
) -> Iterator[tuple[str, Runs, int, str, dict[str, int]]]:
    from vllm_sparse.kernels.triton import sparda_select

    device, rows, blocks = generator.device, cell.batch, cell.blocks
    width = -(-cell.context // blocks.block_size)
    windows = blocks.block_size // blocks.kernel_stride
    table = torch.randperm(rows * width, generator=generator, device=device).view(rows, -1).int()
    positions = torch.full((rows,), cell.context - 1, device=device)
    least = bounds.select_blocks_bytes(
        shape, rows, cell.context, blocks.kernel_stride, blocks.top_k
    )
    compressed = torch.randn(
        (rows * width, shape.kv_heads, windows, shape.head_dim), generator=generator, device=device
    ).bfloat16()
    runs: Runs = []
    for _ in range(_layers(compressed.nbytes, device)):
        vectors = torch.randn(
            (rows, shape.kv_heads, shape.head_dim), generator=generator, device=device
        )
        own = compressed.clone()
        arguments = (own, vectors.bfloat16(), table, positions, Ranking(False), blocks)
        runs.append(partial(sparda_select.select_blocks, *arguments))
    yield "select blocks", runs, least, "copy", {}


def _paging(
    shape: Shape, cell: Cell, source: Tensor, generator: torch.Generator
) -> Iterator[tuple[str, Runs, int, str, dict[str, int]]]:
    from vllm_sparse.kernels.triton import sparda_paging

    device, rows, heads = generator.device, cell.batch, shape.kv_heads
    frames = rows * heads * cell.blocks.top_k
    pieces = rows * heads * -(-cell.context // cell.blocks.block_size)
    steps = cycle(rows, heads, cell.blocks.top_k, max(pieces, 2 * frames), generator)
    table = empty_table(max(pieces, 2 * frames), frames, device)
    counters = torch.zeros(3, dtype=torch.int64, device=device)
    # Numbers only need to differ from that of a frame's last use.
    numbers = [torch.tensor([n + 1], dtype=torch.int64, device=device) for n in range(len(steps))]
    for wanted, number in zip(steps, numbers, strict=True):  # from the empty table into the cycle
        found = sparda_paging.resolve(table, wanted, number, counters)
    misses = int(found.misses)
    runs: Runs = [
        partial(sparda_paging.resolve, table, wanted, number, counters)
        for wanted, number in zip(steps, numbers, strict=True)
    ]
    yield (
        "resolve",
        runs,
        bounds.resolve_bytes(frames, misses),
        "copy",
        {"misses": misses, "frames": frames},
    )

    slab = torch.empty((frames, *source.shape[1:]), dtype=source.dtype, device=device)
    amount = torch.tensor([misses], dtype=torch.int32, device=device)
    scattered = torch.randperm(len(source), generator=generator, device=device).int()
    lists = max(1, min(16, len(scattered) // misses))
    for programs in PROGRAMS:
        runs = [
            partial(
                sparda_paging.copy_pieces,
                slab,
                torch.randperm(frames, generator=generator, device=device).int(),
                source,
                scattered[n * misses :][:misses].clone(),
                amount,
                programs=programs,
            )
            for n in range(lists)
        ]
        least = misses * source[0].nbytes
        yield "copy pieces", runs, least, "link", {"misses": misses, "programs": programs}


def _attention(
    shape: Shape, cell: Cell, generator: torch.Generator
) -> Iterator[tuple[str, Runs, int, str, dict[str, int]]]:
    from vllm_sparse.kernels.triton import sparda_attention

    device, rows, blocks = generator.device, cell.batch, cell.blocks
    frames = rows * shape.kv_heads * blocks.top_k
    slab = torch.randn(
        (frames, blocks.block_size, 2 * shape.head_dim), generator=generator, device=device
    ).bfloat16()
    tokens = blocks.top_k * blocks.block_size
    lengths = torch.full((rows,), tokens, dtype=torch.int32, device=device)
    runs: Runs = []
    for _ in range(_layers(slab.nbytes, device)):
        place = torch.randperm(frames, generator=generator, device=device).int()
        query = torch.randn((rows, shape.heads, shape.head_dim), generator=generator, device=device)
        query = query.bfloat16()
        runs.append(
            partial(
                sparda_attention.attend_frames,
                slab.clone(),
                query,
                torch.empty_like(query),
                place.view(rows, shape.kv_heads, -1),
                lengths,
                shape.head_dim**-0.5,
            )
        )
    yield "attend frames", runs, bounds.attend_bytes(shape, rows, tokens), "copy", {}
