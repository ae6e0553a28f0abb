# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What is timed of SPARDA's operations; copies are measured against the link.

A step reads as many blocks as the slab has frames, and every tenth is another one than in the step
before. So the steps of a cycle miss the same share, however often they are replayed.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from vllm_sparse.kernels.types import Ranking

from benchmarks.gpu.shapes import MINICPM, TINY
from benchmarks.ops.kernels import triton
from benchmarks.ops.registry import Timed, cold_layers, timed
from benchmarks.ops.sparda import ATTEND, SELECT, Cell, Sizes, attention_arguments
from benchmarks.ops.sparda_inputs import empty_table, pinned
from vllm_sparse.planner.shapes import ITEM_BYTES, Shape

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from benchmarks.ops.registry import Kernels, Runs

ONE_IN = 10  # blocks that are new in a step
PROGRAMS = (8, 16, 32, 64)
HOST_BYTES = 1 << 30  # of pinned memory that pieces are copied from, far beyond any cache


def timings(
    tiny: bool, cell: Cell, device: torch.device, generator: torch.Generator
) -> dict[str, Callable[[], Iterator[Timed]]]:
    """What is timed of a cell, by a name for its set-up."""
    shape = TINY if tiny else MINICPM
    size = int((0.01 if tiny else 1.0) * HOST_BYTES)
    return {
        "selection": partial(selection, shape, cell, generator),
        "paging": partial(paging, shape, cell, size, generator),
        "attention": partial(attention, shape, cell, generator),
    }


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


# In what follows, `layers` are inputs to run on, as many as outgrow a GPU's cache unless given, and
# `kernels` says whose run.


def selection(
    shape: Shape,
    cell: Cell,
    generator: torch.Generator,
    layers: int | None = None,
    kernels: Kernels = triton,
) -> Iterator[Timed]:
    """Choosing blocks by a Forecast."""
    device, rows, blocks = generator.device, cell.batch, cell.blocks
    width = -(-cell.context // blocks.block_size)
    windows = blocks.block_size // blocks.kernel_stride
    randn = partial(torch.randn, generator=generator, device=device)
    compressed = randn((rows * width, shape.kv_heads, windows, shape.head_dim)).bfloat16()
    table = torch.randperm(rows * width, generator=generator, device=device)
    common = {
        "block_table": table.view(rows, -1).int(),
        "positions": torch.full((rows,), cell.context - 1, device=device),
        "ranking": Ranking(False),
        "blocks": blocks,
    }
    steps = [
        {
            **{"compressed": compressed.clone(), **common},
            "vectors": randn((rows, shape.kv_heads, shape.head_dim)).bfloat16(),
        }
        for _ in range(layers or cold_layers(compressed.nbytes, device))
    ]
    yield from timed([SELECT], steps, Sizes(shape, cell), kernels)


def paging(
    shape: Shape,
    cell: Cell,
    host_bytes: int,
    generator: torch.Generator,
    grids: tuple[int, ...] = PROGRAMS,
    kernels: Kernels = triton,
) -> Iterator[Timed]:
    """Looking up frames, and copies by several grids, which a CPU has not."""
    device, rows, heads = generator.device, cell.batch, shape.kv_heads
    frames = rows * heads * cell.blocks.top_k
    pieces = max(rows * heads * -(-cell.context // cell.blocks.block_size), 2 * frames)
    steps = cycle(rows, heads, cell.blocks.top_k, pieces, generator)
    table = empty_table(pieces, frames, device)
    counters = torch.zeros(3, dtype=torch.int64, device=device)
    # Numbers only need to differ from that of a frame's last use.
    numbers = [torch.tensor([n + 1], dtype=torch.int64, device=device) for n in range(len(steps))]
    runs: Runs = [
        partial(kernels("resolve"), table, wanted, number, counters)
        for wanted, number in zip(steps, numbers, strict=True)
    ]
    misses = int([run() for run in runs][-1].misses)  # from the empty table into the cycle
    # Pieces in, their frames looked up and out, two lists of the misses out. What the clock looks
    # at depends on where it stands, and is not counted.
    least = 4 * (3 * frames + 2 * misses)
    yield Timed("resolve", runs, least, "copy", {"misses": misses, "frames": frames})

    source = _source(shape, cell, host_bytes, device)
    slab = torch.empty((frames, *source.shape[1:]), dtype=source.dtype, device=device)
    amount = torch.tensor([misses], dtype=torch.int32, device=device)
    scattered = torch.randperm(len(source), generator=generator, device=device).int()
    for programs in grids:
        runs = [
            partial(
                kernels("copy_pieces"), slab,
                torch.randperm(frames, generator=generator, device=device).int(), source,
                scattered[n * misses :][:misses].clone(), amount, programs=programs,
            )
            for n in range(max(1, min(16, len(scattered) // misses)))
        ]  # fmt: skip
        least = misses * source[0].nbytes
        yield Timed("copy pieces", runs, least, "link", {"misses": misses, "programs": programs})


_SOURCES: dict[tuple, Tensor] = {}


def _source(shape: Shape, cell: Cell, host_bytes: int, device: torch.device) -> Tensor:
    """Pinned pieces; made once, as pinning takes longer than what is timed."""
    piece = (cell.blocks.block_size, 2 * shape.head_dim)
    key = (piece, host_bytes, device)
    if key not in _SOURCES:
        count = host_bytes // (ITEM_BYTES * piece[0] * piece[1])
        _SOURCES[key] = pinned(torch.ones(count, *piece, dtype=torch.bfloat16), device)[1]
    return _SOURCES[key]


def attention(
    shape: Shape,
    cell: Cell,
    generator: torch.Generator,
    layers: int | None = None,
    kernels: Kernels = triton,
) -> Iterator[Timed]:
    """Attention over frames."""
    device, rows, blocks = generator.device, cell.batch, cell.blocks
    frames = rows * shape.kv_heads * blocks.top_k
    randn = partial(torch.randn, generator=generator, device=device)
    slab = randn((frames, blocks.block_size, 2 * shape.head_dim)).bfloat16()
    lengths = torch.full((rows,), blocks.top_k * blocks.block_size, device=device).int()
    steps = []
    for _ in range(layers or cold_layers(slab.nbytes, device)):
        place = torch.randperm(frames, generator=generator, device=device).int()
        query = randn((rows, shape.heads, shape.head_dim)).bfloat16()
        place = place.view(rows, shape.kv_heads, -1)
        steps.append(attention_arguments(slab.clone(), query, place, lengths))
    yield from timed([ATTEND], steps, Sizes(shape, cell), kernels)
