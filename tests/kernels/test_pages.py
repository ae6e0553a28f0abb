# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Page scores, and the slots that they select."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from support.kernels import DEVICE, close, use_tile
from support.pages import batch_on_device
from vllm_sparse.kernels.layout import PageLayout
from vllm_sparse.kernels.reference import pages as ref_pages
from vllm_sparse.kernels.triton import pages
from vllm_sparse.kernels.types import PageScores

from vllm_sparse.policies import rocketkv as policy


@pytest.mark.usefixtures("_splitting_rows")
@pytest.mark.parametrize("page_size", [1, 4])
def test_page_scores_equal_reference(page_size):
    batch = batch_on_device(rows=4, group=3, page_size=page_size, longest=200)
    batch.query[1] = 0.0  # no temperature
    batch.query[2] = batch.query[2].sign()  # every channel ties
    lengths = batch.lengths - 1  # without an append
    lengths[3] = 0
    pages_per_block = batch.layout.pages_per_block
    for row, length in enumerate(lengths.tolist()[:3]):  # what the newest page stores is not read
        newest = (length - 1) // page_size
        block = batch.table[row, newest // pages_per_block].long()
        batch.layout.extrema(batch.cache)[block, ..., newest % pages_per_block] = torch.nan
    options = {"layout": batch.layout, "top_k": 20}
    inputs = batch.cache, batch.query, batch.table, lengths, batch.top_r
    expected, actual = (kernel.score_pages(*inputs, **options) for kernel in (ref_pages, pages))
    for row, length in enumerate(lengths.tolist()[:3]):
        used = -(-length // page_size)
        close(actual.logits[row, :, :used], expected.logits[row, :, :used], torch.float32)
    for scores in (actual, expected):
        probability = []
        for row, length in enumerate(lengths.tolist()[:3]):
            peak = scores.peak[row].amax(-1, keepdim=True)
            mass = (scores.mass[row] * (scores.peak[row] - peak).exp()).sum(-1, keepdim=True)
            used = -(-length // page_size)
            weight = (scores.logits[row, :, :used] - peak).exp() / mass
            probability.append(weight.unflatten(0, (2, -1)).sum(1))
            low, high = policy.page_extrema(batch.history[row][:, :length, :64], page_size)
            true = policy.page_probabilities(
                batch.query[row].cpu().view(2, -1, 64), low, high, lengths[row].cpu(), page_size,
                batch.top_r[row].cpu(),
            )  # fmt: skip
            close(probability[-1].cpu(), true, torch.float32)


def make_scores(lengths, kv_heads, group, width, page_size, shares=1, levels=None):
    """Random page scores; with few levels most pages tie."""
    generator = torch.Generator().manual_seed(width)
    logits = torch.randn(len(lengths), kv_heads * group, width, generator=generator)
    if levels:
        logits = (logits * levels).round() / levels
    peak = torch.zeros(len(lengths), kv_heads * group, shares)
    mass = torch.full_like(peak, 16.0 / shares)  # powers of two: both sides divide alike
    return PageScores(*(part.to(DEVICE) for part in (logits, peak, mass)))


@pytest.mark.parametrize("page_size", [1, 2, 4])
@pytest.mark.parametrize("top_k", [3, 64, 131])
@pytest.mark.parametrize("levels", [None, 1])
def test_selected_slots_equal_reference(page_size, top_k, levels, monkeypatch):
    """Also when pages tie: the lower page is taken first, the last one in part.

    The rows have 33 to 5,000 pages: up to a quarter of a tile, up to a tile, and several.
    """
    use_tile(monkeypatch, "select_slots", 1024)
    layout = PageLayout(32, 64, page_size)
    lengths = torch.tensor([131, 5000, 0, 1043, 132, 7], dtype=torch.int32, device=DEVICE)
    blocks = -(-5000 // 32)
    table = torch.randperm(6 * blocks, generator=torch.Generator().manual_seed(0)).view(6, -1)
    table = table.int().to(DEVICE)
    group = 1 if levels else 3  # sums in another order would break exact ties
    scores = make_scores(lengths, 2, group, blocks * layout.pages_per_block, page_size, 2, levels)
    options = {"layout": layout, "top_k": top_k, "kv_heads": 2}
    expected, actual = (
        kernel.select_slots(scores, table, lengths, lengths, **options)
        for kernel in (ref_pages, pages)
    )
    for row, length in enumerate(lengths.tolist()):
        count = min(length, top_k)
        assert torch.equal(actual[row, :, :count], expected[row, :, :count]), (row, length)
