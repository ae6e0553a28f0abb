# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Fetches for decode: when they are issued and awaited, and what is counted."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import pytest
import torch
from support.kernels import REFERENCE as KERNELS
from support.lanes import ManualLane, counting, make_pager
from vllm_sparse.kernels.types import Selected

from vllm_sparse.prefetch.fetcher import Fetcher, SlabFullError
from vllm_sparse.prefetch.lane import ThreadLane

if TYPE_CHECKING:
    from vllm_sparse.kv.host.pager import Pager


def of_blocks(blocks: torch.Tensor) -> Selected:
    """A selection of physical blocks ``[R, 2, K]``."""
    pieces = torch.where(blocks < 0, -1, 2 * blocks + torch.arange(2)[:, None]).int()
    return Selected(blocks.int(), pieces, 4 * (blocks[:, 0] >= 0).sum(-1).int())


def wanted(*blocks: int) -> Selected:
    """One token whose two heads read the same blocks."""
    return of_blocks(torch.tensor(blocks).expand(1, 2, -1))


class Eager(Fetcher):
    """Publishes what it counts at once instead of at the end of a step."""

    def announce(self, layer, selected, *, ahead):
        super().announce(layer, selected, ahead=ahead)
        self.end_step()

    def take(self, layer):
        taken = super().take(layer)
        self.end_step()
        return taken


@pytest.fixture
def counts() -> Counter[str]:
    return Counter()


class TestFetcher:
    @pytest.fixture
    def lane(self) -> ManualLane:
        return ManualLane()

    @pytest.fixture
    def pager(self) -> Pager:
        return make_pager()

    def test_ahead_is_fetched_at_once_and_read_after_waiting(self, pager, lane, counts):
        fetcher = Eager(pager, KERNELS, lane, counting(counts))
        fetcher.announce(1, wanted(3, 5, -1), ahead=True)
        (ticket,) = lane.tickets
        assert not ticket.waits
        assert ticket.nbytes == 4 * pager.geometry.piece_bytes
        assert counts["prefetch_issued"] == counts["frame_misses"] == 4
        frames, _ = fetcher.take(1)
        assert ticket.waits == 1
        assert frames.dtype == torch.int32
        assert frames.shape == (1, 2, 3)
        assert (frames[..., 2] == -1).all()
        for head in range(2):
            for k, block in enumerate((3, 5)):
                read = pager.layers[1].slab[int(frames[0, head, k])]
                assert read.equal(pager.host[1, block, head])
        assert pager.layers[0].slab.isnan().all(), "another layer's frames are untouched"

    def test_late_copies_are_counted_with_the_wait(self, pager, lane, counts):
        fetcher = Eager(pager, KERNELS, lane, counting(counts))
        fetcher.announce(1, wanted(3), ahead=True)
        fetcher.take(1)
        assert counts["prefetch_late"] == 2
        assert counts["exposed_wait_seconds"] == 0.25
        fetcher.announce(2, wanted(3, 4), ahead=True)
        lane.tickets[-1].work()
        fetcher.take(2)
        assert counts["prefetch_late"] == 2, "it came in time"
        assert counts["exposed_wait_seconds"] == 0.25
        assert counts["prefetch_issued"] == 6
        piece = pager.geometry.piece_bytes
        assert [ticket.nbytes for ticket in lane.tickets] == [2 * piece, 4 * piece]

    def test_what_its_own_layer_announces_is_no_prefetch(self, pager, lane, counts):
        fetcher = Eager(pager, KERNELS, lane, counting(counts))
        fetcher.announce(0, wanted(1), ahead=False)
        assert len(lane.tickets) == 1
        fetcher.take(0)
        assert not counts["prefetch_issued"]
        assert not counts["prefetch_late"]
        assert counts["frame_misses"] == 2
        assert counts["exposed_wait_seconds"] == 0.25

    def test_without_prefetch_the_fetch_waits_for_its_layer(self, pager, lane, counts):
        fetcher = Eager(pager, KERNELS, lane, counting(counts), prefetch=False)
        fetcher.announce(0, wanted(1), ahead=False)
        fetcher.announce(1, wanted(2), ahead=True)
        assert len(lane.tickets) == 1
        assert counts["frame_misses"] == 2
        fetcher.take(0)
        assert len(lane.tickets) == 1
        frames, _ = fetcher.take(1)
        assert len(lane.tickets) == 2
        assert pager.layers[1].slab[int(frames[0, 1, 0])].equal(pager.host[1, 2, 1])
        assert counts["frame_misses"] == 4
        assert not counts["prefetch_issued"]
        assert not counts["prefetch_late"]

    def test_hits_misses_and_bytes(self, pager, lane, counts):
        fetcher = Eager(pager, KERNELS, lane, counting(counts))
        both = of_blocks(
            torch.tensor([[[1, 2], [1, 3]], [[2, 1], [3, -1]]])
        )  # two tokens share all pieces
        fetcher.announce(0, both, ahead=False)
        fetcher.take(0)
        assert (counts["frame_hits"], counts["frame_misses"]) == (0, 4)
        fetcher.begin_step()
        fetcher.announce(0, wanted(1, 4), ahead=False)
        fetcher.take(0)
        assert (counts["frame_hits"], counts["frame_misses"]) == (2, 6)
        assert counts["host_to_device_bytes"] == 6 * 4 * 2 * 1 * 4
        assert not counts["prefetch_wasted"]

    def test_a_resident_layer_copies_nothing(self, lane, counts):
        pager = make_pager(frames=(16, 8, 8))
        fetcher = Eager(pager, KERNELS, lane, counting(counts))
        fetcher.announce(0, wanted(1, 7), ahead=False)
        frames, _ = fetcher.take(0)
        assert frames.tolist() == [[[2, 14], [3, 15]]]
        assert (counts["frame_hits"], counts["frame_misses"]) == (4, 0)
        assert not counts["host_to_device_bytes"]
        assert not counts["exposed_wait_seconds"]

    @pytest.mark.parametrize("prefetch", [True, False])
    def test_a_new_step_forgets_what_a_failed_one_left(self, pager, lane, counts, prefetch):
        fetcher = Eager(pager, KERNELS, lane, counting(counts), prefetch)
        fetcher.announce(1, wanted(3, 4), ahead=True)
        fetcher.begin_step()
        assert counts["prefetch_wasted"] == (4 if prefetch else 0)
        assert all(ticket.done for ticket in lane.tickets), "frames are whole before a new step"
        pager.check_integrity()
        with pytest.raises(KeyError):
            fetcher.take(1)
        fetcher.begin_step()
        assert counts["prefetch_wasted"] == (4 if prefetch else 0), "counted once"
        # What was fetched is there, though.
        fetcher.announce(1, wanted(3, 4), ahead=True)
        fetcher.take(1)
        assert counts["frame_hits"] == (4 if prefetch else 0)

    def test_what_a_failed_step_read_in_its_own_layer_was_no_prefetch(self, pager, lane, counts):
        fetcher = Eager(pager, KERNELS, lane, counting(counts))
        fetcher.announce(1, wanted(3, 4), ahead=False)
        fetcher.begin_step()
        assert all(ticket.done for ticket in lane.tickets)
        fetcher.announce(1, wanted(3, 4), ahead=True)  # is there
        fetcher.begin_step()
        assert len(lane.tickets) == 1
        assert not counts["prefetch_wasted"]

    def test_frames_are_poisoned_before_they_are_filled_again(self, lane, counts):
        pager = make_pager(frames=4)
        fetcher = Eager(pager, KERNELS, lane, counting(counts))
        for blocks in ((1, 2), (3, 4)):
            fetcher.begin_step()
            fetcher.announce(0, wanted(*blocks), ahead=False)
            assert pager.layers[0].slab.isnan().all()
            fetcher.take(0)
            assert not pager.layers[0].slab.isnan().any()

    def test_a_failed_copy_is_the_takers_error(self, pager, counts):
        def fail(*_):
            raise OSError("the link is down")

        lane = ThreadLane()
        kernels = KERNELS._replace(copy_pieces=fail)
        fetcher = Eager(pager, kernels, lane, counting(counts))
        fetcher.announce(0, wanted(3), ahead=False)
        with pytest.raises(RuntimeError, match="copying KV blocks"):
            fetcher.take(0)
        lane.close()

    def test_more_pieces_than_frames_is_an_error_that_names_the_frames(self, pager, lane, counts):
        fetcher = Fetcher(pager, KERNELS, lane, counting(counts))
        with pytest.raises(SlabFullError, match="all 8 frames"):
            fetcher.announce(0, wanted(0, 1, 2, 3, 4), ahead=False)

    def test_counts_are_published_with_the_step(self, pager, lane, counts):
        fetcher = Fetcher(pager, KERNELS, lane, counting(counts))
        fetcher.announce(0, wanted(3), ahead=False)
        fetcher.announce(1, wanted(3), ahead=True)
        assert not counts
        fetcher.end_step()
        fetcher.end_step()
        assert counts == {
            "frame_misses": 4,
            "prefetch_issued": 2,
            "host_to_device_bytes": 4 * pager.geometry.piece_bytes,
        }


