# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Compiles SPARDA's Triton kernels before the first request, which would wait for it otherwise.

vLLM's dummy runs and captured graphs hold single tokens only: what prompts run, and decode rows
beside them, would be compiled when they come. Every kernel runs once for each variant that a
request may meet, on a few blocks of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_sparse.kernels.types import NewQueries, NewWindows, PageTable, Unframed
from vllm_sparse.prefetch.stream import Tile
from vllm_sparse.steps.host_prompt import attend_prompt

if TYPE_CHECKING:
    from vllm_sparse.kernels.dispatch import SpardaKernels
    from vllm_sparse.kernels.types import Blocks, Ranking
    from vllm_sparse.policies.sparda import SpardaSettings

# A tile of a prompt's queries has at most so many rows; each power of two up to it is a variant.
_MOST_ROWS = 128


def warm_up(
    kernels: SpardaKernels,
    settings: SpardaSettings,
    ranking: Ranking,
    blocks: Blocks,
    heads: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    stored: torch.dtype | None = None,
) -> None:
    """Run every variant once.

    Args:
        kernels: Those of the device.
        settings: The settings.
        ranking: Of decode rows.
        blocks: What rows read.
        heads: Query heads, KV heads, head size.
        dtype: Of what the model computes with.
        device: Where.
        stored: Of the cache's keys and values, if that is another one.
    """
    stored = dtype if stored is None else stored
    query_heads, kv_heads, dim = heads
    size, stride = settings.block_size, settings.kernel_stride
    whole = max(blocks.top_k, -(-settings.dense_len // size))
    width = whole + 1  # or every row would read all its blocks, and nothing be scored
    place = width * size - 1
    if ranking.rotary is not None:  # a short model's rows read everything, which compiles as much
        place = min(place, len(ranking.rotary.cache) - 1)

    def zeros(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=of, device=device)

    host, slab = (zeros(n, size, 2 * dim, of=stored) for n in (2 * kv_heads, kv_heads))
    host, compressed = host.unflatten(0, (2, -1)), zeros(2, kv_heads, size // stride, dim)
    # As a projection leaves them: a row holds all heads.
    tokens = zeros(3, query_heads + 2 * kv_heads, dim)
    query, key, value = tokens.split([query_heads, kv_heads, kv_heads], 1)
    table = zeros(3, width, of=torch.int32)
    positions = zeros(3, of=torch.int64) + place
    state = PageTable(
        zeros(2 * kv_heads, of=torch.int32) - 1,
        zeros(kv_heads, of=torch.int64) - 1,
        zeros(kv_heads, of=torch.int64),
        zeros(kv_heads, of=torch.bool),
        zeros(1, of=torch.int64),
    )
    slots = zeros(3, of=torch.int64) - 1
    windows = NewWindows(compressed, positions, table, stride)
    for completed in (None, windows):
        kernels.write_tokens(host, slab, state.frame_of, slots, key, value, completed)

    vectors = zeros(3, query_heads if ranking.softmax else kv_heads, dim)
    chosen = kernels.select_blocks(
        compressed, vectors, table, positions, ranking, blocks, dense_len=settings.dense_len
    )
    step, counters = zeros(1, of=torch.int64) + 1, zeros(3, of=torch.int64)
    pieces = torch.full_like(chosen.pieces, -1)
    found = kernels.resolve(state, pieces, step, counters)
    every = host.flatten(0, 1)
    kernels.copy_pieces(slab, found.targets, every, found.missing, found.misses)
    unframed = Unframed(host, table, zeros(3, of=torch.int32))
    for afar in (None, unframed):
        output = zeros(3, query_heads, dim)
        lengths = zeros(3, of=torch.int32) + size
        frames = torch.zeros_like(found.frames)
        kernels.attend_frames(slab, output.clone(), output, frames, lengths, 1.0, afar)
    if ranking.softmax:  # selector previous keeps them
        kept, recent, room = zeros(3, 1, 3, query_heads, dim).unbind()
        last = zeros(3, of=torch.int64)
        kernels.record_queries(kept[0], query, slots, last, size)
        kernels.write_tokens(
            host, slab, state.frame_of, slots, key, value, windows,
            queries=NewQueries(kept[0], query, recent[0]),
        )  # fmt: skip
        kernels.recall_queries(kept, recent, last, last, room)
    _warm_up_prompts(kernels, settings, ranking, blocks, heads, compressed, table[0], stored)


def _warm_up_prompts(
    kernels: SpardaKernels,
    settings: SpardaSettings,
    ranking: Ranking,
    blocks: Blocks,
    heads: tuple[int, int, int],
    compressed: torch.Tensor,
    table: torch.Tensor,
    stored: torch.dtype,
) -> None:
    """Prompts that are dense and sparse, with tokens before them, of so many tokens and few."""
    (query_heads, kv_heads, dim), size = heads, settings.block_size
    device, dtype = compressed.device, compressed.dtype
    past = torch.zeros(kv_heads, size, 2 * dim, dtype=stored, device=device)
    tile = Tile(table[:1].long(), 0, size, False)
    start = len(table) * size
    count, most = 1, _MOST_ROWS // (query_heads // kv_heads) + 1
    if settings.sparse_prefill:
        at = torch.full((3,), start - 1, device=device)
        vectors = at.new_zeros((3, query_heads if ranking.softmax else kv_heads, dim), dtype=dtype)
        turned = ranking._replace(rotary=None)
        # A row's tokens begin anywhere in the batch: their positions may not be aligned.
        for here in (slice(2), slice(1, None)):
            kernels.choose_blocks(compressed, vectors[here], table, at[here], turned, blocks)
    while count < 2 * most:
        tokens = torch.zeros(count, query_heads + 2 * kv_heads, dim, dtype=dtype, device=device)
        query, rows = tokens[:, :query_heads], tokens[:, query_heads:].reshape(count, kv_heads, -1)
        rows = rows.to(stored)
        for sparse_from in (0, count) if settings.sparse_prefill else (count,):
            chosen = None
            if sparse_from < count:
                shape = kv_heads, count - sparse_from, len(table) + 1 + -(-count // size)
                chosen = torch.ones(shape, dtype=torch.bool, device=device)
            attend_prompt(
                query, rows, [(tile, past)], start, sparse_from, chosen, block_size=size,
                tile_tokens=settings.staging_blocks * size, attend_part=kernels.attend_part,
                scale=1.0,
            )  # fmt: skip
        count *= 2
