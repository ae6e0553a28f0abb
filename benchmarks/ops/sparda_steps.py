# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Steps of one layer of SPARDA whose fetches run beside the computation, as in the engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from vllm_sparse.kernels.types import Ranking, Selected

from benchmarks.ops.kernels import reference, triton
from benchmarks.ops.registry import COMPUTED, WRONG, error, same
from benchmarks.ops.sparda_inputs import PagedCase, Pool, empty_table, noise

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from benchmarks.ops.registry import Found

STEPS = 6


class _PagedLayer:
    """Chooses, fetches beside the computation and attends, as one layer of the engine does."""

    def __init__(self, case: PagedCase, pool: Pool, generator: torch.Generator) -> None:
        from vllm_sparse.prefetch.lane import LateLane, StreamLane

        self._case, self._pool, self._generator = case, pool, generator
        device = pool.table.device
        self._lane = StreamLane(device) if device.type == "cuda" else LateLane()
        size = case.blocks.block_size
        # No frame more than a step reads: whatever is chosen anew drives something out.
        reads = (pool.positions // size + 1).clamp(max=case.blocks.top_k)
        frames = case.kv_heads * int(reads.sum())
        shape = (frames, size, 2 * case.dim)
        self._slab = torch.full(shape, torch.nan, dtype=case.dtype, device=device)
        self._table = empty_table(case.num_blocks * case.kv_heads, frames, device)
        self._number, self._missed = torch.zeros(2, 1, dtype=torch.int64, device=device)
        self._counters = torch.zeros(3, dtype=torch.int64, device=device)
        self._query = noise(case, case.rows, case.heads, case.dim, generator=generator)
        self._vectors = noise(case, case.rows, case.kv_heads, case.dim, generator=generator)

    def change(self) -> None:
        """Other inputs, in the same place."""
        for part in (self._query, self._vectors):
            part.copy_(noise(self._case, *part.shape, generator=self._generator))

    def step(self) -> tuple[Tensor, Selected]:
        """Returns the output and what it is made of."""
        case, pool = self._case, self._pool
        self._number.add_(1)
        chosen = triton("select_blocks")(
            pool.compressed, self._vectors, pool.table, pool.positions, Ranking(False), case.blocks
        )
        found = triton("resolve")(self._table, chosen.pieces, self._number, self._counters)

        def work() -> object:
            triton("copy_pieces")(
                self._slab, found.targets, pool.pieces, found.missing, found.misses
            )
            return found

        ticket = self._lane.fork(work)
        output = torch.full_like(self._query, torch.nan)
        self._missed.add_(found.misses)
        ticket.wait()
        attended = self._query, output, found.frames, chosen.lengths, case.dim**-0.5
        triton("attend_frames")(self._slab, *attended)
        return output, chosen

    def error(self, output: Tensor, chosen: Selected) -> float:
        """Of a step's output, against attention over the pieces where they come from."""
        expected, scale = torch.full_like(output, torch.nan), self._case.dim**-0.5
        attended = self._query, expected, chosen.pieces, chosen.lengths, scale
        reference("attend_frames")(self._pool.pieces, *attended)
        return error(output, expected)

    def is_sound(self) -> bool:
        """Whether frames hold their pieces, none was lacking, and pieces had to leave."""
        piece = self._table.piece_of
        held = (piece >= 0).nonzero()[:, 0]
        there = self._pool.pieces[piece[held]]
        return (
            same(self._slab[held], there)
            and not bool(self._counters[2])
            and int(self._missed) > len(piece)
        )


def paged_steps(
    case: PagedCase, pool: Pool, generator: torch.Generator, graphs: bool
) -> Iterator[Found]:
    """Yields the error of steps as they are called and, where wanted, in a captured graph."""
    layer = _PagedLayer(case, pool, generator)
    worst = 0.0
    for _ in range(STEPS):
        layer.change()
        worst = max(worst, layer.error(*layer.step()))
    yield "paged steps", worst if layer.is_sound() else WRONG, COMPUTED[case.dtype]
    if not graphs:
        return
    layer = _PagedLayer(case, pool, generator)
    layer.step()  # everything is compiled by now, but libraries may still set themselves up
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = layer.step()
    worst = 0.0
    for number in range(2 * STEPS):
        layer.change()
        graph.replay()
        if number % 2:  # each second one follows at once, while the one before still runs
            worst = max(worst, layer.error(*result))
    torch.cuda.synchronize()
    yield "paged steps, graph", worst if layer.is_sound() else WRONG, COMPUTED[case.dtype]
