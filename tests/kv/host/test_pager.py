# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Host blocks and frames: what `check_integrity` notices, and what poison shows."""

from __future__ import annotations

import pytest
import torch
from support.kernels import REFERENCE

from vllm_sparse.errors import IntegrityError
from vllm_sparse.kv.host.geometry import Geometry
from vllm_sparse.kv.host.pager import Pager

LAYERS, BLOCKS, HEADS, SIZE, DIM = 3, 27, 2, 4, 2


def rows_of(numbers: torch.Tensor) -> torch.Tensor:
    """Keys and values of tokens, ``[T, G, 2 * D]``, all different."""
    width = HEADS * 2 * DIM
    return (numbers[:, None] * width + torch.arange(width)).float().view(-1, HEADS, 2 * DIM)


def write(pager: Pager, slots: list[int], numbers: torch.Tensor, *, frames: bool = True) -> None:
    """Store tokens of the first layer, in its frames as well."""
    layer, where = pager.layers[0], torch.tensor(slots)
    layer.poison_fresh(where)
    frame_of = layer.table.frame_of if frames else torch.full_like(layer.table.frame_of, -1)
    key, value = rows_of(numbers).split(DIM, -1)
    REFERENCE.write_tokens(layer.host, layer.slab, frame_of, where, key, value)


def fetch(pager: Pager, *blocks: int) -> torch.Tensor:
    """Read blocks in the first layer, in the first step."""
    layer = pager.layers[0]
    pieces = torch.tensor(blocks) * HEADS + torch.arange(HEADS)[:, None]
    counters = torch.zeros(3, dtype=torch.int64)
    found = REFERENCE.resolve(layer.table, pieces.int(), torch.ones(1), counters)
    REFERENCE.copy_pieces(layer.slab, found.targets, layer.pieces, found.missing, found.misses)
    return counters


def make_pager(frames: int = 8, poison: bool = True) -> Pager:
    """Blocks 3 and 5 are written and in frames of the first layer."""
    geometry = Geometry(LAYERS, BLOCKS, HEADS, SIZE, DIM, 4, (frames, 8, 8))
    pager = Pager(geometry, torch.float32, poison)
    write(pager, [*range(12, 16), *range(20, 23)], torch.arange(7))
    fetch(pager, 3, 5)
    pager.check_integrity()
    return pager


@pytest.fixture
def pager() -> Pager:
    return make_pager()


def test_a_device_sees_the_pinned_pool_as_it_is_shown() -> None:
    shown = []

    def view(host: torch.Tensor) -> torch.Tensor:
        assert host.data_ptr() % (2 << 20) == 0
        shown.append(host.clone())
        return shown[0]

    pager = Pager(Geometry(2, BLOCKS, HEADS, SIZE, DIM, 4, (8, 8)), torch.float32, True, view)
    assert pager.host.shape == shown[0].shape == (2, BLOCKS, HEADS, SIZE, 2 * DIM)
    assert [layer.host.data_ptr() for layer in pager.layers] == [x.data_ptr() for x in shown[0]]


@pytest.mark.parametrize("frames", [(8, 54), (54, 54)], ids=["second", "all"])
def test_a_gpu_has_no_host_blocks_of_a_resident_layer(frames) -> None:
    """Every read of its blocks, and every write, is one of its frames."""
    shown = []

    def view(host: torch.Tensor) -> torch.Tensor:
        shown.append(host)
        return host

    geometry = Geometry(2, BLOCKS, HEADS, SIZE, DIM, 4, frames)
    pager, paged = Pager(geometry, torch.float32, True, view), frames.count(8)
    assert [tuple(host.shape) for host in shown] == [(1, BLOCKS, HEADS, SIZE, 2 * DIM)] * paged
    assert pager.host.shape[0] == paged
    for layer in pager.layers:
        assert (layer.host.data_ptr() == layer.slab.data_ptr()) == layer.resident
    layer, rows = pager.layers[1], rows_of(torch.arange(7))
    where, slots = layer.table.frame_of, torch.tensor([*range(12, 16), *range(20, 23)])
    REFERENCE.write_tokens(layer.host, layer.slab, where, slots, *rows.split(DIM, -1))
    for host in shown:
        host.fill_(torch.nan)
    for read in (layer.host, layer.slab.view_as(layer.host)):
        assert read[slots // SIZE, :, slots % SIZE].equal(rows)
        assert int((~read.isnan()).sum()) == rows.numel()


def test_frames_in_use_are_counted(pager: Pager) -> None:
    assert pager.frames_in_use() == 2 * HEADS
    assert fetch(pager, 3, 6).tolist() == [0, HEADS, 0]  # the frames of 3 are of this very step
    assert pager.frames_in_use() == 3 * HEADS


@pytest.mark.parametrize(("frames", "poison"), [(8, True), (8, False), (BLOCKS * HEADS, True)])
def test_integrity_notices_a_frame_that_differs_from_its_block(frames, poison) -> None:
    pager = make_pager(frames, poison)
    write(pager, [23], torch.tensor([7]), frames=False)
    with pytest.raises(IntegrityError, match="differs from its block"):
        pager.check_integrity()
    write(pager, [23], torch.tensor([7]))
    pager.check_integrity()


def test_integrity_notices_two_pieces_in_one_frame(pager: Pager) -> None:
    table = pager.layers[0].table
    table.frame_of[3 * HEADS] = table.frame_of[5 * HEADS]
    with pytest.raises(IntegrityError, match="share a frame"):
        pager.check_integrity()


def test_integrity_notices_a_frame_whose_piece_is_elsewhere(pager: Pager) -> None:
    pager.layers[0].table.frame_of[3 * HEADS] = -1
    with pytest.raises(IntegrityError, match="elsewhere"):
        pager.check_integrity()


def test_a_reused_block_forgets_its_past(pager: Pager) -> None:
    """Its first token comes: with poison, nothing of the last owner can be read."""
    layer = pager.layers[0]
    write(pager, [12], torch.tensor([9]))
    pager.check_integrity()
    assert layer.host[3, :, 0].equal(rows_of(torch.tensor([9]))[0])
    assert layer.host[3, :, 1:].isnan().all()
    assert layer.slab[layer.table.frame_of[3 * HEADS].long()][1:].isnan().all()
