# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Prompts that stream back: what is read is what was written, and nothing is overwritten early."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.capture import CaptureError, capturing
from support.kernels import REFERENCE as KERNELS
from support.lanes import ManualLane, counting, gated_lane, make_pager, open_when_waited_for

from vllm_sparse.prefetch.stream import PromptStream, Tile


@pytest.fixture
def counts() -> Counter[str]:
    return Counter()


@pytest.fixture
def gated():
    """A lane whose work happens only when the gate is open, and the gate."""
    with gated_lane() as (lane, gate):
        yield lane, gate


class StagingLane(ManualLane):
    """Sees to it that no half of the staging area is written before it was read.

    Args:
        eager: Copy at once instead of when somebody waits.
    """

    def __init__(self, eager: bool) -> None:
        super().__init__()
        self.eager = eager
        self.unread: set[int] = set()
        self.kernels = KERNELS._replace(copy_pieces=self.copy)

    def copy(self, target, *rest) -> None:
        half = target.data_ptr()
        assert half not in self.unread, "a tile is overwritten before it is read"
        self.unread.add(half)
        KERNELS.copy_pieces(target, *rest)

    def fork(self, work, nbytes=0):
        ticket = super().fork(work, nbytes)
        if self.eager:
            ticket.work()
        return ticket


STREAM_BLOCKS, TILE_BLOCKS = 12, 3


@st.composite
def tile_lists(draw) -> list[Tile]:
    """Tiles whose late ones lie in the upper half of the blocks."""
    tiles = []
    for _ in range(draw(st.integers(1, 5))):
        count, late = draw(st.integers(1, TILE_BLOCKS)), draw(st.booleans())
        blocks = [draw(st.integers(0, 5)) + 6 * late for _ in range(count)]
        tokens = draw(st.integers((count - 1) * 4 + 1, count * 4))
        first, picked = draw(st.integers(0, 5)), draw(st.booleans())
        tiles.append(Tile(torch.tensor(blocks), first, tokens, late, picked))
    return tiles


def choice_of(tile: Tile, generator: torch.Generator) -> torch.Tensor:
    """What two tokens choose, bool ``[2, 2, blocks]``."""
    return torch.rand(2, 2, tile.first_block + len(tile.blocks), generator=generator) < 0.4


def test_earlier_blocks_that_a_chunk_needs_are_counted(counts) -> None:
    stream = PromptStream(make_pager(), KERNELS, ManualLane(), 3, counting(counts), False)
    chosen = torch.zeros(2, 5, 9, dtype=torch.bool)
    chosen[0, :, 3] = chosen[1, 2, 7] = chosen[1, 4, 8] = True
    stream.note_needs((0, 0), chosen, 8)  # the last one has tokens of the chunk
    stream.note_needs((0, 0), chosen, 0)  # a first chunk
    stream.note_needs((0, 0), chosen, 9)
    stream.end_step()
    assert counts == {"prompt_blocks_visible": 34, "prompt_blocks_needed": 5}


def test_a_graph_can_capture_the_ends_of_a_step(counts) -> None:
    """Even when what was counted is on its way to the host, which is asked for between steps."""
    stream = PromptStream(
        make_pager(), KERNELS, ManualLane(), 3, counting(counts), False, captured=True
    )
    for _ in range(8):
        with capturing():
            stream.begin_step(())
            stream.end_step()
        stream.note_needs((0, 0), torch.ones(2, 5, 9, dtype=torch.bool), 9)
        stream.poll()
    assert counts["prompt_blocks_visible"] == counts["prompt_blocks_needed"] == 18 * 5


def test_where_host_and_device_are_one_a_step_reads_what_no_graph_could(counts) -> None:
    stream = PromptStream(make_pager(), KERNELS, ManualLane(), 3, counting(counts), False)
    with capturing(), pytest.raises(CaptureError, match="tolist reads a tensor back"):
        stream.end_step()


