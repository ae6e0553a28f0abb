# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Attention of prompt rows against a softmax over everything they may see."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.kernels import REFERENCE, sparda

from vllm_sparse.prefetch.stream import Tile
from vllm_sparse.steps.host_prompt import attend_prompt

SIZE, DIM = 4, 8


@given(
    total=st.integers(1, 45),
    cuts=st.lists(st.integers(1, 44), max_size=4),
    heads=st.sampled_from([(1, 1), (2, 1), (2, 3)]),
    tile_blocks=st.integers(1, 4),
    tile_tokens=st.integers(1, 20),
    sparse_at=st.integers(0, 45),
    density=st.sampled_from([0.0, 0.3, 1.0]),
    kernels=st.sampled_from([sparda("cpu"), REFERENCE]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=200, deadline=None)
def test_prompt_attention_is_exact_for_any_chunks_and_tiles(
    total, cuts, heads, tile_blocks, tile_tokens, sparse_at, density, kernels, seed
) -> None:
    kv_heads, group = heads
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(total, kv_heads * group, DIM, generator=generator)
    rows = torch.randn(total, kv_heads, 2 * DIM, generator=generator)
    num_blocks = -(-total // SIZE)
    position, block = torch.arange(total), torch.arange(total) // SIZE
    chosen = torch.rand(kv_heads, total, num_blocks, generator=generator) < density
    chosen[:, position, block] = True  # a token sees at least itself
    visible = chosen[:, :, block] | (position < sparse_at)[:, None]
    visible &= position <= position[:, None]
    keys, values = rows.transpose(0, 1).split(DIM, -1)
    logits = torch.einsum("tghd,gnd->gthn", query.unflatten(1, heads), keys) * 0.4
    weights = torch.softmax(logits.masked_fill(~visible.unsqueeze(2), -torch.inf), -1)
    expected = torch.einsum("gthn,gnd->tghd", weights, values).flatten(1, 2)

    bounds = sorted({0, total, *(cut for cut in cuts if cut < total)})
    for start, end in itertools.pairwise(bounds):
        sparse_from = min(max(sparse_at - start, 0), end - start)
        here = None
        if sparse_from < end - start:
            here = chosen[:, start + sparse_from : end, : -(-end // SIZE)]
        output = attend_prompt(
            query[start:end],
            rows[start:end],
            staged_tiles(rows, start, tile_blocks),
            start,
            sparse_from,
            here,
            block_size=SIZE,
            tile_tokens=tile_tokens,
            attend_part=kernels.attend_part,
            scale=0.4,
        )
        torch.testing.assert_close(output, expected[start:end], atol=2e-6, rtol=1e-5)


def staged_tiles(rows: torch.Tensor, start: int, tile_blocks: int):
    """Earlier tokens as the stream hands them over: a tile lives until the next is asked for."""
    for first in range(0, start, tile_blocks * SIZE):
        blocks = torch.arange(first // SIZE, min(-(-start // SIZE), first // SIZE + tile_blocks))
        tokens = min(start, first + tile_blocks * SIZE) - first
        staged = torch.full((rows.shape[1], len(blocks) * SIZE, rows.shape[2]), torch.nan)
        staged[:, :tokens] = rows[first : first + tokens].transpose(0, 1)
        yield Tile(blocks, first // SIZE, tokens, False), staged
        staged.fill_(torch.nan)


def test_prompt_attention_keeps_the_dtype() -> None:
    query, rows = torch.randn(3, 2, DIM).bfloat16(), torch.randn(3, 1, 2 * DIM).bfloat16()
    arguments = {
        "block_size": 4,
        "tile_tokens": 8,
        "attend_part": sparda("cpu").attend_part,
        "scale": 0.4,
    }
    output = attend_prompt(query, rows, (), 0, 3, None, **arguments)
    assert output.dtype == torch.bfloat16
    assert output[0, 0].equal(rows[0, 0, DIM:])
