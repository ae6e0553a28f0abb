# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The page table and its copies: every implementation against the reference."""

from __future__ import annotations

import pytest
import torch
from support.kernels import FAR, FLOATS, REFERENCE, device_of, noise, same

from benchmarks.ops.sparda_inputs import empty_table


def drop(table, piece: int) -> None:
    frame = int(table.frame_of[piece])
    if frame >= 0:
        table.frame_of[piece] = table.piece_of[frame] = -1


@pytest.mark.parametrize("tiles", ["small", "large"])
@pytest.mark.parametrize(
    ("frames", "pieces", "shape"),
    [(12, 60, (3, 2, 2)), (13, 20, (3, 2, 2)), (81, 200, (4, 2, 10))],
)
def test_resolve_equals_reference_after_every_step(ours, frames, pieces, shape, tiles, request):
    """Also where every frame is needed, so that the clock goes round twice."""
    device = device_of(ours)
    if tiles == "small":
        request.getfixturevalue("small_tiles")
    generator = torch.Generator().manual_seed(frames)
    mine, theirs = empty_table(pieces, frames, device), empty_table(pieces, frames, device)
    step = torch.zeros(1, dtype=torch.int64, device=device)
    mine_counted, theirs_counted = torch.zeros(2, 3, dtype=torch.int64, device=device)
    most_missed = asked = 0
    for number in range(1, 201 if ours.name == "cpu" else 41):
        step += 1
        wanted = torch.randint(-1, pieces, shape, generator=generator)
        if number % 3 == 0:  # mostly what is there, in another order
            there = torch.arange(pieces)[theirs.frame_of.cpu() >= 0]
            kept = there[torch.randint(len(there), shape, generator=generator)]
            wanted = torch.where(torch.rand(shape, generator=generator) < 0.8, kept, wanted)
        if number % 7 == 0:
            wanted = wanted[:1].expand(shape).contiguous()
        if number % 10 == 0:
            for table in (mine, theirs):
                drop(table, number % pieces)
                drop(table, number % 19)
        wanted = wanted.int().to(device)
        a = ours.resolve(mine, wanted, step, mine_counted)
        b = REFERENCE.resolve(theirs, wanted, step, theirs_counted)
        misses = int(b.misses)
        most_missed = max(most_missed, misses)
        assert int(a.misses) == misses
        assert mine_counted.equal(theirs_counted)
        assert a.frames.equal(b.frames)
        assert a.missing[:misses].equal(b.missing[:misses])
        assert a.targets[:misses].equal(b.targets[:misses])
        there = wanted >= 0
        asked += len(wanted[there].unique())
        assert int(mine_counted[:2].sum()) == asked
        assert mine.piece_of[a.frames[there].long()].equal(wanted[there].long())
        assert a.frames[~there].eq(-1).all()
        for name, x, y in zip(mine._fields, mine, theirs, strict=True):
            assert x.equal(y), (name, number)
    assert mine_counted[0] > 40
    assert not mine_counted[2]
    assert most_missed > 4


def test_the_clock_takes_what_the_first_round_only_unmarked(every):
    device = device_of(every)
    table = empty_table(10, 4, device)
    step = torch.zeros(1, dtype=torch.int64, device=device)
    counters = torch.zeros(3, dtype=torch.int64, device=device)
    for wanted, targets in (
        ([0, 1, 2, 3], [0, 1, 2, 3]),
        ([4], [0]),  # clears all marks and is back at frame 0
        ([1], []),
        ([5, 6], [2, 3]),  # frame 1 is marked again
        ([4, 1, 7, 8], [2, 3]),
    ):
        step += 1
        wanted = torch.tensor(wanted).int().to(device)
        result = every.resolve(table, wanted, step, counters)
        assert result.targets[: int(result.misses)].tolist() == targets
    assert counters.tolist() == [3, 9, 0]


def test_more_pieces_than_frames_set_a_flag(every):
    device = device_of(every)
    table = empty_table(10, 3, device)
    step = torch.ones(1, dtype=torch.int64, device=device)
    counters = torch.zeros(3, dtype=torch.int64, device=device)
    wanted = torch.tensor([5, 4, 5, 1, 0, 8], dtype=torch.int32, device=device)
    result = every.resolve(table, wanted, step, counters)
    assert counters[2] == 1
    assert result.frames.tolist() == [0, 1, 0, 2, -1, -1]
    assert int(table.frame_of.min()) == -1
    step += 1
    every.resolve(table, wanted[:2], step, counters)
    assert counters[2] == 1  # set only, never reset


def test_nothing_wanted_changes_nothing(every):
    device = device_of(every)
    table = empty_table(10, 3, device)
    step = torch.ones(1, dtype=torch.int64, device=device)
    counters = torch.zeros(3, dtype=torch.int64, device=device)
    first = torch.tensor([7, 2], dtype=torch.int32, device=device)
    every.resolve(table, first, step, counters)
    before = [part.clone() for part in table]
    step += 1
    for shape in ((2, 1, 3), (0, 1, 3)):
        nothing = torch.full(shape, -1, dtype=torch.int32, device=device)
        result = every.resolve(table, nothing, step, counters)
        assert result.frames.equal(nothing)
        assert result.misses.tolist() == [0]
        assert counters.tolist() == [0, 2, 0]
        for x, y in zip(table, before, strict=True):
            assert x.equal(y)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("block_size", "dim"), [(16, 64), (32, 80), (64, 96), (16, 256)])
@pytest.mark.parametrize("programs", [1, 5])
def test_copies_equal_reference(ours, dtype, block_size, dim, programs):
    device = device_of(ours)
    generator = torch.Generator().manual_seed(dim)
    source = noise(9, block_size, 2 * dim, generator=generator, device=device, dtype=dtype)
    index = torch.full((2, 12), FAR, dtype=torch.int32)
    index[0, :7] = torch.randperm(11, generator=generator)[:7]
    index[1, :7] = torch.tensor([8, 0, 3, 3, 1, 2, 5])
    index = index.to(device)
    for amount in (0, 1, 7):
        count = torch.tensor([amount], dtype=torch.int32, device=device)
        targets = []
        for kernels in (ours, REFERENCE):
            target = torch.full((11, block_size, 2 * dim), torch.nan, dtype=dtype, device=device)
            kernels.copy_pieces(target, index[0], source, index[1], count, programs=programs)
            targets.append(target)
        assert same(*targets)
        assert (~targets[0].isnan()).any((1, 2)).sum() == amount
        for at, piece in index[:, :amount].T.tolist():
            assert targets[0][at].equal(source[piece])
