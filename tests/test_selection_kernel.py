# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The C++ block selection against the policy functions."""

from __future__ import annotations

import pytest
import torch
from vllm_sparse.kernels.cpu import selection as fused
from vllm_sparse.kernels.reference import selection as reference
from vllm_sparse.kernels.reference.selection import Blocks, Ranking


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "ranking",
    [Ranking(False), Ranking(True, 0.2), Ranking(True, 0.2, lag=1)],
    ids=["forecast", "query", "previous"],
)
@pytest.mark.parametrize(("dim", "group", "windows"), [(64, 1, 4), (24, 3, 2), (128, 16, 8)])
def test_selection_agrees_with_policies(dtype, ranking, dim, group, windows) -> None:
    generator = torch.Generator().manual_seed(dim)
    kv_heads, rows, width, size = 2, 7, 40, 16 * windows
    blocks = Blocks(size, 16, init_blocks=1, local_blocks=2, top_k=9)
    table = torch.randperm(rows * width, generator=generator).view(rows, width)
    positions = torch.randint(10 * size, width * size, (rows,), generator=generator)
    positions[:4] = torch.tensor([0, 3 * size - 1, 3 * size, 20 * size + 15])
    compressed = torch.randn(rows * width, kv_heads, windows, dim, generator=generator).to(dtype)
    for row, position in enumerate(positions.tolist()):
        # Windows that are not complete: they end in (n + 1) * 16 - 1. The first is none at all.
        complete = (position - ranking.lag + 1) // 16
        slots = compressed[table[row]].transpose(1, 2).flatten(0, 1)  # a copy
        slots[0] = slots[max(complete, 0) :] = torch.nan
        compressed[table[row]] = slots.unflatten(0, (width, windows)).transpose(1, 2)
    heads = kv_heads * group if ranking.softmax else kv_heads
    wide = torch.randn(rows, heads + 1, dim, generator=generator).to(dtype)
    vectors = wide[:, :heads]
    arguments = compressed, vectors, table, positions, ranking, blocks
    chosen, expected = fused.select_blocks(*arguments), reference.select_blocks(*arguments)
    # Sums in another order may swap near-ties.
    same = (chosen == expected).all(-1).float().mean()
    assert same > 0.9, (chosen, expected)
    assert ((chosen >= 0).sum(-1) == (expected >= 0).sum(-1)).all()


def test_equal_scores_favour_the_earlier_block() -> None:
    compressed = torch.ones(30, 1, 4, 16)
    blocks = Blocks(64, 16, 1, 1, 6)
    arguments = (
        compressed, torch.ones(1, 1, 16), torch.arange(30)[None], torch.tensor([29 * 64]),
        Ranking(False), blocks,
    )  # fmt: skip
    for module in (fused, reference):
        assert module.select_blocks(*arguments).tolist() == [[[0, 1, 2, 3, 28, 29]]]
