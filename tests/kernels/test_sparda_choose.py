# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Which blocks the tokens of a prompt read: against brute force, against decode, in any chunks."""

from __future__ import annotations

import itertools

import pytest
import torch
from reference import sparda_bruteforce as brute
from support.kernels import FAR, FLOATS, REFERENCE, device_of, noise, sparda, with_gaps
from vllm_sparse.kernels.types import Blocks, Ranking

RANKINGS = {
    "forecast": Ranking(False),
    "query": Ranking(True, 0.2),
    "previous": Ranking(True, 0.2, lag=1),
}
SHAPES = [
    # dtype, D, heads per KV head, block size, local blocks, top_k
    (torch.float32, 64, 1, 64, 1, 6),
    (torch.bfloat16, 128, 16, 64, 2, 9),
    (torch.float16, 80, 7, 32, 1, 3),
    (torch.bfloat16, 96, 3, 128, 2, 5),
    (torch.float32, 21, 2, 16, 3, 12),
]
WIDTH = 26


def make_request(device, shape, ranking, whole=False):
    """One request; windows that its last token does not see are NaN, as are other blocks."""
    dtype, dim, group, size, local, top_k = shape
    generator = torch.Generator().manual_seed(dim)
    kv_heads, windows, tokens = 2, size // 16, WIDTH * size - 5
    compressed = with_gaps(
        torch.full((WIDTH + 3, kv_heads, windows, dim), torch.nan, dtype=dtype, device=device), 3
    )
    table = torch.randperm(WIDTH + 3, generator=generator)[:WIDTH]
    slots = noise(
        WIDTH * windows, kv_heads, dim, generator=generator, device=device, dtype=dtype, whole=whole
    )
    slots[0] = slots[tokens // 16 :] = torch.nan
    compressed[table.to(device)] = slots.unflatten(0, (WIDTH, windows)).transpose(1, 2)
    heads = kv_heads * group if ranking.softmax else kv_heads
    vectors = noise(
        tokens, heads + 1, dim, generator=generator, device=device, dtype=dtype, whole=whole
    )
    blocks = Blocks(size, 16, 1, local, top_k)
    return compressed, vectors[:, :heads], table.to(device), blocks, slots


@pytest.mark.parametrize("kind", RANKINGS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(str(v) for v in s))
def test_choices_equal_reference_in_any_chunks(ours, shape, kind):
    ranking, device = RANKINGS[kind], device_of(ours)
    compressed, vectors, table, blocks, _ = make_request(
        device, shape, ranking, whole=not ranking.softmax
    )
    size, tokens = blocks.block_size, len(vectors)
    if device.type == "cpu" and ours.name != "cpu":  # the interpreter: the last tokens suffice
        vectors, first = vectors[-40:], tokens - 40
    else:
        first = 0
    positions = torch.arange(first, tokens, device=device)
    expected = REFERENCE.choose_blocks(compressed, vectors, table, positions, ranking, blocks)
    assert expected.sum(-1).equal(
        (positions // size + 1).clamp(max=blocks.top_k).expand(len(expected), -1)
    )
    for cuts in ((0, len(vectors)), (0, 1, 18, 39, len(vectors))):
        for begin, end in itertools.pairwise(cuts):
            here, width = slice(begin, end), (first + end - 1) // size + 1
            chosen = ours.choose_blocks(
                compressed, vectors[here], table[:width], positions[here], ranking, blocks
            )
            assert chosen.dtype == torch.bool
            theirs = expected[:, here, :width]
            if ranking.softmax:  # sums that depend on their order: near-ties may swap
                assert (chosen == theirs).all(-1).float().mean() > 0.97
                assert chosen.sum(-1).equal(theirs.sum(-1))
            else:
                assert chosen.equal(theirs)


@pytest.mark.parametrize("kind", RANKINGS)
def test_choices_equal_brute_force(every, kind):
    ranking = RANKINGS[kind]
    shape = (torch.float32, 24, 2, 32, 1, 5)
    compressed, vectors, table, blocks, slots = make_request(device_of(every), shape, ranking)
    positions = torch.tensor([0, 31, 5 * 32 - 1, 5 * 32, 301, 17 * 32, len(vectors) - 1])
    chosen = every.choose_blocks(
        compressed, vectors[positions], table, positions.to(table.device), ranking, blocks
    )
    keys, settings = slots[1:].cpu().transpose(0, 1), blocks._asdict()
    settings["stride"] = settings.pop("kernel_stride")
    for i, position in enumerate(positions.tolist()):
        mine, at = vectors[position].cpu()[:, None], position - ranking.lag
        complete = keys[:, : max((at + 1) // 16 - 1, 0)]
        if ranking.softmax:
            scores = brute.query_scores(mine, complete, [at], scale=ranking.scale)
        else:
            scores = brute.forecast_scores(mine, complete)
        expected = brute.select_blocks(torch.tensor(scores), [position], **settings)
        found = [row.nonzero()[:, 0].tolist() for row in chosen[:, i]]
        assert found == [[m for m in row if m >= 0] for (row,) in expected], position


@pytest.mark.parametrize("kind", ["forecast", "query"])
def test_a_decode_step_chooses_what_the_prompt_chose(every, kind):
    ranking, device = RANKINGS[kind], device_of(every)
    compressed, vectors, table, blocks, _ = make_request(
        device, (torch.float32, 64, 3, 64, 1, 6), ranking
    )
    positions = torch.tensor([400, 6 * 64 - 1, 900, len(vectors) - 1], device=device)
    chosen = every.choose_blocks(compressed, vectors[positions], table, positions, ranking, blocks)
    rows = table.int().expand(4, -1).clone()
    rows[torch.arange(WIDTH, device=device) > positions[:, None] // 64] = FAR
    one = every.select_blocks(compressed, vectors[positions], rows, positions, ranking, blocks)
    again = torch.zeros(4, 2, WIDTH + 1, dtype=torch.bool, device=device)
    again.scatter_(2, one.blocks.long() % (WIDTH + 1), True)
    assert chosen.transpose(0, 1).equal(again[..., :-1])


@pytest.mark.parametrize("kind", ["forecast", "query"])
def test_equal_scores_favour_the_earlier_block(every, kind):
    device = device_of(every)
    compressed = torch.ones(30, 1, 4, 64, device=device)
    table, positions = torch.arange(30), torch.tensor([27 * 64 + 3, 29 * 64])
    chosen = every.choose_blocks(
        compressed, torch.ones(2, 1, 64, device=device), table.to(device), positions.to(device),
        RANKINGS[kind], Blocks(64, 16, 1, 1, 6),
    )  # fmt: skip
    assert [row.nonzero()[:, 0].tolist() for row in chosen[0]] == [
        [0, 1, 2, 3, 26, 27], [0, 1, 2, 3, 28, 29],
    ]  # fmt: skip


def test_no_free_choice_and_no_tokens(every):
    ranking, device = RANKINGS["query"], device_of(every)
    compressed, vectors, table, blocks, _ = make_request(
        device, (torch.float32, 64, 1, 64, 1, 3), ranking
    )
    positions = torch.tensor([63, 64, 20 * 64], device=device)
    chosen = every.choose_blocks(compressed, vectors[:3], table, positions, ranking, blocks)
    found = [row.nonzero()[:, 0].tolist() for row in chosen[1]]
    assert found == [[0], [0, 1], [0, 19, 20]]
    none = every.choose_blocks(compressed, vectors[:0], table, positions[:0], ranking, blocks)
    assert none.shape == (2, 0, WIDTH)


@pytest.mark.parametrize("dtype", FLOATS)
def test_many_windows_are_scored_by_parts(dtype):
    """More windows than a task's room holds for several tokens."""
    generator = torch.Generator().manual_seed(1)
    ranking, blocks, width = RANKINGS["query"], Blocks(64, 16, 1, 2, 20), 1100
    compressed = torch.randn(width, 1, 4, 32, generator=generator).to(dtype)
    vectors = torch.randn(9, 16, 32, generator=generator).to(dtype)
    table = torch.randperm(width, generator=generator)
    positions = torch.arange(width * 64 - 9, width * 64)
    arguments = compressed, vectors, table, positions, ranking, blocks
    chosen = sparda("cpu").choose_blocks(*arguments)
    expected = sparda("reference").choose_blocks(*arguments)
    assert (chosen & expected).sum() >= 0.98 * expected.sum()
    assert chosen.sum(-1).eq(20).all()


@pytest.mark.parametrize("name", ["reference", "cpu"])
@pytest.mark.parametrize("kind", ["forecast", "query"])
def test_the_first_block_s_first_window_is_none(name, kind):
    """Whatever lies there, where that block competes with the others."""
    compressed = torch.zeros(30, 1, 4, 64)
    compressed[0, 0, 0] = 1000.0
    compressed[9:12, 0, 2] = 1.0
    chosen = sparda(name).choose_blocks(
        compressed, torch.ones(1, 1, 64), torch.arange(30), torch.tensor([29 * 64]),
        RANKINGS[kind], Blocks(64, 16, 0, 1, 5),
    )  # fmt: skip
    assert chosen[0, 0].nonzero()[:, 0].tolist() == [9, 10, 11, 28, 29]
