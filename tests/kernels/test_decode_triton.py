# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""RocketKV's decode step in Triton, and what bounds its scratch."""

from __future__ import annotations

import weakref

import pytest
import torch

pytest.importorskip("triton")

from support.kernels import DEVICE, close, same, use_tile, with_gaps
from support.pages import batch_on_device, decode
from vllm_sparse.kernels import dispatch
from vllm_sparse.kernels.reference import append as ref_append
from vllm_sparse.kernels.reference import attention as ref_attention
from vllm_sparse.kernels.reference import decode as reference
from vllm_sparse.kernels.reference import pages as ref_pages
from vllm_sparse.kernels.triton import attention, launch
from vllm_sparse.kernels.triton import decode as decode_kernel
from vllm_sparse.kernels.triton.grid import grid_of

SHAPES = [
    {"rows": 2, "kv_heads": 3, "group": 3, "block_size": 128, "longest": 400},
    {"rows": 3, "group": 7, "page_size": 2, "dtype": torch.bfloat16},
    {"rows": 2, "group": 1, "dim": 80, "page_size": 1, "longest": 150},
    {"rows": 2, "kv_heads": 1, "group": 16, "dim": 128, "block_size": 64, "dtype": torch.bfloat16},
    {"rows": 2, "group": 4, "dim": 40, "block_size": 16, "longest": 90},
    {"rows": 2, "group": 5, "dim": 96, "dtype": torch.float16},
    {"rows": 2, "group": 12, "dim": 256, "block_size": 128},
]


@pytest.mark.usefixtures("_splitting_rows")
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(f"{k}{v}" for k, v in s.items()))
@pytest.mark.parametrize(("top_k", "read_all"), [(37, False), (5000, False), (8, True)])
def test_decode_step_equals_reference(shape, top_k, read_all):
    batch = batch_on_device(**shape)
    expected_cache, expected = decode(reference.decode_attention, batch, top_k, read_all=read_all)
    cache, output = decode(
        decode_kernel.decode_attention, batch, top_k, read_all=read_all, replays=top_k == 37
    )
    close(output, expected, batch.cache.dtype)
    assert same(cache, expected_cache)


@pytest.mark.usefixtures("_splitting_rows")
@pytest.mark.parametrize("top_k", [1, 2, 3, 5, 64])
def test_any_number_of_tokens_is_selected(top_k):
    """Budgets below one page, rows at the budget, just above it, and of one token."""
    batch = batch_on_device(rows=5, longest=160)
    lengths = torch.tensor([top_k, top_k + 1, 1, 160, 66], dtype=torch.int32, device=DEVICE)
    batch = batch._replace(lengths=lengths, cache=batch.cache.nan_to_num(0.3))
    _, expected = decode(reference.decode_attention, batch, top_k)
    _, output = decode(decode_kernel.decode_attention, batch, top_k)
    close(output, expected, torch.float32)


