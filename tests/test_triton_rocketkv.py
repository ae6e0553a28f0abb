# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The Triton kernels against their references: on a GPU if there is one, else interpreted.

``conftest.py`` chooses the interpreter.
"""

from __future__ import annotations

import collections
import re
import sys
import weakref

import pytest
import torch

pytest.importorskip("triton")

from support.ahead_of_time import compile_only, compiled, name_only
from support.kernels import DEVICE, close, same, use_tile, with_gaps
from support.policies import make_policy
from test_kernels import make_batch
from vllm_sparse.kernels import dispatch
from vllm_sparse.kernels.layout import PageLayout
from vllm_sparse.kernels.reference import append as ref_append
from vllm_sparse.kernels.reference import attention as ref_attention
from vllm_sparse.kernels.reference import compaction as ref_compaction
from vllm_sparse.kernels.reference import decode as reference
from vllm_sparse.kernels.reference import pages as ref_pages
from vllm_sparse.kernels.reference import prompt as ref_prompt
from vllm_sparse.kernels.reference import rows as ref_rows
from vllm_sparse.kernels.reference import topk as ref_topk
from vllm_sparse.kernels.triton import append, attention, compaction, launch, pages, prompt, topk
from vllm_sparse.kernels.triton import decode as decode_kernel
from vllm_sparse.kernels.triton import rows as rows_kernel
from vllm_sparse.kernels.types import PageScores, Rows

from vllm_sparse.kv.tail.codec import PageCodec
from vllm_sparse.kv.tail.compaction import QueryParking, compact_prompt
from vllm_sparse.policies import rocketkv as policy


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch):
    """Parts of the interpreter are imported by the first launch."""
    if DEVICE.type == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _poisoned_integers(monkeypatch):
    """Uninitialised lists of slots point far outside any cache."""
    original = torch.empty

    def poisoned(*args, **kwargs):
        tensor = original(*args, **kwargs)
        return tensor.fill_(1 << 30) if tensor.dtype == torch.int32 else tensor

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture(params=[1, 64], ids=["whole", "split"])
def _splitting(request, monkeypatch):
    """One program per row and KV head, or as many as there are tiles."""
    monkeypatch.setattr(launch, "multiprocessors", lambda device: request.param)


def batch_on_device(**shape):
    batch = make_batch(**shape)
    cache = with_gaps(batch.cache.to(DEVICE), 2)
    # vLLM hands over slices of one fused QKV row.
    dim, kv_heads = batch.layout.head_dim, cache.shape[1]
    fused = torch.cat((batch.query, batch.key, batch.value), 1).flatten(1).to(DEVICE)
    heads = batch.query.shape[1]
    query, key, value = (
        part.unflatten(1, (-1, dim))
        for part in fused.split([heads * dim, kv_heads * dim, kv_heads * dim], 1)
    )
    return batch._replace(
        cache=cache, query=query, key=key, value=value, table=batch.table.to(DEVICE),
        lengths=batch.lengths.to(DEVICE), top_r=batch.top_r.to(DEVICE),
    )  # fmt: skip


def decode(kernel, batch, top_k, *, final=None, cache=None, **options):
    cache = with_gaps(batch.cache, 2) if cache is None else cache
    output = with_gaps(torch.empty_like(batch.query.contiguous()), 2)
    final = batch.lengths if final is None else final
    kernel(cache, batch.query, batch.key, batch.value, output, batch.table, batch.lengths,
           final, batch.top_r, layout=batch.layout, top_k=top_k, scale=0.11, **options)  # fmt: skip
    return cache, output


SHAPES = [
    {"rows": 2, "kv_heads": 3, "group": 3, "block_size": 128, "longest": 400},
    {"rows": 3, "group": 7, "page_size": 2, "dtype": torch.bfloat16},
    {"rows": 2, "group": 1, "dim": 80, "page_size": 1, "longest": 150},
    {"rows": 2, "kv_heads": 1, "group": 16, "dim": 128, "block_size": 64, "dtype": torch.bfloat16},
    {"rows": 2, "group": 4, "dim": 40, "block_size": 16, "longest": 90},
    {"rows": 2, "group": 5, "dim": 96, "dtype": torch.float16},
    {"rows": 2, "group": 12, "dim": 256, "block_size": 128},
]


@pytest.mark.usefixtures("_splitting")
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


@pytest.mark.usefixtures("_splitting")
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


@pytest.mark.usefixtures("_splitting")
@pytest.mark.parametrize("most", [1 << 30, 40_000])
def test_scratch_of_a_decode_is_bounded(most, scratch, monkeypatch):
    """Page scores of some rows at a time select the same tokens."""
    monkeypatch.setattr(decode_kernel, "_MOST_SCORES", most)
    batch = batch_on_device(rows=9, group=3, longest=300, page_size=1)
    scored = []
    right = decode_kernel.score_pages

    def score(*args, **kwargs):
        scored.append(len(args[1]))
        return right(*args, **kwargs)

    monkeypatch.setattr(decode_kernel, "score_pages", score)
    output = torch.zeros_like(batch.query)
    arguments = (batch.cache, batch.query, batch.key, batch.value, output, batch.table,
                 batch.lengths, batch.lengths, batch.top_r)  # fmt: skip
    decode_kernel.decode_attention(*arguments, layout=batch.layout, top_k=37, scale=0.11)
    expected = decode(reference.decode_attention, batch, 37)[1]
    close(output, expected, torch.float32)
    assert scored == ([9] if most > 40_000 else [4, 4, 1])
    bound = decode_kernel.decode_scratch_bytes(
        9, batch.table.shape[1], layout=batch.layout, heads=6, kv_heads=2, top_k=37,
        dtype=torch.float32, device=DEVICE,
    )  # fmt: skip
    assert 0.9 * bound <= scratch["most"] <= bound
    assert scratch["now"] == 0


@pytest.mark.usefixtures("_splitting")
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


def make_rows(count, width):
    """Buffers that hold what an earlier step left there."""
    table = torch.full((count, width), 1 << 30, dtype=torch.int32, device=DEVICE)
    return Rows(table, *(torch.full((count,), 7, dtype=torch.int32, device=DEVICE) for _ in "abc"))


@pytest.mark.parametrize("window", [8, 0])
def test_planned_rows_equal_reference(window):
    """Sparse, dense, inside the prompt, inside its window, padding."""
    generator = torch.Generator().manual_seed(0)
    rules = torch.zeros(301, 3, dtype=torch.int32)
    rules[100:, 0] = torch.arange(201) // 40
    rules[100:, 1] = torch.randint(1, 64, (201,), generator=generator)
    rules[100:, 2] = rules[100:, 0] // 2
    seq_lens = torch.tensor([0, 51, 299, 180, 201, 196, 191, 192, 200, 300, 260])
    prompts = torch.tensor([9, 50, 120, 200, 200, 200, 200, 199, 200, 299, 1000])
    table = torch.randint(1, 999, (len(seq_lens), 25), generator=generator).int().to(DEVICE)
    table = with_gaps_int(table)
    arguments = [part.int().to(DEVICE) for part in (seq_lens, prompts)]
    options = {"block_size": 16, "window": window, "per_block": 3, "top_k": 90}
    results = []
    for module in (ref_rows, rows_kernel):
        rows = make_rows(len(seq_lens), 25)
        counted = torch.ones(3, dtype=torch.int64, device=DEVICE)
        module.plan_rows(rows, *arguments, table, rules.to(DEVICE), counted, **options)
        results.append((*rows, counted))
    for expected, actual in zip(*results, strict=True):
        assert torch.equal(expected, actual)
    table_out, lengths, top_r, parked, counted = results[1]
    assert lengths.tolist()[:5] == [0, 51, 299, 180, 201 - 2 * 16]
    assert top_r.bool().tolist() == [False, False, True, False, True, *[False] * 3, False, True,
                                     False]  # fmt: skip
    assert int(table_out[4, 0]) == int(table[4, 2])
    window_rows = [5, 7, 8] if window else []
    assert (parked >= 0).nonzero()[:, 0].tolist() == window_rows
    assert int(counted[0]) == 4


def with_gaps_int(table: torch.Tensor) -> torch.Tensor:
    wide = torch.full((len(table), table.shape[1] + 3), -5, dtype=table.dtype, device=DEVICE)
    return wide[:, : table.shape[1]].copy_(table)


@pytest.mark.parametrize("group", [1, 3])
def test_parked_queries_equal_reference_and_what_is_loaded(group):
    batch = batch_on_device(rows=4, group=group, longest=120)
    layout, per_block = batch.layout, 2 * batch.layout.pages_per_block // group
    tail = batch.table[1, :2].clone()
    place = torch.tensor([-1, 0, per_block - 1, per_block], device=DEVICE)
    parked = tail.long()[place // per_block] * per_block + place % per_block
    parked = torch.where(place < 0, -1, parked).int()
    # Rows whose queries wait read everything and leave the extrema alone.
    top_r = torch.where(parked >= 0, 0, batch.top_r)
    caches = [with_gaps(batch.cache, 2) for _ in range(2)]
    rows = batch.key, batch.value, batch.table, batch.lengths, batch.lengths, top_r, layout
    reference.append_tokens(caches[0], *rows)
    ref_append.park_queries(caches[0], batch.query, parked, layout, per_block)
    append.append_tokens(caches[1], *rows, replays=False, query=batch.query, parked=parked,
                         per_block=per_block)  # fmt: skip
    assert same(*caches)
    loaded = QueryParking(layout, group).load(caches[1], tail, per_block + 1)
    assert torch.equal(loaded[[0, per_block - 1, per_block]], batch.query[1:])


@pytest.mark.usefixtures("_splitting")
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
    assert torch.equal(output[[0, 2]], whole[[0, 2]])
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


@pytest.mark.usefixtures("_splitting")
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


@pytest.mark.usefixtures("_splitting")
@pytest.mark.parametrize("listed", [True, False])
def test_attention_over_slots_equals_reference(listed):
    batch = batch_on_device(rows=3, group=3, dim=80, longest=190)
    lengths = batch.lengths - 1
    lengths[1] = 0
    top_k = 133
    slots = None
    if listed:
        generator = torch.Generator().manual_seed(0)
        slots = torch.full((3, 2, top_k), 1 << 30, dtype=torch.int32)
        for row in range(3):
            count = min(int(lengths[row]), top_k)
            for head in range(2):
                token = torch.randperm(int(lengths[row]), generator=generator)[:count]
                block = batch.table[row].cpu().long()[token // 32]
                slots[row, head, :count] = block * 32 + token % 32
        slots = slots.to(DEVICE)
    outputs = [with_gaps(torch.empty_like(batch.query.contiguous()), 2) for _ in range(2)]
    for kernel, output in zip((ref_attention, attention), outputs, strict=True):
        kernel.attend_slots(batch.cache, batch.query, output, slots, batch.table, lengths,
                            batch.top_r, layout=batch.layout, top_k=top_k, scale=0.2)  # fmt: skip
    close(outputs[1], outputs[0], torch.float32)
    assert not outputs[1][1].any()


@pytest.mark.parametrize("read_all", [True, False])
def test_a_long_row_is_split_where_rows_fill_the_gpu(read_all, monkeypatch):
    """Short rows are one share then, of several tiles; a long one has several such shares."""
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 1)
    use_tile(monkeypatch, "score_pages", 32)
    batch = batch_on_device(rows=2, page_size=1, longest=1300)
    batch = batch._replace(lengths=torch.tensor([1300, 40], dtype=torch.int32, device=DEVICE))
    batch = batch._replace(cache=batch.cache.nan_to_num(0.3))
    made = []
    for module, name in ((pages, "PageScores"), (attention, "Shares")):
        right = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *parts, right=right: made.append(parts[-1]) or right(*parts)
        )
    _, output = decode(decode_kernel.decode_attention, batch, 700, read_all=read_all)
    _, expected = decode(reference.decode_attention, batch, 700, read_all=read_all)
    close(output, expected, torch.float32)
    used = [(part > -torch.inf).sum(-1)[:, 0].tolist() for part in made]
    assert used == ([[3, 1]] if read_all else [[2, 0], [2, 1]])


def test_shares_follow_from_shapes(monkeypatch):
    """Few rows fill the GPU; more are split for the sake of long ones, as far as that is cheap."""
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 132)
    entries = [(1, 1 << 17), (1, 300), (4, 1 << 17), (64, 1 << 17), (64, 600), (512, 1 << 17)]
    found = [launch.split_rows(8 * rows, most, 32, DEVICE, 512) for rows, most in entries]
    assert found == [(64, 1), (10, 1), (17, 1), (16, 8), (3, 8), (2, 16)]


def test_launches_follow_the_bytes_of_a_head(monkeypatch):
    entry = launch.Launch(64, 4, 2), launch.Launch(32, 8, 2)
    monkeypatch.setitem(launch._SM80, "attend", entry)
    sizes = [(128, torch.bfloat16), (64, torch.float32), (256, torch.float16), (128, torch.float32)]
    found = [launch.launch("attend", torch.device("cpu"), *size) for size in sizes]
    assert found == [entry[0], entry[0], entry[1], entry[1]]
    wide = launch.launch("attend", torch.device("cpu"), 256, torch.float32)
    assert wide == (16, 8, 2)


@pytest.mark.parametrize(
    ("kernel", "block", "warps"), [("top_indices", 128, 4), ("select_slots", 1024, 8)]
)
def test_threads_that_count_have_an_entry_each(kernel, block, warps):
    assert launch.valid(kernel, launch.Launch(block, warps, 1))
    assert not launch.valid(kernel, launch.Launch(block, 2 * warps, 1))
    assert launch.valid("attend", launch.Launch(block, 2 * warps, 1))


def test_the_parts_of_the_reference_make_up_its_whole():
    batch = batch_on_device(rows=3, longest=120)
    _, expected = decode(reference.decode_attention, batch, 37)
    cache = with_gaps(batch.cache, 2)
    reference.append_tokens(cache, batch.key, batch.value, batch.table, batch.lengths,
                            batch.lengths, batch.top_r, batch.layout)  # fmt: skip
    options = {"layout": batch.layout, "top_k": 37}
    scores = ref_pages.score_pages(
        cache, batch.query, batch.table, batch.lengths, batch.top_r, **options
    )
    rows = batch.table, batch.lengths, batch.top_r
    slots = ref_pages.select_slots(scores, *rows, **options, kv_heads=2)
    output = torch.empty_like(batch.query)
    ref_attention.attend_slots(cache, batch.query, output, slots, *rows, **options, scale=0.11)
    close(output, expected, torch.float32)


@pytest.mark.usefixtures("_splitting")
def test_nan_queries_show():
    batch = batch_on_device(rows=2, longest=100)
    for sign in (1, -1):
        query = torch.full_like(batch.query, sign * torch.nan)
        _, output = decode(decode_kernel.decode_attention, batch._replace(query=query), 37)
        assert output.isnan().all()


SIZES = [
    (size, kind) for size in (1, 31, 2049) for kind in ("random", "plateaus", "zeros", "equal")
]


@pytest.mark.parametrize(("size", "kind"), [*SIZES, (131072, "plateaus")])
def test_top_indices_equal_reference(size, kind):
    generator = torch.Generator().manual_seed(size)
    score = torch.randn(3, 2, size, generator=generator)
    if kind == "plateaus":
        score = torch.nn.functional.max_pool1d(score.clamp(max=1.0), 63, stride=1, padding=31)
    elif kind == "zeros":
        score = torch.where(score > 0.5, 0.0, -0.0)
    elif kind == "equal":
        score = torch.full_like(score, 0.25)
    score[0, 0, size // 2] = torch.inf
    score[1, 1, size // 3] = -torch.inf
    score = with_gaps(score.to(DEVICE), 3)
    counts = torch.tensor([max(size // 3, 1), 0, size], dtype=torch.int32, device=DEVICE)
    sizes = torch.tensor([size, size, max(size - 1, 1)], dtype=torch.int32, device=DEVICE)
    counts = counts.minimum(sizes)
    expected = ref_topk.top_indices(score, sizes, counts, size)
    assert torch.equal(topk.top_indices(score, sizes, counts, size), expected)


def test_top_indices_of_padding_rows_are_empty():
    score = torch.full((2, 2, 40), torch.nan, device=DEVICE)
    nothing = torch.tensor([-8, 0], dtype=torch.int32, device=DEVICE)
    index = topk.top_indices(score, nothing, nothing - 64, 10)
    assert torch.equal(index, torch.full_like(index, -1))
    assert topk.top_indices(score, nothing, nothing, 0).shape == (2, 2, 0)


PROMPTS = [
    {"dim": 40, "group": 3, "dtype": torch.float32, "page_size": 4, "block_size": 16},
    {"dim": 80, "group": 1, "dtype": torch.float16, "page_size": 2, "block_size": 32},
    {"dim": 128, "group": 16, "dtype": torch.bfloat16, "page_size": 1, "block_size": 64},
    {"dim": 256, "group": 7, "dtype": torch.float32, "page_size": 4, "block_size": 128},
]


def make_prompts(lengths, *, dim, group, dtype, page_size, block_size, window=8, kv_heads=2):
    """Prompts in scattered blocks, packed as a GPU kernel would: keys, then values."""
    generator = torch.Generator().manual_seed(dim)
    width = max(-(-max(lengths) // block_size), 1) + 1
    table = torch.randperm(len(lengths) * width, generator=generator).view(-1, width).int()
    cache = torch.full(
        (len(lengths) * width, kv_heads, block_size, 2 * dim + 2 * dim // page_size), torch.nan
    )
    cache = with_gaps(cache.to(dtype), 2)
    halves = PageLayout(block_size, dim, page_size).tokens(cache).flatten(2)
    halves = halves.unflatten(2, (2, block_size, dim))
    for row, length in enumerate(lengths):
        slot = torch.arange(length)
        block = table[row].long()[slot // block_size]
        tokens = torch.randn(length, kv_heads, 2, dim, generator=generator)
        halves[block, :, :, slot % block_size] = tokens.to(dtype)
    query = torch.randn(len(lengths), window, kv_heads * group, dim, generator=generator)
    query = query.to(DEVICE, dtype).transpose(1, 2)
    lens = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    return cache.to(DEVICE), table.to(DEVICE), lens, query


def packed_views(cache, layout):
    """Keys and values of stock pages, ``[blocks, G, block_size, D]`` each, as views."""
    halves = layout.tokens(cache).flatten(2).unflatten(2, (2, layout.block_size, layout.head_dim))
    return halves[:, :, 0], halves[:, :, 1]


@pytest.mark.usefixtures("_splitting")
@pytest.mark.parametrize("shape", PROMPTS, ids=lambda s: f"{s['dim']}-{s['group']}-{s['dtype']}")
def test_prompt_scores_equal_reference(shape):
    cache, table, lens, query = make_prompts([351, 0, 130, 9], **shape)
    layout = PageLayout(shape["block_size"], shape["dim"], shape["page_size"])
    keys, _ = packed_views(cache, layout)
    expected, actual = (
        kernel.score_prompt(query, keys, table, lens, pool_kernel=63)
        for kernel in (ref_prompt, prompt)
    )
    for row in (0, 2, 3):
        torch.testing.assert_close(actual[row], expected[row], rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("_splitting")
@pytest.mark.parametrize("budget", [8, 9, 100, 300])
def test_gathered_keys_select_what_the_policy_selects(budget):
    """Keys that lie together are one block of as many tokens."""
    generator = torch.Generator().manual_seed(budget)
    keys = torch.randn(2, 301, 64, generator=generator).to(DEVICE)
    query = torch.randn(6, 8, 64, generator=generator).to(DEVICE)
    table = torch.zeros(1, 1, dtype=torch.int32, device=DEVICE)
    lens = torch.tensor([301], dtype=torch.int32, device=DEVICE)
    score = prompt.score_prompt(query[None], keys[None], table, lens, pool_kernel=7)
    index = topk.top_indices(score, lens - 8, lens - 301 + budget - 8, max(budget - 8, 1))
    expected = policy.select_prompt_tokens(query, keys, budget, 7)
    assert torch.equal(index[0, :, : budget - 8].long(), expected[:, : budget - 8])


@pytest.mark.parametrize("shape", PROMPTS, ids=lambda s: f"{s['dim']}-{s['group']}-{s['dtype']}")
def test_compaction_equals_reference_and_the_cpu_path(shape):
    block_size, dim = shape["block_size"], shape["dim"]
    lengths = [4 * block_size + 3, 0, 3 * block_size, 2 * block_size - 1]
    gone = [2, 0, 1, 0]
    cache, table, lens, query = make_prompts(lengths, **shape)
    layout = PageLayout(block_size, dim, shape["page_size"])
    dropped = torch.tensor(gone, dtype=torch.int32, device=DEVICE)
    max_kept = max(n - d * block_size for n, d in zip(lengths, gone, strict=True)) + 5
    caches = [with_gaps(cache, 2) for _ in range(2)]
    for kernel, result in zip((ref_compaction, compaction), caches, strict=True):
        kernel.compact_prompts(result, *packed_views(result, layout), query, table, lens, dropped,
                               layout=layout, pool_kernel=5, max_kept=max_kept)  # fmt: skip
    assert same(*caches)

    def pack(key, value, pages):
        key_pages, value_pages = pages.chunk(2, 2)
        key_pages[0], value_pages[0] = key.transpose(0, 1), value.transpose(0, 1)

    codec = PageCodec(pack, block_size, dim, shape["dtype"], DEVICE)
    for row in (0, 2, 3):
        blocks = table[row, : -(-lengths[row] // block_size)]
        compact_prompt(cache, blocks, lengths[row], gone[row], query[row], reader=codec,
                       layout=layout, policy=make_policy(pool_kernel=5, head_dim=dim))  # fmt: skip
    assert same(caches[1], cache)


def test_dispatch_returns_triton_where_it_runs(monkeypatch):
    import triton

    monkeypatch.setattr(launch, "launches", lambda device: launch.Table({}, "of any GPU"))
    for device in (torch.device("cuda"), DEVICE):
        assert dispatch.policy_triton(device).decode is decode_kernel.decode_attention
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = False
        with pytest.raises(ValueError, match="CUDA"):
            dispatch.policy_triton(torch.device("cpu", 0))


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_without_a_gpu(capability, tmp_path):
    lines = compiled(__file__, capability, tmp_path)
    names = {line.split()[0] for line in lines}
    assert len(names) == 12, names
    most = 166912 if capability == 80 else 232448  # shared memory that one program may have
    assert all(int(line.split()[1]) <= most for line in lines), lines
    # What gathers rows or channels overlaps that with math, and fits into sm_86 and sm_89 as well.
    gathering = [line.split() for line in lines if re.match("_score_pages|_attend", line)]
    assert len(gathering) >= 7, lines
    assert all(int(shared) <= 101376 and int(copies) > 0 for _, shared, copies in gathering), lines


def compile_everything(capability: int) -> None:
    """Launch every kernel, and those of decode with large heads too."""
    compile_only(capability)
    for dtype in (torch.bfloat16, torch.float32):
        layout = PageLayout(64, 256, 4)
        cache = torch.zeros(9, 2, 64, 2 * 256 + 2 * 64, dtype=dtype)
        query, key = torch.zeros(3, 8, 256, dtype=dtype), torch.zeros(3, 2, 256, dtype=dtype)
        table, lengths = torch.zeros(3, 8, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
        decode_kernel.decode_attention(cache, query, key, key, query, table, lengths, lengths,
                                       lengths, layout=layout, top_k=128, scale=0.1)  # fmt: skip
    layout = PageLayout(64, 128, 4)
    cache = torch.zeros(9, 2, 64, 2 * 128 + 2 * 32, dtype=torch.bfloat16)
    query, key = torch.zeros(3, 8, 128).bfloat16(), torch.zeros(3, 2, 128).bfloat16()
    table, lengths = torch.zeros(3, 8, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
    rows = Rows(table, lengths, lengths, lengths)
    rules, counted = torch.zeros(9, 3, dtype=torch.int32), torch.zeros(3, dtype=torch.int64)
    rows_kernel.plan_rows(rows, lengths, lengths, table, rules, counted, block_size=64, window=32,
                          per_block=8, top_k=128)  # fmt: skip
    alone = {"replays": False, "parked": lengths, "per_block": 8}
    for options in ({}, {"replays": False, "read_all": True}, alone):
        decode_kernel.decode_attention(
            cache, query, key, key, query, table, lengths, lengths, lengths, layout=layout,
            top_k=128, scale=0.1, **options,
        )  # fmt: skip
    window = torch.zeros(3, 8, 32, 128).bfloat16()
    compaction.compact_prompts(cache, *packed_views(cache, layout), window, table, lengths, lengths,
                             layout=layout, pool_kernel=63, max_kept=300)  # fmt: skip


def test_no_shape_of_a_batch_compiles_another_kernel(tmp_path):
    """Batches and prompts of any size run what the first one compiled."""
    lines = compiled(__file__, "variants", tmp_path)
    counts = collections.Counter(line.split()[0] for line in lines)
    assert len(counts) == 12, counts
    # Tokens and extrema are written by two launches or by one.
    expected = {name: 3 if name == "_append_kernel" else 1 for name in counts}
    assert counts == expected, lines


def launch_many_shapes() -> None:
    """What changes from step to step: rows and the width of their table; and prompt by prompt."""
    name_only()
    layout = PageLayout(64, 128, 4)
    cache = torch.zeros(9, 2, 64, 2 * 128 + 2 * 32, dtype=torch.bfloat16)
    rules, counted = torch.zeros(9, 3, dtype=torch.int32), torch.zeros(3, dtype=torch.int64)
    for count in (1, 2, 3, 16, 17, 160, 600):
        fused = torch.zeros(count, 12 * 128).bfloat16()
        query, key, value = (
            part.unflatten(1, (-1, 128)) for part in fused.split([8 * 128, 256, 256], 1)
        )
        lengths = torch.zeros(count, dtype=torch.int32)
        for width in (1, 2, 15, 16, 17, 160, 2048):
            table = torch.zeros(count, width, dtype=torch.int32)
            rows = Rows(table, lengths, lengths, lengths)
            rows_kernel.plan_rows(rows, lengths, lengths, table, rules, counted, block_size=64,
                                  window=32, per_block=8, top_k=128)  # fmt: skip
            for options in ({}, {"replays": False}):
                decode_kernel.decode_attention(
                    cache, query, key, value, torch.zeros_like(query), table, lengths, lengths,
                    lengths, layout=layout, top_k=512, scale=0.1, **options,
                )  # fmt: skip
    for count, length in ((1, 100), (1, 6544), (2, 4096), (3, 12345), (1, 131072)):
        window = torch.zeros(count, 8, 32, 128).bfloat16()
        table = torch.zeros(count, -(-length // 64), dtype=torch.int32)
        lengths = torch.zeros(count, dtype=torch.int32)
        compaction.compact_prompts(cache, *packed_views(cache, layout), window, table, lengths,
                                 lengths, layout=layout, pool_kernel=63,
                                 max_kept=length // 2 + 3)  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1] == "variants":
        launch_many_shapes()
    else:
        compile_everything(int(sys.argv[1]))
