# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Page scores, and the slots that they select."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from support.adversary import OrderError, start_over
from support.kernels import DEVICE, FAR, use_tile, with_gaps
from support.pages import batch_on_device
from vllm_sparse.kernels.layout import PageLayout
from vllm_sparse.kernels.reference import append as ref_append
from vllm_sparse.kernels.reference import pages as ref_pages
from vllm_sparse.kernels.triton import choose, grid, launch, pages
from vllm_sparse.kernels.types import Probes

from vllm_sparse.policies import rocketkv as policy


def lists(slots, lengths, top_k):
    """What counts of the slots."""
    return [slots[row, :, : min(n, top_k)].tolist() for row, n in enumerate(lengths.tolist())]


@pytest.mark.usefixtures("_splitting_rows")
@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("page_size", [1, 4])
def test_slots_equal_reference_and_policy(page_size, private):
    batch = batch_on_device(rows=4, group=3, page_size=page_size, longest=200)
    batch.query[1] = 0.0  # no temperature
    batch.query[2] = batch.query[2].sign()  # every channel ties
    lengths = batch.lengths - 1  # without an append
    lengths[3] = 0
    pages_per_block, top_k = batch.layout.pages_per_block, 20
    for row, length in enumerate(lengths.tolist()[:3]):  # what the newest page stores is not read
        newest = (length - 1) // page_size
        block = batch.table[row, newest // pages_per_block].long()
        batch.layout.index(batch.cache)[block, ..., newest % pages_per_block] = torch.nan
    rows = batch.table, lengths, batch.top_r
    probes = ref_append.probe_pages(batch.cache, batch.query, *rows, batch.layout, 0.3)
    options = {"layout": batch.layout, "top_k": top_k, "private": private}
    expected, actual = (
        lists(kernel.select_slots(batch.cache, probes, *rows, **options), lengths, top_k)
        for kernel in (ref_pages, pages)
    )
    for row in (0, 2, 3):  # all pages of row 1 tie but for rounding
        assert actual[row] == expected[row]
    for row, length in enumerate(lengths.tolist()[:3]):
        low, high = policy.page_extrema(batch.history[row][:, :length, :64], page_size)
        probability = policy.page_probabilities(
            batch.query[row].cpu().view(2, -1, 64), low, high, lengths[row].cpu(), page_size,
            batch.top_r[row].cpu(), 0.3,
        )  # fmt: skip
        chosen, taken = policy.select_pages(probability, lengths[row].cpu(), page_size, top_k)
        token = policy.page_tokens(chosen, taken, page_size)[:, :top_k]
        block = batch.table[row].cpu().long()[token // 32]
        assert row == 1 or actual[row] == (block * 32 + token % 32).tolist()


def make_ranked(lengths, kv_heads, group, blocks, layout, levels=None):
    """A cache and probes by which a query head's logit of a page is one number of its index.

    With few levels most pages tie.
    """
    generator = torch.Generator().manual_seed(blocks)
    dim, rows = layout.head_dim, len(lengths)
    shape = (rows * blocks + 1, kv_heads, layout.block_size, 2 * dim + 2 * dim // layout.page_size)
    cache = torch.full(shape, torch.nan)
    bounds = torch.randn(shape[0], kv_heads, dim, layout.pages_per_block, generator=generator)
    if levels:
        bounds = (bounds * levels).round() / levels
    layout.index(cache)[:, :, :dim] = bounds
    table = torch.randperm(rows * blocks, generator=generator).view(rows, blocks).int() + 1
    query = torch.zeros(rows, kv_heads, group, dim)
    query[:, :, torch.arange(group), torch.arange(group)] = 1.0
    extreme = torch.full((rows, kv_heads, dim), -1, dtype=torch.int32)
    extreme[..., :group] = torch.arange(group, dtype=torch.int32)
    ones = torch.ones(rows, kv_heads * group)
    probes = Probes(query.flatten(1, 2), extreme, ones, 0.5 * ones)
    probes = Probes(*(part.to(DEVICE) for part in probes))
    return with_gaps(cache.to(DEVICE), 2), table.to(DEVICE), probes


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize(("page_size", "top_k"), [(1, 3), (2, 131), (4, 64), (4, 131)])
@pytest.mark.parametrize("levels", [None, 1])
def test_selected_slots_equal_reference(page_size, top_k, levels, private, monkeypatch):
    """Also when pages tie: the lower page is taken first, the last one in part.

    The rows have 33 to 5,000 pages: up to a quarter of the registers, all of them, and several
    passes. Twice with the same scratch and counters, as a graph is replayed.
    """
    use_tile(monkeypatch, "select_slots", 64)
    monkeypatch.setattr(pages, "pages_at_once", lambda warps: 1024)
    layout = PageLayout(32, 16, page_size)
    lengths = torch.tensor([131, 5000, 0, 1043, 132, 7], dtype=torch.int32, device=DEVICE)
    top_r = lengths.clone()
    top_r[4] = 0  # reads everything: nothing is selected
    group = 1 if levels else 3  # sums in another order would break exact ties
    cache, table, probes = make_ranked(lengths, 2, group, -(-5000 // 32), layout, levels)
    options = {"layout": layout, "top_k": top_k}
    expected = ref_pages.select_slots(cache, probes, table, lengths, top_r, **options)
    arrived = torch.zeros(6, 2, dtype=torch.int32, device=DEVICE)
    for _ in range(2):
        out = torch.full_like(expected, FAR)
        actual = pages.select_slots(
            cache, probes, table, lengths, top_r, private=private, arrived=arrived, out=out,
            **options,
        )  # fmt: skip
        assert actual is out
        for row, length in enumerate(lengths.tolist()):
            count = 0 if row == 4 else min(length, top_k)
            assert torch.equal(actual[row, :, :count], expected[row, :, :count]), (row, length)
            assert (actual[row, :, count:] == FAR).all()
        assert arrived.max() > 1  # several programs scored, and the last one selected
        arrived.zero_()


def test_rows_that_score_may_share_blocks_unless_they_promise_not_to():
    """As replayed tokens of one request do: each row's scores are its own."""
    batch = batch_on_device(rows=2, group=1, longest=200)
    rows = batch.table[:1].expand(2, -1), batch.lengths[:1].expand(2) - 1, batch.top_r
    probes = ref_append.probe_pages(batch.cache, batch.query, *rows, batch.layout, 0.3)
    options = {"layout": batch.layout, "top_k": 20}
    expected = ref_pages.select_slots(batch.cache, probes, *rows, **options)
    assert not torch.equal(expected[0], expected[1])
    found = pages.select_slots(batch.cache, probes, *rows, private=False, **options)
    assert torch.equal(found, expected)
    if DEVICE.type == "cpu":  # rows that break their promise overwrite each other's scores
        start_over()
        with pytest.raises(OrderError, match="scores"):
            pages.select_slots(batch.cache, probes, *rows, private=True, **options)


def test_parts_fill_whole_waves(monkeypatch):
    """Shares of a row and KV head, by rows times KV heads, where 264 programs fit at once."""
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 132)
    assert grid.RESIDENT["select_slots"] == (2, 2)
    found = {
        pairs: pages.score_shares(pairs, 33000, 64, 256, DEVICE) for pairs in (8, 64, 216, 320, 512)
    }
    assert found == {8: 33, 64: 4, 216: 1, 320: 3, 512: 1}
    assert pages.score_shares(8, 300, 64, 256, DEVICE) == 5  # no more than a row has tiles
    assert choose.LOG2_E.value == launch.LOG2_E