class TestPromptStream:
    @given(tile_lists(), st.integers(1, 4), st.booleans(), st.booleans(), st.booleans())
    @settings(max_examples=200, deadline=None)
    def test_every_read_sees_its_tile(self, tiles, layers, prefetch, eager, resident):
        """Copies happen as early and as late as they may; each layer rewrites the late blocks."""
        frames = (2 * STREAM_BLOCKS if resident else 8, *[8] * (layers - 1))
        pager = make_pager(layers, STREAM_BLOCKS, frames=frames)
        lane, counts = StagingLane(eager), Counter()
        stream = PromptStream(pager, lane.kernels, lane, TILE_BLOCKS, counting(counts), prefetch)
        generator, picked = torch.Generator().manual_seed(len(tiles)), [0, 0]
        assert stream.nbytes == 2 * TILE_BLOCKS * 2 * pager.geometry.piece_bytes
        for step in range(2):
            stream.begin_step(tiles)
            for number, layer in enumerate(pager.layers):
                pieces = layer.source.view(STREAM_BLOCKS, 2, 4, 2)
                pieces[6:] += 1000
                if layer.resident:
                    layer.pieces.fill_(torch.nan)  # its frames are nearer
                choices = [choice_of(tile, generator) for tile in tiles]
                for index, chosen in enumerate(choices):
                    stream.note_needs((index, index + 1), chosen, chosen.shape[2])
                for index, tile in enumerate(tiles):
                    rows = stream.read(number, index)
                    lane.unread.discard(rows.data_ptr())
                    needed = choices[index].any(1)[:, tile.first_block :]
                    if not tile.picked:
                        needed = torch.ones_like(needed)
                    picked[layer.resident] += int(needed.sum())
                    staged = rows.unflatten(1, (len(tile.blocks), 4))
                    assert staged[needed].equal(pieces[tile.blocks].transpose(0, 1)[needed])
                    reads = number * len(tiles) + index + 1
                    early = prefetch and reads < layers * len(tiles)
                    early &= index + 1 < len(tiles) or not (tiles[0].late or tiles[0].picked)
                    assert len(lane.tickets) == step * layers * len(tiles) + reads + early
            assert not lane.unread
            stream.end_step()
        piece = pager.geometry.piece_bytes
        assert sum(ticket.nbytes for ticket in lane.tickets) == sum(picked) * piece
        assert counts["streamed_bytes"] == picked[False] * piece
        assert counts["exposed_wait_seconds"] == (0 if eager else 0.25 * len(lane.tickets))

    def test_a_thread_stays_one_tile_ahead(self, counts, gated, monkeypatch):
        lane, gate = gated
        pager = make_pager()
        stream = PromptStream(pager, KERNELS, lane, 2, counting(counts))
        tiles = [Tile(torch.tensor([b]), b, 4, False) for b in (1, 2)]
        stream.begin_step(tiles)
        open_when_waited_for(gate, monkeypatch, 0.2)
        rows = stream.read(0, 0)
        assert counts["exposed_wait_seconds"] > 0.15
        for layer in range(3):
            for index, tile in enumerate(tiles):
                if (layer, index) != (0, 0):
                    rows = stream.read(layer, index)
                assert rows.equal(pager.host[layer, int(tile.blocks)].flatten(1, 1))

    def test_a_new_step_waits_for_what_a_failed_one_left(self, counts):
        lane, pager = ManualLane(), make_pager()
        stream = PromptStream(pager, KERNELS, lane, 2, counting(counts))
        stream.begin_step([Tile(torch.tensor([b]), b, 4, False) for b in (1, 2, 3)])
        stream.read(0, 0)
        assert [ticket.done for ticket in lane.tickets] == [True, False]
        other = Tile(torch.tensor([5, 6]), 0, 7, False)
        stream.begin_step([other])
        assert all(ticket.done for ticket in lane.tickets), "it would overwrite the new tile"
        rows = stream.read(0, 0)
        assert rows[:, :7].equal(pager.host[0, 5:7].transpose(0, 1).flatten(1, 2)[:, :7])

    def test_a_step_without_earlier_tokens_copies_nothing(self, counts):
        lane = ManualLane()
        PromptStream(make_pager(), KERNELS, lane, 2, counting(counts)).begin_step(())
        assert not lane.tickets