@pytest.fixture
def scratch(monkeypatch):
    """Bytes that are held and were at most, of what is allocated uninitialised meanwhile."""
    held = {"now": 0, "most": 0}

    def counting(allocate):
        def counted(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            held["now"] += tensor.nbytes
            held["most"] = max(held.values())
            weakref.finalize(tensor, release, tensor.nbytes)
            return tensor

        return counted

    def release(size):
        held["now"] -= size

    monkeypatch.setattr(torch, "empty", counting(torch.empty))
    monkeypatch.setattr(torch.Tensor, "new_empty", counting(torch.Tensor.new_empty))
    return held


@pytest.mark.usefixtures("_splitting_rows")
def test_scratch_of_rows_that_share_no_blocks_follows_the_cache(scratch):
    """Not the width of their table: one launch scores any number of them."""
    batch = batch_on_device(rows=3, longest=150)
    wide = torch.full((3, 400), 1 << 30, dtype=torch.int32, device=DEVICE)
    wide[:, : batch.table.shape[1]] = batch.table
    expected = decode(reference.decode_attention, batch, 37)[1]
    scratch.update(now=0, most=0)
    output = torch.zeros_like(batch.query)
    decode_kernel.decode_attention(
        with_gaps(batch.cache, 2), batch.query, batch.key, batch.value, output, wide,
        batch.lengths, batch.lengths, batch.top_r, layout=batch.layout, top_k=37, scale=0.11,
        replays=False,
    )  # fmt: skip
    close(output, expected, torch.float32)
    scores = 4 * len(batch.cache) * batch.layout.pages_per_block * (6 + 2)
    assert scores < scratch["most"] < 4 * 3 * 400 * batch.layout.pages_per_block * (6 + 2)


@pytest.mark.usefixtures("_splitting_rows")
@pytest.mark.parametrize("most_planes", [1 << 30, 0])
def test_drafts_are_scored_by_one_launch_however_long_requests_may_be(
    most_planes, scratch, monkeypatch
):
    """Each row of a request has scores of its own, as many planes as a request has rows.

    Where these would be too many, scratch goes by rows, and so does the number of launches.
    """
    monkeypatch.setattr(decode_kernel, "_MOST_SCORES", 1 << 22)
    monkeypatch.setattr(decode_kernel, "_MOST_PLANES", most_planes)
    scored = count_launches(monkeypatch)
    batch = batch_on_device(rows=9, longest=150)
    of_request = torch.arange(9, device=DEVICE) // 3 * 3
    final = batch.lengths[of_request]
    lengths = final - torch.tensor([2, 1, 0] * 3, device=DEVICE).int()
    table = batch.table[of_request]
    batch = batch._replace(table=table, lengths=lengths, top_r=batch.top_r[of_request])
    expected_cache, expected = decode(reference.decode_attention, batch, 37, final=final)
    wide = torch.full((9, 16384), 1 << 30, dtype=torch.int32, device=DEVICE)
    wide[:, : table.shape[1]] = table
    scratch.update(now=0, most=0)
    cache, output = decode(
        decode_kernel.decode_attention, batch._replace(table=wide), 37, final=final, most_rows=3
    )
    close(output, expected, torch.float32)
    assert same(cache, expected_cache)
    assert scored == ([9] if most_planes else [4, 4, 1])
    bound = decode_kernel.decode_scratch_bytes(
        9, 16384, len(cache), layout=batch.layout, heads=6, kv_heads=2, top_k=37,
        dtype=torch.float32, device=DEVICE, most_rows=3,
    )  # fmt: skip
    assert scratch["most"] - cache.nbytes - output.nbytes <= bound


def count_launches(monkeypatch):
    """How many rows each launch scores from now on."""
    scored, right = [], decode_kernel.select_slots

    def select(cache, probes, *args, **kwargs):
        scored.append(len(probes.query))
        return right(cache, probes, *args, **kwargs)

    monkeypatch.setattr(decode_kernel, "select_slots", select)
    return scored


@pytest.mark.usefixtures("_splitting_rows")
@pytest.mark.parametrize("most", [1 << 30, 40_000])
def test_scratch_of_a_decode_is_bounded(most, scratch, monkeypatch):
    """Page scores of some rows at a time select the same tokens."""
    monkeypatch.setattr(decode_kernel, "_MOST_SCORES", most)
    batch = batch_on_device(rows=9, group=3, longest=300, page_size=1)
    scored = count_launches(monkeypatch)
    output = torch.zeros_like(batch.query)
    arguments = (batch.cache, batch.query, batch.key, batch.value, output, batch.table,
                 batch.lengths, batch.lengths, batch.top_r)  # fmt: skip
    decode_kernel.decode_attention(*arguments, layout=batch.layout, top_k=37, scale=0.11)
    expected = decode(reference.decode_attention, batch, 37)[1]
    close(output, expected, torch.float32)
    assert scored == ([9] if most > 40_000 else [4, 4, 1])
    bound = decode_kernel.decode_scratch_bytes(
        9, batch.table.shape[1], 0, layout=batch.layout, heads=6, kv_heads=2, top_k=37,
        dtype=torch.float32, device=DEVICE,
    )  # fmt: skip
    assert 0.9 * bound <= scratch["most"] <= bound
    assert scratch["now"] == 0


@pytest.mark.usefixtures("_splitting_rows")
def test_rows_without_channels_read_everything():
    """Requests that stay dense share a captured batch with sparse ones."""
    batch = batch_on_device(rows=3, longest=150)
    top_r = batch.top_r.clone()
    top_r[1] = 0
    mixed = batch._replace(top_r=top_r)
    expected_cache, expected = decode(reference.decode_attention, mixed, 37)
    cache, output = decode(decode_kernel.decode_attention, mixed, 37)
    close(output, expected, torch.float32)
    assert same(cache, expected_cache)
    _, everything = decode(decode_kernel.decode_attention, batch, 37, read_all=True)
    close(output[1], everything[1], torch.float32)


@pytest.mark.usefixtures("_splitting_rows")
@pytest.mark.parametrize("read_all", [False, True])
def test_padding_rows_are_zero_and_write_nothing(read_all):
    batch = batch_on_device(rows=3, longest=130)
    _, whole = decode(decode_kernel.decode_attention, batch, 32, read_all=read_all)
    lengths = batch.lengths.clone()
    lengths[1] = 0
    table = batch.table.clone()
    table[1] = -1  # whatever a captured graph left there
    padded = batch._replace(lengths=lengths, table=table)
    cache, output = decode(decode_kernel.decode_attention, padded, 32, read_all=read_all)
    assert not output[1].any()
    close(output[[0, 2]], whole[[0, 2]], torch.float32)  # shares follow what all rows read
    untouched = batch.table[1].long()
    assert same(cache[untouched], batch.cache[untouched])


def test_a_batch_may_be_all_padding_or_empty():
    batch = batch_on_device(rows=2, longest=40)
    padded = batch._replace(lengths=torch.zeros_like(batch.lengths))
    cache, output = decode(decode_kernel.decode_attention, padded, 32)
    assert not output.any()
    assert same(cache, batch.cache)
    names = ("query", "key", "value", "table", "lengths", "top_r")
    empty = batch._replace(**{name: getattr(batch, name)[:0] for name in names})
    decode(decode_kernel.decode_attention, empty, 32)


@pytest.mark.parametrize("page_size", [2, 4])
def test_replayed_tokens_give_what_they_gave_one_by_one(page_size):
    steps = 6
    batch = batch_on_device(rows=steps, page_size=page_size, longest=100)
    first = int(batch.lengths[0])
    lengths = torch.arange(first, first + steps, dtype=torch.int32, device=DEVICE)
    batch = batch._replace(table=batch.table[:1].expand(steps, -1), lengths=lengths)
    final = torch.full_like(lengths, first + steps - 1)
    cache, output = decode(decode_kernel.decode_attention, batch, 24, final=final)
    expected_cache, expected = decode(reference.decode_attention, batch, 24, final=final)
    close(output, expected, torch.float32)
    assert same(cache, expected_cache)


@pytest.mark.parametrize("top_r", [None, 0])
def test_programs_share_out_what_rows_read(top_r, monkeypatch):
    """Few programs take shares in turn: a long row has many of them, a short one one of its own."""
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 2)
    use_tile(monkeypatch, "attend", 16)
    batch = batch_on_device(rows=3, longest=1300)
    lengths = torch.tensor([1300, 0, 40], dtype=torch.int32, device=DEVICE)
    batch = batch._replace(lengths=lengths, cache=batch.cache.nan_to_num(0.3))
    if top_r is not None:
        batch = batch._replace(top_r=torch.full_like(batch.top_r, top_r))
    grids, made = [], []
    right = attention.make_shares

    def poisoned(*sizes):
        made.append(right(*sizes))
        for part in made[-1]:
            part.fill_(torch.nan)
        return made[-1]

    monkeypatch.setattr(attention, "make_shares", poisoned)
    find = attention.attend_grid
    monkeypatch.setattr(attention, "attend_grid", lambda *a: grids.append(find(*a)) or grids[-1])
    _, output = decode(decode_kernel.decode_attention, batch, 200)
    _, expected = decode(reference.decode_attention, batch, 200)
    close(output, expected, torch.float32)
    (programs, shares), (scratch,) = grids[0], made
    lse = scratch.lse.flatten().view(6, shares, 3)  # by row and KV head
    used = (~lse.isnan()).all(2).sum(1).tolist()
    tiles = [13, 3] if top_r is None else [82, 3]
    size = -(-2 * sum(tiles) // programs)
    counts = [-(-count // size) for count in tiles]
    long, short = (count if count > 1 else 0 for count in counts)  # one share needs no scratch
    assert programs == 8
    assert used == [long, long, 0, 0, short, short]
    assert long > 1


def test_one_row_that_reads_everything_does_not_hold_up_a_large_batch():
    """256 rows of eight KV heads on an H200: no share is twice what an even spread gives each."""
    programs, shares = grid_of(528, 256 * 8, 512, 131072, 32, 132)
    assert programs == 528
    tiles = [131072 // 32, *[512 // 32] * 255]
    even = -(-8 * sum(tiles) // programs)
    assert -(-tiles[0] // shares) <= 2 * even


def test_the_parts_of_the_reference_make_up_its_whole():
    batch = batch_on_device(rows=3, longest=120)
    _, expected = decode(reference.decode_attention, batch, 37)
    cache = with_gaps(batch.cache, 2)
    reference.append_tokens(cache, batch.key, batch.value, batch.table, batch.lengths,
                            batch.lengths, batch.top_r, batch.layout)  # fmt: skip
    options = {"layout": batch.layout, "top_k": 37}
    rows = batch.table, batch.lengths, batch.top_r
    probes = ref_append.probe_pages(cache, batch.query, *rows, batch.layout, 0.11)
    slots = ref_pages.select_slots(cache, probes, *rows, **options)
    output = torch.empty_like(batch.query)
    ref_attention.attend_slots(cache, batch.query, output, slots, *rows, **options, scale=0.11)
    close(output, expected, torch.float32)


@pytest.mark.usefixtures("_splitting_rows")
def test_nan_queries_show():
    batch = batch_on_device(rows=2, longest=100)
    for sign in (1, -1):
        query = torch.full_like(batch.query, sign * torch.nan)
        _, output = decode(decode_kernel.decode_attention, batch._replace(query=query), 37)
        assert output.isnan().all()


def test_dispatch_returns_triton_where_it_runs(monkeypatch):
    import triton

    monkeypatch.setattr(launch, "launches", lambda device: launch.Table({}, "of any GPU"))
    for device in (torch.device("cuda"), DEVICE):
        assert dispatch.policy_triton(device).decode is decode_kernel.decode_attention
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = False
        with pytest.raises(ValueError, match="CUDA"):
            dispatch.policy_triton(torch.device("cpu", 0))
