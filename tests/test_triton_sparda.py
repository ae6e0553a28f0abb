# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""SparDA's Triton kernels against their references, as in ``test_triton_rocketkv.py``."""

from __future__ import annotations

import sys

import pytest
import torch

pytest.importorskip("triton")

from support.ahead_of_time import compile_only, compiled
from test_triton_rocketkv import DEVICE, close, same, use_tile, with_gaps
from vllm_sparse.kernels.reference import paging, prefill, sparda_steps
from vllm_sparse.kernels.reference.paging import PageTable
from vllm_sparse.kernels.reference.selection import Blocks, Ranking
from vllm_sparse.kernels.triton import (
    launch,
    sparda_attention,
    sparda_paging,
    sparda_prefill,
    sparda_select,
    sparda_tokens,
)

FAR = 1 << 30  # outside anything
FLOATS = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch):
    """Parts of the interpreter are imported by the first launch."""
    if DEVICE.type == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _poisoned_integers(monkeypatch):
    """Uninitialised lists point far outside any memory; floats are NaN already."""
    for name in ("empty", "empty_like"):
        original = getattr(torch, name)

        def poisoned(*args, _original=original, **kwargs):
            tensor = _original(*args, **kwargs)
            return tensor.fill_(FAR) if tensor.dtype == torch.int32 else tensor

        monkeypatch.setattr(torch, name, poisoned)


@pytest.fixture(params=[1, 24], ids=["whole", "split"])
def _splitting(request, monkeypatch):
    """One program per row and KV head, or as many as there are tiles."""
    monkeypatch.setattr(launch, "multiprocessors", lambda device: request.param)


@pytest.fixture
def small_tiles(monkeypatch):
    """Many tiles without large inputs."""
    small = launch.Launch(16, 1, 1)
    for module in (sparda_paging, sparda_prefill):
        monkeypatch.setattr(module, "launch", lambda *args: small)


def scattered_table(rows: int, width: int, generator: torch.Generator) -> torch.Tensor:
    """Blocks of each row, in rows that are further apart than they are wide."""
    wide = torch.full((rows, width + 3), FAR, dtype=torch.int32)
    wide[:, :width] = torch.randperm(rows * width, generator=generator).view(rows, width)
    return wide.to(DEVICE)[:, :width]


def noise(*shape, generator, dtype=torch.float32, whole=False):
    """Random values; whole numbers add up to the same in any order."""
    if whole:
        return torch.randint(-2, 3, shape, generator=generator).to(DEVICE, dtype)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


RANKINGS = {
    "forecast": Ranking(False),
    "query": Ranking(True, 0.2),
    "previous": Ranking(True, 0.2, lag=1),
}
SELECTIONS = [
    # dtype, D, heads per KV head, block size
    (torch.float32, 64, 1, 64),
    (torch.bfloat16, 128, 16, 64),
    (torch.float16, 80, 7, 32),
    (torch.bfloat16, 96, 3, 128),
    (torch.float32, 256, 2, 16),
]


