# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""All kernels of a layer together, over many steps; and compiled for GPUs that are not there."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest
import torch
from support.ahead_of_time import compile_only, compiled
from support.kernels import (
    REFERENCE,
    close,
    device_of,
    noise,
    scattered_table,
)
from vllm_sparse.kernels.types import (
    Blocks,
    NewQueries,
    NewWindows,
    PageTable,
    Ranking,
    Rotary,
    Unframed,
)

if TYPE_CHECKING:
    from vllm_sparse.kernels.dispatch import SpardaKernels

from benchmarks.ops.sparda_inputs import empty_table


class Layer:
    """One layer with a small slab, decoding by one set of kernels."""

    size, kv_heads, dim, group = 32, 2, 64, 3
    blocks = Blocks(32, 16, init_blocks=1, local_blocks=1, top_k=5)

    def __init__(self, kernels: SpardaKernels, table: torch.Tensor, frames: int) -> None:
        count, device = table.numel(), table.device
        self.kernels = kernels
        self.block_table = table
        self.host = torch.full((count, 2, 32, 128), torch.nan, device=device)
        self.slab = torch.full((frames, 32, 128), torch.nan, device=device)
        self.compressed = torch.full((count, 2, 2, 64), torch.nan, device=device)
        self.table = empty_table(2 * count, frames, device)
        self.step = torch.zeros(1, dtype=torch.int64, device=device)
        self.counters = torch.zeros(3, dtype=torch.int64, device=device)

    def decode(self, positions, query, forecast, key, value):
        kernels = self.kernels
        self.step += 1
        at = positions.clamp(min=0)
        block = self.block_table.long().gather(1, at[:, None] // self.size)[:, 0]
        slots = torch.where(positions < 0, -1, block * self.size + at % self.size)
        windows = NewWindows(self.compressed, positions, self.block_table, 16)
        kernels.write_tokens(self.host, self.slab, self.table.frame_of, slots, key, value, windows)
        chosen = kernels.select_blocks(
            self.compressed, forecast, self.block_table, positions, Ranking(False), self.blocks
        )
        found = kernels.resolve(self.table, chosen.pieces, self.step, self.counters)
        pieces = self.host.flatten(0, 1)
        kernels.copy_pieces(self.slab, found.targets, pieces, found.missing, found.misses)
        output = torch.full_like(query, torch.nan)
        kernels.attend_frames(self.slab, query, output, found.frames, chosen.lengths, 0.125)
        return output, chosen.blocks, found.misses


def test_decoding_from_the_first_token_on_equals_reference(ours):
    """All kernels together, with rows that start late and padding between them."""
    device = device_of(ours)
    generator = torch.Generator().manual_seed(0)
    rows, width = 3, 9
    table = scattered_table(rows, width, generator, device)
    layers = [Layer(kernels, table, frames=32) for kernels in (ours, REFERENCE)]
    positions = torch.tensor([32 * 6 - 4, -1, 32 * 7 + 12], device=device)
    past = noise(rows * width, 2, 32, 128, generator=generator, device=device)
    windows = noise(rows * width, 2, 2, 64, generator=generator, device=device)
    for layer in layers:
        layer.host.copy_(past)
        layer.compressed.copy_(windows)
    fetched = 0
    for number in range(10):
        positions = torch.where(positions >= 0, positions + 1, positions)
        if number == 3:
            positions[1] = 5 * 32 + 14
        if number == 8:
            positions[0] = -1
        query, forecast, key, value = (
            noise(rows, heads, 64, generator=generator, device=device) for heads in (6, 2, 2, 2)
        )
        (output, blocks, misses), (theirs, expected, _) = (
            layer.decode(positions, query, forecast, key, value) for layer in layers
        )
        assert blocks.equal(expected)
        close(output, theirs, torch.float32)
        fetched += int(misses)
    for a, b in zip(layers[0].table, layers[1].table, strict=True):
        assert a.equal(b)
    held = layers[0].table.piece_of
    assert fetched > 40
    assert (held >= 0).all()
    assert layers[0].slab.equal(layers[0].host.flatten(0, 1)[held])


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_without_a_gpu(capability, triton_cache):
    lines = compiled(__file__, capability, triton_cache)
    names = {line.split()[0] for line in lines}
    assert len(names) == 13, names
    most = 166912 if capability == 80 else 232448  # shared memory that one program may have
    assert all(int(line.split()[1]) <= most for line in lines), lines


def compile_everything(capability: int) -> None:
    """Launch every kernel."""
    from vllm_sparse.kernels.triton import (
        sparda_attention,
        sparda_paging,
        sparda_prefill,
        sparda_select,
        sparda_tokens,
    )

    compile_only(capability)
    step, hand = (torch.zeros(1, dtype=torch.int64) for _ in range(2))
    counters = torch.zeros(3, dtype=torch.int64)
    table = torch.zeros(3, 40, dtype=torch.int32)
    positions = torch.zeros(3, dtype=torch.int64)
    for dtype, dim in ((torch.bfloat16, 256), (torch.float32, 64)):
        host = torch.zeros(9, 2, 64, 2 * dim, dtype=dtype)
        slab, compressed = host.flatten(0, 1), host.view(9, 2, 4, -1)[..., :dim]
        query, key = (torch.zeros(3, heads, dim, dtype=dtype) for heads in (8, 2))
        rotary = Rotary(torch.zeros(64, dim, dtype=dtype), halves=True)
        forecasts = (
            Ranking(False, rotary=part) for part in (None, rotary, rotary._replace(halves=False))
        )
        for ranking in (*forecasts, Ranking(True, 0.2, lag=1)):
            chosen = sparda_select.select_blocks(
                compressed, query if ranking.softmax else key, table, positions, ranking,
                Blocks(64, 16, 1, 2, 9),
            )  # fmt: skip
        state = PageTable(
            torch.zeros(18, dtype=torch.int32), torch.zeros(18, dtype=torch.int64),
            torch.zeros(18, dtype=torch.int64), torch.zeros(18, dtype=torch.bool), hand,
        )  # fmt: skip
        found = sparda_paging.resolve(state, chosen.pieces, step, counters)
        sparda_paging.copy_pieces(slab, found.targets, slab, found.missing, found.misses)
        whole = Unframed(host, table, chosen.lengths)
        for unframed in (None, whole):
            sparda_attention.attend_frames(
                slab, query, query, found.frames, chosen.lengths, 0.1, unframed
            )
        windows = NewWindows(compressed, positions, table, 16)
        for completed, queries in (
            (None, None), (windows, None), (windows, NewQueries(query, query)),
            (windows, NewQueries(query, query, query)),
        ):  # fmt: skip
            sparda_tokens.write_tokens(
                host, slab, state.frame_of, positions, key, key, completed, queries=queries
            )
        sparda_tokens.record_queries(query.clone(), query, positions, positions, 64)
        kept = query[None]
        sparda_tokens.recall_queries(kept, kept, positions, positions, kept)
        prompt = torch.zeros(2, 4, 300, dim, dtype=dtype)
        picked = torch.zeros(2, 300, 9, dtype=torch.bool)
        part = prompt, prompt[:, 0], prompt[:, 0]
        total = sparda_prefill.attend_part(*part, None, 0.1, past_from=0)
        for earlier in (None, total):
            sparda_prefill.attend_part(*part, picked, 0.1, block_size=64, total=earlier)


if __name__ == "__main__":
    compile_everything(int(sys.argv[1]))
