# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""After SPARDA's warm-up no prompt and no step compiles another kernel."""

from __future__ import annotations

import sys

import pytest
import torch

pytest.importorskip("triton")
from support.ahead_of_time import compiled, name_only
from support.kernels import DEVICE
from vllm_sparse.kernels import dispatch
from vllm_sparse.kernels.fp8 import FP8
from vllm_sparse.kernels.types import (
    Blocks,
    NewQueries,
    NewWindows,
    PageTable,
    Ranking,
    Rotary,
    Unframed,
)

from vllm_sparse.backends.sparda_warm_up import warm_up
from vllm_sparse.policies.sparda import SpardaSettings
from vllm_sparse.prefetch.stream import Tile
from vllm_sparse.steps.host_prompt import attend_prompt
from vllm_sparse.steps.host_rows import RowPlanner

CPU, SERVED = torch.device("cpu"), "requests from here on"
SIZE = 64
MOST_ROWS = 19  # no multiple of what aligns a row of numbers
# Query heads, KV heads, size: sums of 14 heads start anywhere between two tokens.
HEADS = {"forecast": (32, 2, 128), "query": (14, 2, 128)}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["forecast", "query"])
def test_no_request_compiles_a_kernel(kind, triton_cache):
    lines = compiled(__file__, kind, triton_cache)
    border = lines.index(SERVED)
    assert len({line.split()[0] for line in lines[:border]}) >= 8, lines
    assert not lines[border + 1 :], lines[border + 1 :]


def test_the_kernels_run_on_what_the_warm_up_gives_them(monkeypatch):
    """In the interpreter, or on a GPU: no counter stays set, nobody stands where no token can."""
    device = DEVICE
    if device.type == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    settings = SpardaSettings(
        block_size=32, top_k=4, local_blocks=1, dense_len=0, sparse_prefill=True, staging_blocks=2
    )
    kernels, at = dispatch.sparda_kernels(device, "triton"), []

    def select(compressed, vectors, table, positions, ranking, *rest, **options):
        at.append(int(positions.max()))
        assert ranking.rotary is None or at[-1] < len(ranking.rotary.cache)
        return kernels.select_blocks(
            compressed, vectors, table, positions, ranking, *rest, **options
        )

    watched, blocks = kernels._replace(select_blocks=select), Blocks(32, 16, 1, 1, 4)
    long, short = (
        Ranking(False, rotary=Rotary(torch.zeros(rows, 16, device=device), True))
        for rows in (200, 100)
    )
    for ranking, stored in ((long, None), (short, None), (Ranking(True, 0.2), FP8)):
        warm_up(watched, settings, ranking, blocks, (64, 2, 16), torch.float32, device, stored)
    assert at == [159, 99, 159], "the fifth block, if there can be one: then rows are scored"
    from vllm_sparse.kernels.triton.counters import counters

    assert not any(part.any() for part in counters(torch.zeros(1, device=device).device))


