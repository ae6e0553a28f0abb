# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The PyTorch step of any policy, on plain and on packed pages."""

from __future__ import annotations

import pytest
import torch
from reference import hf_policies
from support.policies import make_policy
from vllm_sparse.kernels.layout import PageLayout

from vllm_sparse.kv.tail.codec import PageCodec, PlainReader
from vllm_sparse.policies.attention import attend
from vllm_sparse.policies.quest import Quest
from vllm_sparse.steps import select

BLOCK, DIM, HEADS, GROUP, PAGE = 32, 16, 2, 3, 8


def vnni_pack(key, value, pages):
    """Keys in tiles of 16 tokens, values in tiles of 16 channels, both in pairs."""
    size, heads, dim = key.shape
    flat = pages.view(1, heads, 2, size * dim)
    keys = key.transpose(0, 1).reshape(heads, size // 16, 16, dim // 2, 2)
    flat[0, :, 0] = keys.permute(0, 1, 3, 2, 4).reshape(heads, -1)
    values = value.transpose(0, 1).reshape(heads, size // 2, 2, dim // 16, 16)
    flat[0, :, 1] = values.permute(0, 3, 1, 4, 2).reshape(heads, -1)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request):
    """Of keys, values and queries, as of a model."""
    return request.param


@pytest.fixture(params=["plain", "packed"])
def pool(request, dtype):
    """Three rows' keys and values, and a cache that holds them in scattered blocks."""
    generator = torch.Generator().manual_seed(0)
    layout = PageLayout(BLOCK, DIM, PAGE, 2 * DIM)
    lengths = torch.tensor([75, 0, 128], dtype=torch.int32)
    cache = torch.full((11, HEADS, BLOCK, 2 * DIM + 2 * DIM // PAGE), torch.nan).to(dtype)
    table = (1 + torch.randperm(10, generator=generator))[:9].view(3, 3).repeat(1, 2)[:, :4]
    table = torch.tensor([[3, 7, 1, 9], [0, 0, 0, 0], [2, 8, 5, 4]])
    keys, values = (
        torch.randn(3, HEADS, 4 * BLOCK, DIM, generator=generator).to(dtype) for _ in "kv"
    )
    packed = request.param == "packed"
    reader = PlainReader(layout)
    if packed:
        reader = PageCodec(vnni_pack, BLOCK, DIM, dtype, torch.device("cpu"))
    for row in (0, 2):
        for place, block in enumerate(table[row].tolist()):
            span = slice(place * BLOCK, (place + 1) * BLOCK)
            if packed:
                target = layout.tokens(cache)[block : block + 1].view(1, HEADS, 2 * BLOCK, DIM)
                part = (x[row, :, span].transpose(0, 1) for x in (keys, values))
                page = torch.zeros_like(target)
                vnni_pack(*part, page)
                layout.tokens(cache)[block] = page.view(HEADS, BLOCK, 2 * DIM)
            else:
                both = torch.cat((keys[row, :, span], values[row, :, span]), -1)
                layout.tokens(cache)[block] = both
    return layout, reader, cache, table, lengths, keys, values


def test_single_tokens_are_read_from_any_layout(pool):
    _, reader, cache, table, _, keys, values = pool
    token = torch.tensor([0, 31, 32, 127])
    head = torch.arange(HEADS)[:, None]
    rows = reader.at(cache, table[2][token // BLOCK], head, token % BLOCK)
    assert torch.equal(rows, torch.cat((keys[2][:, token], values[2][:, token]), -1))


@pytest.mark.parametrize("most_bytes", [1, 1 << 28], ids=["row by row", "all rows"])
@pytest.mark.parametrize("budget", [20, 100])
def test_a_step_reads_what_brute_force_reads(pool, dtype, budget, most_bytes, monkeypatch):
    """Also a row that is shorter than the budget, behind which anything lies."""
    monkeypatch.setattr(select, "MOST_INDEX_BYTES", most_bytes)
    layout, reader, cache, table, lengths, keys, values = pool
    policy = make_policy(
        Quest, page_size=PAGE, token_budget=budget, group_size=GROUP, head_dim=DIM, block_size=BLOCK
    )
    layout.tokens(cache)[table[0, 3]] = torch.nan
    options = {"policy": policy, "reader": reader, "layout": layout}
    for row in (0, 2):  # as it would be built: every page by the last token written to it
        last = torch.tensor([*range(PAGE - 1, int(lengths[row]), PAGE), int(lengths[row]) - 1])
        select.store_index(cache, table[row][last // BLOCK], last % BLOCK, **options)
    query = torch.randn(3, HEADS * GROUP, DIM, generator=torch.Generator().manual_seed(1)).to(dtype)
    positions = select.select_tokens(cache, query, table, lengths, **options)
    output = torch.full_like(query, torch.nan)
    del options["policy"]
    select.attend_tokens(cache, query, output, positions, table, lengths, scale=0.3, **options)
    assert not output[1].any()  # padding
    for row in (0, 2):
        n = int(lengths[row])
        run = hf_policies.Quest(1, PAGE, budget, 0)
        index = torch.stack(run.visible_tokens(0, query[row], keys[row, :, :n]))
        assert torch.equal(positions[row, :, :n], index)
        exact = (part[row].float() for part in (query, keys, values))
        torch.testing.assert_close(output[row], attend(*exact, index, 0.3).to(dtype))


def test_rows_are_scored_in_parts_that_fit(pool, dtype, monkeypatch):
    layout, reader, cache, table, lengths, *_ = pool
    policy = make_policy(
        Quest, page_size=PAGE, token_budget=20, group_size=GROUP, head_dim=DIM, block_size=BLOCK
    )
    layout.index(cache).copy_(torch.randn(layout.index(cache).shape))
    query = torch.randn(3, HEADS * GROUP, DIM).to(dtype)
    options = {"policy": policy, "reader": reader, "layout": layout}
    whole = select.select_tokens(cache, query, table, lengths, **options)
    monkeypatch.setattr(select, "MOST_INDEX_BYTES", 1)
    parts = select.select_tokens(cache, query, table, lengths, **options)
    assert torch.equal(whole[[0, 2]], parts[[0, 2]])


def test_an_earlier_token_does_not_see_later_ones_in_its_page(pool, dtype):
    """A preempted request stores several tokens at once; the stored index holds all of them."""
    layout, reader, cache, table, _, keys, _ = pool
    policy = make_policy(
        Quest, page_size=PAGE, token_budget=16, group_size=GROUP, head_dim=DIM, block_size=BLOCK
    )
    options = {"policy": policy, "reader": reader, "layout": layout}
    last = torch.arange(PAGE - 1, 128, PAGE)
    select.store_index(cache, table[2][last // BLOCK], last % BLOCK, **options)
    query = torch.randn(1, HEADS * GROUP, DIM, generator=torch.Generator().manual_seed(2)).to(dtype)
    for n in (121, 124, 127):
        chosen = select.select_tokens(cache, query, table[2:], torch.tensor([n]), **options)
        expected = hf_policies.Quest(1, PAGE, 16, 0).visible_tokens(0, query[0], keys[2, :, :n])
        assert torch.equal(chosen[0], torch.stack(expected))
        index = select._index(cache, table[2:], torch.tensor([n]), policy, reader, layout)
        newest = (n - 1) // PAGE
        page = keys[2, :, newest * PAGE : n]
        assert torch.equal(index[0, :, newest], torch.cat((page.amin(1), page.amax(1)), -1))