def make_selection(dtype, dim, group, size, ranking, whole, width=40, local=2):
    """Rows at every border; all memory that none of them may read is NaN."""
    generator = torch.Generator().manual_seed(dim)
    blocks = Blocks(size, 16, init_blocks=1, local_blocks=local, top_k=local + 7)
    dense = (blocks.top_k + 3) * size - 5
    positions = torch.tensor([
        -1, 0, size - 1, blocks.top_k * size - 1, blocks.top_k * size,
        dense - 1, dense, 20 * size, 21 * size - 1, 30 * size + 15, width * size - 1,
    ])  # fmt: skip
    rows, kv_heads, windows = len(positions), 2, size // 16
    table = scattered_table(rows, width, generator)
    shape = (rows * width, kv_heads, windows, dim)
    compressed = with_gaps(noise(*shape, generator=generator, dtype=dtype, whole=whole), 3)
    for row, position in enumerate(positions.tolist()):
        # Windows that are not complete: they end in (n + 1) * 16 - 1. The first is none at all.
        complete = max((position - ranking.lag + 1) // 16, 0)
        slots = compressed[table[row].long()].transpose(1, 2).flatten(0, 1)  # a copy
        slots[0] = slots[complete:] = torch.nan
        slots = slots.unflatten(0, (width, windows)).transpose(1, 2)
        compressed[table[row].long()] = slots
        table[row, max(position // size + 1, 0) :] = FAR
    heads = kv_heads * group if ranking.softmax else kv_heads
    vectors = noise(rows, heads + 1, dim, generator=generator, dtype=dtype, whole=whole)
    return compressed, vectors[:, :heads], table, positions.to(DEVICE), blocks, dense


@pytest.mark.usefixtures("_splitting")
@pytest.mark.parametrize("kind", RANKINGS)
@pytest.mark.parametrize("shape", SELECTIONS, ids=lambda s: "-".join(str(v) for v in s))
@pytest.mark.parametrize("tile", [32, 64])
def test_selection_equals_reference(shape, kind, tile, monkeypatch):
    """Rows have 11 to 40 blocks: up to a quarter of a tile, up to a tile, and several."""
    use_tile(monkeypatch, "choose_blocks", tile)
    ranking = RANKINGS[kind]
    # Whole numbers tie often. Probabilities are sums that depend on their order.
    *inputs, blocks, dense = make_selection(*shape, ranking, whole=not ranking.softmax)
    options = {} if kind == "previous" else {"dense_len": dense, "capacity": blocks.top_k + 5}
    arguments = (*inputs, ranking, blocks)
    expected = sparda_steps.select_blocks(*arguments, **options)
    actual = sparda_select.select_blocks(*arguments, **options)
    for name, a, b in zip(actual._fields, actual, expected, strict=True):
        assert a.equal(b), name
        assert a.dtype == torch.int32
    assert (actual.blocks[0] == -1).all()
    assert actual.lengths[0] == 0


def test_rows_whose_logits_would_be_too_many_take_turns(monkeypatch):
    *inputs, blocks, dense = make_selection(*SELECTIONS[1], RANKINGS["query"], whole=False)
    arguments = (*inputs, RANKINGS["query"], blocks)
    expected = sparda_select.select_blocks(*arguments, dense_len=dense)
    monkeypatch.setattr(sparda_select, "_MOST_LOGITS", 1)
    sizes = []

    def split_rows(programs, *args):
        sizes.append(programs)
        return launch.Split(1, 1)

    monkeypatch.setattr(sparda_select, "split_rows", split_rows)
    actual = sparda_select.select_blocks(*arguments, dense_len=dense)
    assert sizes == [4 * 2]  # rows at once, KV heads
    assert all(a.equal(b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("kind", ["forecast", "query"])
def test_equal_scores_favour_the_earlier_block(kind):
    compressed = torch.ones(30, 1, 4, 64, device=DEVICE)
    table = torch.arange(30, dtype=torch.int32, device=DEVICE)[None]
    chosen = sparda_select.select_blocks(
        compressed, torch.ones(1, 1, 64, device=DEVICE), table,
        torch.tensor([29 * 64], device=DEVICE), RANKINGS[kind], Blocks(64, 16, 1, 1, 6),
    )  # fmt: skip
    assert chosen.blocks.tolist() == [[[0, 1, 2, 3, 28, 29]]]


def test_a_window_scores_both_blocks_that_it_overlaps():
    """Window 4m - 1 is stored with block m but begins in the one before."""
    compressed = torch.zeros(30, 1, 4, 64, device=DEVICE)
    compressed[12, 0, 0] = 1.0  # overlaps blocks 11 and 12
    compressed[20, 0, 3] = 2.0  # lies in block 20
    table = torch.arange(30, dtype=torch.int32, device=DEVICE)[None]
    chosen = sparda_select.select_blocks(
        compressed, torch.ones(1, 1, 64, device=DEVICE), table,
        torch.tensor([29 * 64], device=DEVICE), Ranking(False), Blocks(64, 16, 1, 1, 6),
    )  # fmt: skip
    assert chosen.blocks.tolist() == [[[0, 11, 12, 20, 28, 29]]]


def test_selection_without_rows_or_without_a_choice():
    *inputs, blocks, _ = make_selection(*SELECTIONS[0], RANKINGS["query"], whole=False)
    compressed, vectors, table, positions = inputs
    none = sparda_select.select_blocks(
        compressed, vectors[:0], table[:0], positions[:0], RANKINGS["query"], blocks
    )
    assert none.blocks.shape == (0, 2, blocks.top_k)
    few = slice(1, 4)
    arguments = compressed, vectors[few], table[few, :9], positions[few].int(), RANKINGS["query"]
    for module in (sparda_select, sparda_steps):
        chosen = module.select_blocks(*arguments, blocks)
        assert chosen.blocks[:, 0].tolist() == [
            [0] + 8 * [-1], [0] + 8 * [-1], list(range(9)),
        ]  # fmt: skip
        assert chosen.lengths.tolist() == [1, 64, 9 * 64]


def empty_table(pieces: int, frames: int) -> PageTable:
    return PageTable(
        torch.full((pieces,), -1, dtype=torch.int32, device=DEVICE),
        torch.full((frames,), -1, device=DEVICE),
        torch.zeros(frames, dtype=torch.int64, device=DEVICE),
        torch.zeros(frames, dtype=torch.bool, device=DEVICE),
        torch.zeros(1, dtype=torch.int64, device=DEVICE),
    )


def drop(table: PageTable, piece: int) -> None:
    frame = int(table.frame_of[piece])
    if frame >= 0:
        table.frame_of[piece] = table.piece_of[frame] = -1


@pytest.mark.parametrize("tiles", ["small", "large"])
@pytest.mark.parametrize(
    ("frames", "pieces", "shape"),
    [(12, 60, (3, 2, 2)), (13, 20, (3, 2, 2)), (81, 200, (4, 2, 10))],
)
def test_resolve_equals_reference_after_every_step(frames, pieces, shape, tiles, request):
    """Also where every frame is needed, so that the clock goes round twice."""
    if tiles == "small":
        request.getfixturevalue("small_tiles")
    generator = torch.Generator().manual_seed(frames)
    ours, theirs = empty_table(pieces, frames), empty_table(pieces, frames)
    step = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    ours_counted, theirs_counted = torch.zeros(2, 3, dtype=torch.int64, device=DEVICE)
    most_missed = 0
    for number in range(1, 41):
        step += 1
        wanted = torch.randint(-1, pieces, shape, generator=generator)
        if number % 3 == 0:  # mostly what is there, in another order
            there = torch.arange(pieces)[theirs.frame_of.cpu() >= 0]
            kept = there[torch.randint(len(there), shape, generator=generator)]
            wanted = torch.where(torch.rand(shape, generator=generator) < 0.8, kept, wanted)
        if number % 7 == 0:
            wanted = wanted[:1].expand(shape).contiguous()
        if number % 10 == 0:
            for table in (ours, theirs):
                drop(table, number % pieces)
                drop(table, number % 19)
        wanted = wanted.int().to(DEVICE)
        a = sparda_paging.resolve(ours, wanted, step, ours_counted)
        b = sparda_steps.resolve(theirs, wanted, step, theirs_counted)
        misses = int(b.misses)
        most_missed = max(most_missed, misses)
        assert int(a.misses) == misses
        assert ours_counted.equal(theirs_counted)
        assert a.frames.equal(b.frames)
        assert a.missing[:misses].equal(b.missing[:misses])
        assert a.targets[:misses].equal(b.targets[:misses])
        for name, x, y in zip(ours._fields, ours, theirs, strict=True):
            assert x.equal(y), (name, number)
    assert ours_counted[0] > 40
    assert not ours_counted[2]
    assert most_missed > 4


def test_the_clock_takes_what_the_first_round_only_unmarked():
    table = empty_table(10, 4)
    step = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    counters = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    for wanted, targets in (
        ([0, 1, 2, 3], [0, 1, 2, 3]),
        ([4], [0]),  # clears all marks and is back at frame 0
        ([1], []),
        ([5, 6], [2, 3]),  # frame 1 is marked again
        ([4, 1, 7, 8], [2, 3]),
    ):
        step += 1
        wanted = torch.tensor(wanted).int().to(DEVICE)
        result = sparda_paging.resolve(table, wanted, step, counters)
        assert result.targets[: int(result.misses)].tolist() == targets
    assert counters.tolist() == [3, 9, 0]


def test_more_pieces_than_frames_set_a_flag():
    for module in (sparda_paging, sparda_steps):
        table = empty_table(10, 3)
        step = torch.ones(1, dtype=torch.int64, device=DEVICE)
        counters = torch.zeros(3, dtype=torch.int64, device=DEVICE)
        wanted = torch.tensor([5, 4, 5, 1, 0, 8], dtype=torch.int32, device=DEVICE)
        result = module.resolve(table, wanted, step, counters)
        assert counters[2] == 1
        assert result.frames.tolist() == [0, 1, 0, 2, -1, -1]
        assert int(table.frame_of.min()) == -1
        step += 1
        module.resolve(table, wanted[:2], step, counters)
        assert counters[2] == 1  # set only, never reset


def test_nothing_wanted_changes_nothing():
    table = empty_table(10, 3)
    step = torch.ones(1, dtype=torch.int64, device=DEVICE)
    counters = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    first = torch.tensor([7, 2], dtype=torch.int32, device=DEVICE)
    sparda_paging.resolve(table, first, step, counters)
    before = [part.clone() for part in table]
    step += 1
    for shape in ((2, 1, 3), (0, 1, 3)):
        nothing = torch.full(shape, -1, dtype=torch.int32, device=DEVICE)
        result = sparda_paging.resolve(table, nothing, step, counters)
        assert result.frames.equal(nothing)
        assert result.misses.tolist() == [0]
        assert counters.tolist() == [0, 2, 0]
        for x, y in zip(table, before, strict=True):
            assert x.equal(y)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("block_size", "dim"), [(16, 64), (32, 80), (64, 96), (16, 256)])
@pytest.mark.parametrize("programs", [1, 5])
def test_copies_equal_reference(dtype, block_size, dim, programs):
    generator = torch.Generator().manual_seed(dim)
    source = noise(9, block_size, 2 * dim, generator=generator, dtype=dtype)
    index = torch.full((2, 12), FAR, dtype=torch.int32)
    index[0, :7] = torch.randperm(11, generator=generator)[:7]
    index[1, :7] = torch.tensor([8, 0, 3, 3, 1, 2, 5])
    index = index.to(DEVICE)
    for amount in (0, 1, 7):
        count = torch.tensor([amount], dtype=torch.int32, device=DEVICE)
        targets = []
        for module in (sparda_paging, sparda_steps):
            target = torch.full((11, block_size, 2 * dim), torch.nan, dtype=dtype, device=DEVICE)
            module.copy_pieces(target, index[0], source, index[1], count, programs=programs)
            targets.append(target)
        assert same(*targets)
        assert (~targets[0].isnan()).any((1, 2)).sum() == amount


ATTENTIONS = [
    # dtype, D, heads per KV head, block size
    (torch.float32, 64, 1, 32),
    (torch.bfloat16, 128, 16, 64),
    (torch.float16, 80, 5, 16),
    (torch.bfloat16, 96, 7, 128),
    (torch.float32, 256, 12, 32),
]


@pytest.mark.usefixtures("_splitting")
@pytest.mark.parametrize("shape", ATTENTIONS, ids=lambda s: "-".join(str(v) for v in s))
def test_attention_over_frames_equals_reference(shape):
    dtype, dim, group, block_size = shape
    generator = torch.Generator().manual_seed(dim + group)
    tokens, kv_heads, count, num_frames = 4, 2, 5, 50
    slab = noise(num_frames, block_size, 2 * dim, generator=generator, dtype=dtype)
    frames = torch.randperm(num_frames - 10, generator=generator)[: tokens * kv_heads * count]
    frames = frames.view(tokens, kv_heads, count).int()
    lengths = [count * block_size, 0, 2 * block_size + 3, 1]
    for t, n in enumerate(lengths):  # nothing beyond a row's length may be read
        used = -(-n // block_size)
        if n % block_size:
            slab[frames[t, :, used - 1].long(), n % block_size :] = torch.nan
        slab[frames[t, :, used:].flatten().long()] = torch.nan
        frames[t, :, used:] = -1
    query = with_gaps(noise(tokens, kv_heads * group, dim, generator=generator, dtype=dtype), 2)
    lengths = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    outputs = [with_gaps(torch.full_like(query, torch.nan), 2) for _ in range(2)]
    for module, output in zip((paging, sparda_attention), outputs, strict=True):
        module.attend_frames(slab, query, output, frames.to(DEVICE), lengths, 0.125)
    close(outputs[1], outputs[0], dtype)
    assert not outputs[1][1].any()


@pytest.mark.usefixtures("_splitting")
@pytest.mark.parametrize("shape", ATTENTIONS[:3], ids=lambda s: "-".join(str(v) for v in s))
def test_rows_without_frames_read_the_host_pool(shape):
    dtype, dim, group, block_size = shape
    generator = torch.Generator().manual_seed(dim)
    rows, kv_heads, count = 4, 2, 3
    slab = noise(30, block_size, 2 * dim, generator=generator, dtype=dtype)
    host = noise(40, kv_heads, block_size, 2 * dim, generator=generator, dtype=dtype)
    table = scattered_table(rows, 9, generator)
    query = noise(rows, kv_heads * group, dim, generator=generator, dtype=dtype)
    framed, whole = [2 * block_size + 5, 0, 0, 0], [0, 9 * block_size - 3, 1, 0]
    frames = torch.full((rows, kv_heads, count), -1, dtype=torch.int32)
    frames[0] = torch.randperm(30, generator=generator)[: kv_heads * count].view(kv_heads, count)
    # What nobody may read: the null block, frames and blocks of no row, and beyond a row's length.
    unread = torch.ones(30, dtype=torch.bool)
    unread[frames[0].flatten().long()] = False
    slab[unread] = torch.nan
    host[table[0].long()] = host[table[3].long()] = host[table[2, 1:].long()] = torch.nan
    host[table[1, 8].long(), :, -3:] = host[table[2, 0].long(), :, 1:] = torch.nan
    framed, whole = (
        torch.tensor(part, dtype=torch.int32, device=DEVICE) for part in (framed, whole)
    )
    outputs = [torch.full_like(query, torch.nan) for _ in range(2)]
    for module, output in zip((sparda_steps, sparda_attention), outputs, strict=True):
        module.attend_frames(
            slab, query, output, frames.to(DEVICE), framed, 0.125,
            sparda_steps.Unframed(host, table, whole),
        )  # fmt: skip
    close(outputs[1], outputs[0], dtype)
    assert not outputs[1][3].any()
    assert outputs[1][:3].any((1, 2)).all()


@pytest.mark.usefixtures("_splitting")
def test_attention_may_have_no_rows_or_only_padding():
    slab = torch.full((3, 32, 128), torch.nan, device=DEVICE)
    for rows in (0, 2):
        query = torch.full((rows, 4, 64), torch.nan, device=DEVICE)
        output = torch.full_like(query, torch.nan)
        frames = torch.full((rows, 2, 6), -1, dtype=torch.int32, device=DEVICE)
        lengths = torch.zeros(rows, dtype=torch.int32, device=DEVICE)
        sparda_attention.attend_frames(slab, query, output, frames, lengths, 0.125)
        assert output.equal(torch.zeros_like(output))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("block_size", "dim"), [(16, 64), (64, 80), (128, 128), (32, 256)])
def test_written_tokens_equal_reference(dtype, block_size, dim):
    generator = torch.Generator().manual_seed(dim)
    kv_heads, blocks, frames = 3, 5, 6
    rows = noise(6, kv_heads, 2 * dim, generator=generator, dtype=dtype)
    fused = torch.cat((rows, rows), 1)  # vLLM hands over slices of one fused row
    key, value = fused[:, :kv_heads, :dim], fused[:, kv_heads:, dim:]
    slots = torch.tensor([0, 5 * block_size - 1, -1, 2 * block_size + 7, -1, 3 * block_size])
    frame_of = torch.full((blocks * kv_heads,), -1, dtype=torch.int32)
    frame_of[[0, 2, 7, 13]] = torch.tensor([3, 0, 5, 1], dtype=torch.int32)
    frame_of[9] = -(2**31) + 3  # a claim that the page table holds while it looks up
    results = []
    for module in (sparda_tokens, sparda_steps):
        host, slab = (
            torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)
            for shape in (
                (blocks, kv_heads, block_size, 2 * dim), (frames, block_size, 2 * dim)
            )
        )  # fmt: skip
        module.write_tokens(
            host, slab, frame_of.to(DEVICE), slots.to(DEVICE), key.to(dtype), value.to(dtype)
        )
        results.append((host, slab))
    for ours, theirs in zip(*results, strict=True):
        assert same(ours, theirs)
    assert (~results[0][0].isnan()).sum() == 4 * kv_heads * 2 * dim
    assert (~results[0][1].isnan()).sum() == 4 * 2 * dim
    sparda_tokens.write_tokens(host, slab, frame_of.to(DEVICE), slots[:0], key[:0], value[:0])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("block_size", "dim", "stride"), [(16, 64, 8), (64, 80, 16), (128, 128, 16), (32, 256, 16)]
)
@pytest.mark.parametrize("frames", [False, True])
def test_windows_equal_reference(dtype, block_size, dim, stride, frames):
    """With frames, half of the pieces have one, and may not be read from the host."""
    generator = torch.Generator().manual_seed(dim)
    kv_heads, width = 2, 4
    positions = torch.tensor([
        -1, stride - 1, 2 * stride - 1, 2 * stride, block_size - 1,
        block_size + stride - 1, 2 * block_size + 2 * stride - 1, 4 * block_size - 1, 31, 32,
    ])  # fmt: skip
    rows = len(positions)
    table = scattered_table(rows, width, generator)
    source = noise(rows * width, kv_heads, block_size, 2 * dim, generator=generator, dtype=dtype)
    for row, position in enumerate(positions.tolist()):
        table[row, max(position // block_size + 1, 0) :] = FAR
        if position >= 0:
            newest = int(table[row, position // block_size])
            source[newest, :, position % block_size + 1 :] = torch.nan
    options = {}
    if frames:
        pieces = source.flatten(0, 1)
        held = torch.randperm(len(pieces), generator=generator)[: len(pieces) // 2]
        frame_of = torch.randint(-(2**31), 0, (len(pieces),), generator=generator).int()
        frame_of[held] = torch.arange(len(held)).int()
        options = {"slab": pieces[held.to(DEVICE)], "frame_of": frame_of.to(DEVICE)}
        pieces[held.to(DEVICE)] = torch.nan
    results = []
    for module in (sparda_tokens, sparda_steps):
        compressed = torch.full(
            (rows * width, kv_heads, block_size // stride, dim), torch.nan, dtype=dtype,
            device=DEVICE,
        )  # fmt: skip
        compressed = with_gaps(compressed, 3)
        module.update_windows(compressed, source, positions.to(DEVICE), table, stride, **options)
        results.append(compressed)
    ours, theirs = results
    assert ours.isnan().equal(theirs.isnan())
    complete = (positions + 1 >= 2 * stride) & ((positions + 1) % stride == 0)
    assert (~ours.isnan()).sum() == int(complete.sum()) * kv_heads * dim
    close(ours.nan_to_num(7), theirs.nan_to_num(7), dtype)
    sparda_tokens.update_windows(compressed, source, positions[:0].to(DEVICE), table[:0], stride)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("heads", "dim"), [(3, 64), (12, 80), (8, 256)])
def test_recorded_queries_equal_reference(dtype, heads, dim):
    generator = torch.Generator().manual_seed(dim)
    fused = noise(7, 2 * heads, dim, generator=generator, dtype=dtype)
    query = fused[:, heads - 1 : -1]  # vLLM hands over slices of one fused row
    slots = torch.tensor([5 * 32 + 31, 2 * 32, -1, 3 * 32 + 8, 3 * 32 + 9, -1, 0], device=DEVICE)
    last = torch.tensor([4, 6, 2, 0, 5], device=DEVICE)  # neither 3 nor 1
    results = []
    for module in (sparda_tokens, sparda_steps):
        kept = torch.full((6, heads, dim), torch.nan, dtype=dtype, device=DEVICE)
        module.record_queries(kept, query, slots, last, 32)
        module.record_queries(kept, query, slots, last[:0], 32)
        results.append(kept)
    assert same(*results)
    assert (~results[0].isnan()).any((1, 2)).tolist() == [True, False, False, True, False, True]


PARTS = [
    # dtype, D, heads per KV head, block size, tokens, first position, keys
    (torch.float32, 64, 1, 16, 50, 32, 75),
    (torch.bfloat16, 128, 16, 64, 19, 128, 200),
    (torch.float16, 80, 7, 32, 23, 37, 90),
    (torch.bfloat16, 96, 3, 128, 65, 256, 128),
    (torch.float32, 256, 2, 64, 9, 70, 1),
]


@pytest.mark.parametrize("mode", ["all", "causal", "past", "chosen", "chosen-past"])
@pytest.mark.parametrize("shape", PARTS, ids=lambda s: "-".join(str(v) for v in s))
def test_parts_of_prompts_equal_reference(shape, mode):
    dtype, dim, group, block_size, tokens, first, num_keys = shape
    generator = torch.Generator().manual_seed(dim)
    kv_heads = 2
    if mode == "causal":
        num_keys = tokens
    query = noise(tokens, kv_heads * group + 1, dim, generator=generator, dtype=dtype)[:, 1:]
    query = query.view(tokens, kv_heads, group, dim).permute(1, 2, 0, 3)
    rows = with_gaps(noise(kv_heads, num_keys, 2 * dim, generator=generator, dtype=dtype), 2)
    keys, values = rows.split(dim, -1)
    options = {"first_position": first, "block_size": block_size}
    chosen = None
    if "chosen" in mode:
        blocks = -(-(first + num_keys) // block_size)
        chosen = torch.rand(kv_heads, tokens, blocks + 2, generator=generator) < 0.4
        chosen[0, 3] = chosen[1, : tokens // 2] = False  # see nothing
        wide = torch.ones(kv_heads, tokens + 1, blocks + 3, dtype=torch.bool)
        wide[:, :tokens, : blocks + 2] = chosen
        chosen = wide.to(DEVICE)[:, :tokens, : blocks + 2]
    if "past" in mode:
        options["past_from"] = first + num_keys // 2 - tokens // 2
    arguments = query, keys, values, chosen, mode == "causal", 0.11
    expected, expected_lse = sparda_steps.attend_part(*arguments, **options)
    output, lse = sparda_prefill.attend_part(*arguments, **options)
    assert output.dtype == lse.dtype == torch.float32
    assert output.shape == expected.shape
    close(output, expected, dtype)
    close(lse, expected_lse, dtype)
    hidden = expected_lse == -torch.inf
    assert hidden.any() or "chosen" not in mode
    assert not output[hidden].any()


def test_blocks_that_no_query_of_a_tile_chose_are_not_read():
    generator = torch.Generator().manual_seed(0)
    query = noise(1, 2, 40, 64, generator=generator)
    rows = torch.full((1, 7 * 32, 128), torch.nan, device=DEVICE)
    chosen = torch.zeros(1, 40, 9, dtype=torch.uint8, device=DEVICE)
    for block in (3, 6):  # the keys begin with block 1
        rows[:, (block - 1) * 32 : block * 32] = noise(1, 32, 128, generator=generator)
        chosen[:, block::2, block] = 1
    keys, values = rows.split(64, -1)
    arguments = query, keys, values, chosen, False, 0.1
    options = {"first_position": 32, "block_size": 32}
    output, lse = sparda_prefill.attend_part(*arguments, **options)
    arguments = query, keys.nan_to_num(), values.nan_to_num(), chosen, False, 0.1
    expected, expected_lse = sparda_steps.attend_part(*arguments, **options)
    close(output, expected, torch.float32)
    close(lse, expected_lse, torch.float32)


def test_parts_refuse_blocks_that_tiles_of_keys_do_not_divide():
    """They would leave out the rest of each block."""
    query, keys = torch.ones(1, 1, 4, 16, device=DEVICE), torch.ones(1, 192, 16, device=DEVICE)
    chosen = torch.ones(1, 4, 2, dtype=torch.bool, device=DEVICE)
    with pytest.raises(AssertionError, match="straddle"):
        sparda_prefill.attend_part(query, keys, keys, chosen, False, 0.1, block_size=96)


@pytest.mark.usefixtures("small_tiles")
def test_long_lists_of_blocks():
    """More blocks than one tile of the list holds, many per query."""
    generator = torch.Generator().manual_seed(0)
    query = noise(2, 3, 40, 64, generator=generator)
    keys, values = noise(2, 2, 16 * 40, 64, generator=generator)
    chosen = (torch.rand(2, 40, 50, generator=generator) < 0.1).to(DEVICE)
    arguments = query, keys, values, chosen, False, 0.1
    options = {"first_position": 16 * 10, "block_size": 16, "past_from": 16 * 45}
    for ours, theirs in zip(
        sparda_prefill.attend_part(*arguments, **options),
        sparda_steps.attend_part(*arguments, **options),
        strict=True,
    ):
        close(ours, theirs, torch.float32)


def test_a_part_may_be_empty():
    query = torch.full((2, 3, 4, 64), torch.nan, device=DEVICE)
    keys = torch.empty(2, 0, 64, device=DEVICE)
    output, lse = sparda_prefill.attend_part(query, keys, keys, None, False, 0.1)
    assert not output.any()
    assert (lse == -torch.inf).all()
    none = query[:, :, :0]
    output, lse = sparda_prefill.attend_part(none, query[:, 0], query[:, 0], None, False, 0.1)
    assert output.shape == (2, 3, 0, 64)
    assert lse.shape == (2, 3, 0)


@pytest.mark.parametrize("causal", [True, False])
def test_the_reference_part_is_the_one_with_a_mask(causal):
    generator = torch.Generator().manual_seed(1)
    query, keys, values = (
        noise(*s, generator=generator) for s in ((2, 3, 9, 16), *2 * [(2, 9, 16)])
    )
    chosen = None if causal else torch.rand(2, 9, 3, generator=generator) < 0.7
    mask = None if causal else chosen[..., torch.arange(20, 29) // 16]
    expected = prefill.attend_part(query, keys, values, mask, causal, 0.3)
    actual = sparda_steps.attend_part(
        query, keys, values, chosen, causal, 0.3, first_position=20, block_size=16
    )
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


class Layer:
    """One layer with a small slab, decoding by one set of kernels."""

    size, kv_heads, dim, group = 32, 2, 64, 3
    blocks = Blocks(32, 16, init_blocks=1, local_blocks=1, top_k=5)

    def __init__(self, ours: bool, table: torch.Tensor, frames: int) -> None:
        count = table.numel()
        self.select = (sparda_select if ours else sparda_steps).select_blocks
        self.paging = sparda_paging if ours else sparda_steps
        self.tokens = sparda_tokens if ours else sparda_steps
        self.attend = (sparda_attention if ours else paging).attend_frames
        self.block_table = table
        self.host = torch.full((count, 2, 32, 128), torch.nan, device=DEVICE)
        self.slab = torch.full((frames, 32, 128), torch.nan, device=DEVICE)
        self.compressed = torch.full((count, 2, 2, 64), torch.nan, device=DEVICE)
        self.table = empty_table(2 * count, frames)
        self.step = torch.zeros(1, dtype=torch.int64, device=DEVICE)
        self.counters = torch.zeros(3, dtype=torch.int64, device=DEVICE)

    def decode(self, positions, query, forecast, key, value):
        self.step += 1
        at = positions.clamp(min=0)
        block = self.block_table.long().gather(1, at[:, None] // self.size)[:, 0]
        slots = torch.where(positions < 0, -1, block * self.size + at % self.size)
        self.tokens.write_tokens(self.host, self.slab, self.table.frame_of, slots, key, value)
        frames = {"slab": self.slab, "frame_of": self.table.frame_of}
        self.tokens.update_windows(
            self.compressed, self.host, positions, self.block_table, 16, **frames
        )
        chosen = self.select(self.compressed, forecast, self.block_table, positions,
                             Ranking(False), self.blocks)  # fmt: skip
        found = self.paging.resolve(self.table, chosen.pieces, self.step, self.counters)
        pieces = self.host.flatten(0, 1)
        self.paging.copy_pieces(self.slab, found.targets, pieces, found.missing, found.misses)
        output = torch.full_like(query, torch.nan)
        self.attend(self.slab, query, output, found.frames, chosen.lengths, 0.125)
        return output, chosen.blocks, found.misses


def test_decoding_from_the_first_token_on_equals_reference():
    """All kernels together, with rows that start late and padding between them."""
    generator = torch.Generator().manual_seed(0)
    rows, width = 3, 9
    table = scattered_table(rows, width, generator)
    layers = [Layer(ours, table, frames=32) for ours in (True, False)]
    positions = torch.tensor([32 * 6 - 4, -1, 32 * 7 + 12], device=DEVICE)
    past = noise(rows * width, 2, 32, 128, generator=generator)
    windows = noise(rows * width, 2, 2, 64, generator=generator)
    for layer in layers:
        layer.host.copy_(past)
        layer.compressed.copy_(windows)
    fetched = 0
    for number in range(10):
        positions = torch.where(positions >= 0, positions + 1, positions)
        if number == 3:
            positions[1] = 5 * 32 + 14
        if number == 8:
            positions[0] = -1
        query, forecast, key, value = (
            noise(rows, heads, 64, generator=generator) for heads in (6, 2, 2, 2)
        )
        (ours, blocks, misses), (theirs, expected, _) = (
            layer.decode(positions, query, forecast, key, value) for layer in layers
        )
        assert blocks.equal(expected)
        close(ours, theirs, torch.float32)
        fetched += int(misses)
    for a, b in zip(layers[0].table, layers[1].table, strict=True):
        assert a.equal(b)
    held = layers[0].table.piece_of
    assert fetched > 40
    assert (held >= 0).all()
    assert layers[0].slab.equal(layers[0].host.flatten(0, 1)[held])


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_without_a_gpu(capability, tmp_path):
    lines = compiled(__file__, capability, tmp_path)
    names = {line.split()[0] for line in lines}
    assert len(names) == 15, names
    most = 166912 if capability == 80 else 232448  # shared memory that one program may have
    assert all(int(line.split()[1]) <= most for line in lines), lines


def compile_everything(capability: int) -> None:
    """Launch every kernel."""
    compile_only(capability)
    step, hand = (torch.zeros(1, dtype=torch.int64) for _ in range(2))
    counters = torch.zeros(3, dtype=torch.int64)
    table = torch.zeros(3, 40, dtype=torch.int32)
    positions = torch.zeros(3, dtype=torch.int64)
    for dtype, dim in ((torch.bfloat16, 256), (torch.float32, 64)):
        host = torch.zeros(9, 2, 64, 2 * dim, dtype=dtype)
        slab, compressed = host.flatten(0, 1), host.view(9, 2, 4, -1)[..., :dim]
        query, key = (torch.zeros(3, heads, dim, dtype=dtype) for heads in (8, 2))
        for ranking in (RANKINGS["forecast"], RANKINGS["previous"]):
            chosen = sparda_select.select_blocks(
                compressed, query if ranking.softmax else key, table, positions, ranking,
                Blocks(64, 16, 1, 2, 9),
            )  # fmt: skip
        state = PageTable(
            torch.zeros(18, dtype=torch.int32), torch.zeros(18, dtype=torch.int64),
            torch.zeros(18, dtype=torch.int64), torch.zeros(18, dtype=torch.bool), hand,
        )  # fmt: skip
        found = sparda_paging.resolve(state, chosen.pieces, step, counters)
        sparda_paging.copy_pieces(slab, found.targets, slab, found.missing, found.misses)
        whole = sparda_steps.Unframed(host, table, chosen.lengths)
        for unframed in (None, whole):
            sparda_attention.attend_frames(
                slab, query, query, found.frames, chosen.lengths, 0.1, unframed
            )
        sparda_tokens.write_tokens(host, slab, state.frame_of, positions, key, key)
        for frames in ({}, {"slab": slab, "frame_of": state.frame_of}):
            sparda_tokens.update_windows(compressed, host, positions, table, 16, **frames)
        sparda_tokens.record_queries(query.clone(), query, positions, positions, 64)
        prompt = torch.zeros(2, 4, 300, dim, dtype=dtype)
        picked = torch.zeros(2, 300, 9, dtype=torch.bool)
        part = prompt, prompt[:, 0], prompt[:, 0]
        sparda_prefill.attend_part(*part, None, True, 0.1)
        sparda_prefill.attend_part(*part, picked, False, 0.1, block_size=64)


if __name__ == "__main__":
    compile_everything(int(sys.argv[1]))