def serve(kernels, settings, ranking, blocks, heads) -> None:
    """Steps that hold decode rows and prompts of any length, sparse and dense."""
    query_heads, kv_heads, dim = heads
    host = torch.zeros(40, kv_heads, SIZE, 2 * dim).bfloat16()
    slab, compressed = host.flatten(0, 1), torch.zeros(40, kv_heads, 4, dim).bfloat16()
    turned = ranking._replace(rotary=None)
    of_rows = query_heads if ranking.softmax else kv_heads
    planner = RowPlanner(settings, MOST_ROWS, CPU, captured=True)
    for rows, width in ((1, 17), (2, 100), (MOST_ROWS, 512), (3, 5), (2, 1)):
        fused = torch.zeros(rows, query_heads + 2 * kv_heads, dim).bfloat16()
        query, key, value = fused.split([query_heads, kv_heads, kv_heads], 1)
        table, *numbers = (part[:rows] for part in planner._room(width))
        table = table[:, :width]
        at = numbers[3]  # every second one would begin within 16 bytes
        state = PageTable(
            torch.zeros(80, dtype=torch.int32), torch.zeros(80, dtype=torch.int64),
            torch.zeros(80, dtype=torch.int64), torch.zeros(80, dtype=torch.bool),
            torch.zeros(1, dtype=torch.int64),
        )  # fmt: skip
        for windows in (None, NewWindows(compressed, at, table, 16)):
            kernels.write_tokens(host, slab, state.frame_of, at, key, value, windows)
        chosen = kernels.select_blocks(
            compressed, torch.zeros(rows, of_rows, dim).bfloat16(), table, at, ranking, blocks,
            dense_len=settings.dense_len,
        )  # fmt: skip
        step, counters = torch.zeros(1, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
        found = kernels.resolve(state, chosen.pieces, step, counters)
        kernels.copy_pieces(slab, found.targets, slab, found.missing, found.misses)
        for afar in (None, Unframed(host, table, chosen.lengths)):
            output = torch.zeros(rows, query_heads, dim).bfloat16()
            kernels.attend_frames(
                slab, query.clone(), output, found.frames, chosen.lengths, 0.1, afar
            )
        if ranking.softmax:
            kept = torch.zeros(3, 40, query_heads, dim).bfloat16()
            recent, found = torch.zeros(2, 3, MOST_ROWS, query_heads, dim).bfloat16()
            for layer in range(3):
                kernels.record_queries(kept[layer], query, at, at + 1, SIZE)
                kernels.write_tokens(
                    host, slab, state.frame_of, at, key, value,
                    NewWindows(compressed, at, table, 16),
                    queries=NewQueries(kept[layer], query, recent[layer]),
                )  # fmt: skip
            kernels.recall_queries(kept, recent, at, at, found)
    for tokens, begin, sparse_from in ((1, 0, 0), (3, 1, 3), (7, 2, 0), (100, 3, 41), (600, 5, 0)):
        fused = torch.zeros(700, query_heads + 2 * kv_heads, dim).bfloat16()
        here = fused[begin : begin + tokens]
        rows = here[:, query_heads:].reshape(tokens, kv_heads, -1)
        at = torch.zeros(700, dtype=torch.int64)[begin : begin + tokens][sparse_from:]
        blocks_of = torch.zeros(150)
        chosen = None
        if sparse_from < tokens:
            vectors = torch.zeros(len(at), of_rows, dim).bfloat16()
            chosen = kernels.choose_blocks(compressed, vectors, blocks_of, at, turned, blocks)
        staged = torch.zeros(kv_heads, 8 * SIZE, 2 * dim).bfloat16()
        tile = Tile(blocks_of[:8].long(), 0, 8 * SIZE, False)
        attend_prompt(
            here[:, :query_heads], rows, [(tile, staged)], 100 * SIZE + 7, sparse_from, chosen,
            block_size=SIZE, tile_tokens=8 * SIZE, attend_part=kernels.attend_part, scale=0.1,
        )  # fmt: skip


if __name__ == "__main__":
    name_only()
    dispatch._check_triton = lambda device: None  # nothing runs
    settings = SpardaSettings(
        block_size=SIZE, top_k=9, local_blocks=2, dense_len=100, sparse_prefill=True
    )
    rotary = Rotary(torch.zeros(4096, 128).bfloat16(), True)
    ranking = Ranking(False, rotary=rotary) if sys.argv[1] == "forecast" else Ranking(True, 0.2)
    blocks, kernels = Blocks(SIZE, 16, 1, 2, 9), dispatch.sparda_kernels(CPU, "triton")
    heads = HEADS[sys.argv[1]]
    warm_up(kernels, settings, ranking, blocks, heads, torch.bfloat16, CPU)
    print(SERVED, flush=True)
    serve(kernels, settings, ranking, blocks, heads)