class TestWhereTheHostReadsNothing:
    """Graphs may replay steps: how much was fetched is known only some steps later."""

    class Captured(ManualLane):
        """Has tickets whose events cannot be asked, as while a graph is captured."""

        class Ticket(ManualLane.Ticket):
            @property
            def done(self) -> bool:
                raise AssertionError("asks an event")

            @done.setter
            def done(self, done: bool) -> None:
                assert not done

            def wait(self) -> float:
                self._work()
                return 0.0

    @pytest.fixture
    def lane(self) -> ManualLane:
        return self.Captured()

    @pytest.mark.parametrize("prefetch", [True, False])
    def test_misses_are_fetched_and_published_later(self, lane, counts, prefetch):
        pager = make_pager(frames=(16, 8, 8))
        fetcher = Fetcher(pager, KERNELS, lane, counting(counts), prefetch, captured=True)
        for step in range(6):
            fetcher.begin_step()
            assert not fetcher.announced(1)
            fetcher.announce(0, wanted(1, 7), ahead=False)
            fetcher.announce(1, wanted(1, step), ahead=True)
            assert fetcher.announced(0)
            assert fetcher.announced(1)
            assert fetcher.take(0)[0].tolist() == [[[2, 14], [3, 15]]]  # resident
            frames, _ = fetcher.take(1)
            assert pager.layers[1].slab[frames[0, 1].long()].equal(pager.host[1, [1, step], 1])
            fetcher.end_step()
            fetcher.poll()
        assert len(lane.tickets) == 6
        assert not any(ticket.nbytes for ticket in lane.tickets)
        assert not counts["frame_hits"] % 2
        assert counts["frame_misses"] in range(4, 13)
        assert counts["prefetch_issued"] == prefetch * counts["frame_misses"]
        assert counts["host_to_device_bytes"] == counts["frame_misses"] * 32
        assert not counts["prefetch_late"]

    def test_a_slab_that_was_full_is_an_error_then(self, lane, counts):
        fetcher = Fetcher(make_pager(), KERNELS, lane, counting(counts), captured=True)
        fetcher.announce(0, wanted(0, 1, 2, 3, 4), ahead=False)
        fetcher.poll()  # a reading begins, which the next one publishes
        with pytest.raises(SlabFullError, match="all 8 frames"):
            fetcher.poll()
