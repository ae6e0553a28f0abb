# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Attention of prompt rows against a softmax over everything they may see."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.kernels import REFERENCE, sparda
from vllm_sparse.kernels.types import Blocks

from vllm_sparse.policies.selectors import QuerySelector, Tokens
from vllm_sparse.policies.sparda import SpardaSettings
from vllm_sparse.prefetch.stream import Tile
from vllm_sparse.steps.host_layer import Layer
from vllm_sparse.steps.host_prompt import attend_prompt
from vllm_sparse.steps.host_step import PromptRow

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


def test_tokens_of_prompts_and_of_outputs_read_numbers_of_blocks_of_their_own() -> None:
    """A preempted request's row may begin densely, go on in its prompt, and end in its output."""
    asked = []

    def choose(compressed, vectors, table, positions, ranking, blocks) -> torch.Tensor:
        asked.append((positions.tolist(), vectors[:, 0, 0].tolist(), blocks.top_k))
        return torch.full((1, len(positions), len(table)), blocks.top_k == 5)

    options = SpardaSettings(
        selector="query", block_size=4, kernel_stride=2, local_blocks=1, top_k=4, sparse_prefill=5
    )
    runtime = SimpleNamespace(
        selector=QuerySelector(1.0),
        prompt_selector=None,
        kernels=SimpleNamespace(choose_blocks=choose),
        compressed=lambda number: torch.zeros(9, 1, 2, DIM),
        blocks=Blocks(4, 2, 1, 1, options.blocks_read),
        prompt_blocks=Blocks(4, 2, 1, 1, options.prompt_blocks_read),
        pager=SimpleNamespace(layers=[None]),
        layers=[None],
    )
    positions = torch.arange(20, 30)
    query = torch.arange(13.0)[:, None, None].expand(-1, 2, DIM)
    index = torch.arange(3, 13)
    for sparse_from, output_from, expected in (
        (2, 7, [((22, 27), 5), ((27, 30), 4)]),
        (8, 7, [((28, 30), 4)]),
        (0, 10, [((20, 30), 5)]),
    ):
        asked.clear()
        tokens = Tokens(index, positions, index, index)
        row = PromptRow(tokens, 3, 13, 20, sparse_from, output_from, torch.arange(8), (0, 0))
        chosen = Layer(runtime, 0)._choose_prompt(query, row)
        assert asked == [
            ([*range(*span)], [float(p - 17) for p in range(*span)], count)
            for span, count in expected
        ]
        marks = [count == 5 for (first, end), count in expected for _ in range(first, end)]
        assert chosen[0, :, 0].tolist() == marks
