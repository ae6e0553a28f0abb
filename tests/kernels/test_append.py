# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Storing tokens, extrema and queries that wait."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from support.kernels import DEVICE, FAR, close, same, with_gaps
from support.pages import batch_on_device, parked_rows
from vllm_sparse.kernels.reference import append as ref_append
from vllm_sparse.kernels.reference import decode as reference
from vllm_sparse.kernels.triton import append
from vllm_sparse.kernels.types import Probes

from vllm_sparse.kv.tail.compaction import QueryParking


@pytest.mark.parametrize("replays", [True, False])
@pytest.mark.parametrize("page_size", [1, 2, 4, 16])
def test_append_equals_reference(page_size, replays):
    batch = batch_on_device(rows=6, dim=40, longest=60, page_size=page_size, block_size=16)
    lengths = torch.tensor([60, 1, 0, 16, 17, 35], dtype=torch.int32, device=DEVICE)
    caches = [with_gaps(batch.cache, 2) for _ in range(2)]
    top_r = batch.top_r.clone()
    top_r[3:5] = 0  # nobody needs their extrema
    arguments = batch.key, batch.value, batch.table, lengths, lengths, top_r, batch.layout
    reference.append_tokens(caches[0], *arguments)
    append.append_tokens(caches[1], *arguments, replays=replays)
    assert same(*caches)


@pytest.mark.parametrize("replays", [True, False])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ({"dim": 40, "group": 3, "page_size": 4}, torch.float32),
        ({"dim": 128, "group": 1, "page_size": 1}, torch.bfloat16),
        ({"dim": 80, "group": 7, "page_size": 16, "block_size": 16}, torch.float16),
    ],
)
def test_probes_equal_reference(shape, dtype, replays):
    """A row that closes no page, one of one token, padding, one that reads everything, ties."""
    batch = batch_on_device(rows=6, longest=90, dtype=dtype, **shape)
    lengths = torch.tensor([60, 1, 0, 16, 17, 35], dtype=torch.int32, device=DEVICE)
    final = lengths + torch.tensor([3, 0, 0, 0, 2, 0], dtype=torch.int32, device=DEVICE)
    if not replays:
        final = lengths
    top_r = batch.top_r.clone()
    top_r[3] = 0
    batch.query[1] = 0.0
    batch.query[5] = batch.query[5].sign()
    batch.query[4, 0, batch.query[4].abs().sum(0) > batch.query[4].abs().sum(0).median()] = 0.0
    if dtype == torch.float16:  # rounded to the cache's
        batch = batch._replace(query=batch.query.float())
    rows, heads, dim = batch.query.shape
    ours = Probes(
        torch.full((rows, heads, dim), torch.nan, dtype=dtype, device=DEVICE),
        torch.full((rows, 2, dim), FAR, dtype=torch.int32, device=DEVICE),
        *torch.full((2, rows, heads), torch.nan, device=DEVICE),
    )
    theirs = Probes(*(part.clone() for part in ours))
    caches = [with_gaps(batch.cache.nan_to_num(0.3), 2) for _ in range(2)]
    arguments = batch.key, batch.value, batch.table, lengths, final, top_r, batch.layout
    for kernel, cache, probes in zip((ref_append, append), caches, (theirs, ours), strict=True):
        arrived = torch.full((2, 8, 2), FAR, dtype=torch.int32, device=DEVICE)[:, :6]
        kernel.append_tokens(cache, *arguments, replays=replays, query=batch.query, probes=probes,
                             scale=0.3, arrived=arrived)  # fmt: skip
        assert not arrived.any()
    assert same(*caches)
    defined = [0, 1, 4, 5]
    assert torch.equal(ours.query[defined], theirs.query[defined])
    assert torch.equal(ours.extreme[defined], theirs.extreme[defined])
    assert ours.scale[defined].isfinite().all()
    for actual, expected in zip(ours[2:], theirs[2:], strict=True):
        close(actual[defined], expected[defined], torch.float32)
    assert ours.scale[[2, 3]].isnan().all()  # nobody asked


@pytest.mark.parametrize("group", [1, 3])
def test_parked_queries_equal_reference_and_what_is_loaded(group):
    batch = batch_on_device(rows=4, group=group, longest=120)
    layout, per_block = batch.layout, 2 * batch.layout.pages_per_block // group
    tail, parked, top_r = parked_rows(batch, per_block)
    caches = [with_gaps(batch.cache, 2) for _ in range(2)]
    rows = batch.key, batch.value, batch.table, batch.lengths, batch.lengths, top_r, layout
    reference.append_tokens(caches[0], *rows)
    ref_append.park_queries(caches[0], batch.query, parked, layout, per_block)
    append.append_tokens(caches[1], *rows, replays=False, query=batch.query, parked=parked,
                         per_block=per_block)  # fmt: skip
    assert same(*caches)
    loaded = QueryParking(layout, group).load(caches[1], tail, per_block + 1)
    assert torch.equal(loaded[[0, per_block - 1, per_block]], batch.query[1:])
