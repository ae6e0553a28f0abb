# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Copies beside the computation: order, waiting, counting, and what may not be overwritten yet."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm_sparse.kernels.dispatch import sparda_paging
from vllm_sparse.kernels.reference import paging

from vllm_sparse.kv.host.geometry import Geometry
from vllm_sparse.kv.host.pager import Pager
from vllm_sparse.prefetch.engine import ThreadCopyEngine
from vllm_sparse.prefetch.scheduler import PrefetchScheduler
from vllm_sparse.prefetch.stream import PromptStream, Tile

KERNELS = sparda_paging("cpu")._replace(resolve=paging.resolve, copy_pieces=paging.copy_pieces)
ONE = torch.tensor([0])


def job(value: float = 1.0) -> tuple[torch.Tensor, ...]:
    """Arguments of a copy of one piece of one number."""
    return torch.zeros(1, 1), ONE, torch.tensor([[float(value)]]), ONE


def copy_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "sparda-copy"}


@pytest.fixture
def gated():
    """An engine whose copies happen only when the gate is open, and the gate."""
    gate = threading.Event()

    def copy(*arguments) -> None:
        assert gate.wait(30)
        paging.copy_pieces(*arguments)

    engine = ThreadCopyEngine(copy)
    yield engine, gate
    gate.set()
    engine.close()


class TestThreadCopyEngine:
    def test_copies_in_the_order_of_submission(self):
        engine = ThreadCopyEngine(paging.copy_pieces)
        target = torch.zeros(3, 2)
        for value in range(200):
            ticket = engine.submit(
                target,
                torch.tensor([2, 0]),
                torch.full((1, 2), float(value)),
                torch.zeros(2).long(),
            )
        ticket.wait()
        assert target.tolist() == [[199, 199], [0, 0], [199, 199]]
        engine.close()

    def test_the_caller_goes_on_while_a_copy_runs(self, gated):
        engine, gate = gated
        arguments = job()
        first, second = engine.submit(*arguments), engine.submit(*job())
        assert not first.done
        assert not second.done
        assert arguments[0].item() == 0
        gate.set()
        second.wait()
        assert first.done
        assert second.done
        assert arguments[0].item() == 1
        assert first.wait() == 0, "waiting for a finished copy takes no time"

    def test_waiting_reports_how_long_the_caller_stood_still(self, gated):
        engine, gate = gated
        ticket = engine.submit(*job())
        timer = threading.Timer(0.3, gate.set)
        start = time.perf_counter()
        timer.start()
        waited = ticket.wait()
        assert 0.05 < waited <= time.perf_counter() - start
        timer.join()

    def test_nothing_to_copy_is_done_at_once(self, gated):
        engine, _ = gated
        engine.submit(*job())  # stuck
        nothing = torch.tensor([], dtype=torch.int64)
        ticket = engine.submit(torch.zeros(1, 1), nothing, torch.zeros(1, 1), nothing)
        assert ticket.done
        assert ticket.wait() == 0

    @pytest.mark.parametrize("jobs", [1, 4])
    def test_the_link_is_as_slow_as_asked(self, jobs):
        """80 ms in total, however it is divided; the copies themselves take next to nothing."""
        pieces = 100 // jobs
        source = torch.ones(pieces, 1000)
        index = torch.arange(pieces)
        total = jobs * source.nbytes
        engine = ThreadCopyEngine(paging.copy_pieces, gb_per_s=total / 0.08 / 1e9)
        fastest = 10.0
        for _ in range(5):  # the machine may be busy
            start = time.perf_counter()
            tickets = [
                engine.submit(torch.zeros_like(source), index, source, index) for _ in range(jobs)
            ]
            waited = sum(ticket.wait() for ticket in tickets)
            took = time.perf_counter() - start
            assert waited <= took
            assert took >= 0.08
            fastest = min(fastest, took)
        engine.close()
        assert fastest < 0.12

    def test_an_idle_link_saves_no_time_up(self):
        engine = ThreadCopyEngine(paging.copy_pieces, gb_per_s=4 / 0.03 / 1e9)
        engine.submit(*job()).wait()
        time.sleep(0.05)
        start = time.perf_counter()
        engine.submit(*job()).wait()
        assert time.perf_counter() - start >= 0.03
        engine.close()

    def test_errors_surface_where_the_copy_is_awaited(self):
        engine = ThreadCopyEngine(paging.copy_pieces)
        bad = engine.submit(torch.zeros(1, 1), torch.tensor([7]), torch.ones(1, 1), ONE)
        arguments = job()
        good = engine.submit(*arguments)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="copying KV blocks") as error:
                bad.wait()
            assert isinstance(error.value.__cause__, IndexError)
        good.wait()
        assert arguments[0].item() == 1, "the thread survives"
        engine.close()

    def test_closing_finishes_what_was_submitted_and_leaves_no_thread(self):
        before = copy_threads()
        engine = ThreadCopyEngine(lambda *a: (time.sleep(0.01), paging.copy_pieces(*a)))
        (thread,) = copy_threads() - before
        arguments = [job(value) for value in range(1, 6)]
        tickets = [engine.submit(*a) for a in arguments]
        engine.close()
        assert all(ticket.done for ticket in tickets)
        assert not any(ticket.wait() for ticket in tickets)
        assert [a[0].item() for a in arguments] == [1, 2, 3, 4, 5]
        assert not thread.is_alive()
        engine.close()
        with pytest.raises(RuntimeError, match="closed"):
            engine.submit(*job())

    def test_a_forgotten_engine_ends_its_thread(self):
        before = copy_threads()
        engine = ThreadCopyEngine(paging.copy_pieces)
        engine.submit(*job()).wait()
        (thread,) = copy_threads() - before
        del engine
        gc.collect()
        thread.join(10)
        assert not thread.is_alive()

    def test_an_exiting_interpreter_finishes_the_copies(self, tmp_path):
        """A thread that Python ends inside C++ takes the process down with an abort."""
        done = tmp_path / "done"
        code = (
            "import sys, time, torch\n"
            "from pathlib import Path\n"
            "from vllm_sparse.kernels.reference.paging import copy_pieces\n"
            "from vllm_sparse.prefetch.engine import ThreadCopyEngine\n"
            "def copy(*arguments):\n"
            "    time.sleep(0.3)\n"
            "    copy_pieces(*arguments)\n"
            f"    Path({str(done)!r}).write_text(str(arguments[0].sum().item()))\n"
            "engine = ThreadCopyEngine(copy)\n"
            "index = torch.arange(4)\n"
            "engine.submit(torch.zeros(4, 2), index, torch.ones(4, 2), index)\n"
        )
        ended = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert ended.returncode == 0, ended.stderr
        assert "Traceback" not in ended.stderr
        assert done.read_text() == "8.0"


class ManualEngine:
    """Copies when told; remembers what was asked."""

    def __init__(self) -> None:
        self.tickets: list[ManualEngine.Ticket] = []

    class Ticket:
        def __init__(self, arguments) -> None:
            self.arguments = arguments
            self.done = not len(arguments[1])
            self.waits = 0

        def copy(self) -> None:
            if not self.done:
                paging.copy_pieces(*self.arguments)
                self.done = True

        def wait(self) -> float:
            self.waits += 1
            waited = 0.0 if self.done else 0.25
            self.copy()
            return waited

    def index(self, values, device):
        return values

    def submit(self, *arguments):
        self.tickets.append(self.Ticket(arguments))
        return self.tickets[-1]

    def close(self) -> None:
        pass


def make_pager(
    layers: int = 3,
    blocks: int = 8,
    heads: int = 2,
    frames: int | tuple[int, ...] = 8,
    size: int = 4,
    dim: int = 1,
) -> Pager:
    frames = frames if isinstance(frames, tuple) else (frames,) * layers
    pager = Pager(
        Geometry(layers, blocks, heads, size, dim, 4, frames), torch.float32, KERNELS, poison=True
    )
    pager.host.copy_(torch.arange(pager.host.numel()).view(pager.host.shape))
    for layer in pager.layers:
        if layer.resident:
            layer.slab.copy_(layer.pieces)
    return pager


def wanted(*blocks: int) -> torch.Tensor:
    """One token whose two heads read the same blocks."""
    return torch.tensor(blocks).expand(1, 2, -1)


@pytest.fixture
def counts() -> Counter[str]:
    return Counter()


def counting(counts: Counter[str]):
    def count(name: str, amount: float) -> None:
        counts[name] += amount

    return count


class TestPrefetchScheduler:
    @pytest.fixture
    def engine(self) -> ManualEngine:
        return ManualEngine()

    @pytest.fixture
    def pager(self) -> Pager:
        return make_pager()

    def test_ahead_is_fetched_at_once_and_read_after_waiting(self, pager, engine, counts):
        scheduler = PrefetchScheduler(pager, engine, counting(counts))
        scheduler.announce(1, wanted(3, 5, -1), ahead=True)
        (ticket,) = engine.tickets
        assert not ticket.waits
        assert counts["prefetch_issued"] == counts["frame_misses"] == 4
        frames = scheduler.take(1)
        assert ticket.waits == 1
        assert frames.dtype == torch.int32
        assert frames.shape == (1, 2, 3)
        assert (frames[..., 2] == -1).all()
        for head in range(2):
            for k, block in enumerate((3, 5)):
                read = pager.layers[1].slab[int(frames[0, head, k])]
                assert read.equal(pager.host[1, block, head])
        assert pager.layers[0].slab.isnan().all(), "another layer's frames are untouched"

    def test_late_copies_are_counted_with_the_wait(self, pager, engine, counts):
        scheduler = PrefetchScheduler(pager, engine, counting(counts))
        scheduler.announce(1, wanted(3), ahead=True)
        scheduler.take(1)
        assert counts["prefetch_late"] == 2
        assert counts["exposed_wait_seconds"] == 0.25
        scheduler.announce(2, wanted(3, 4), ahead=True)
        engine.tickets[-1].copy()
        scheduler.take(2)
        assert counts["prefetch_late"] == 2, "it came in time"
        assert counts["exposed_wait_seconds"] == 0.25
        assert counts["prefetch_issued"] == 6

    def test_what_its_own_layer_announces_is_no_prefetch(self, pager, engine, counts):
        scheduler = PrefetchScheduler(pager, engine, counting(counts))
        scheduler.announce(0, wanted(1), ahead=False)
        assert len(engine.tickets) == 1
        scheduler.take(0)
        assert not counts["prefetch_issued"]
        assert not counts["prefetch_late"]
        assert counts["frame_misses"] == 2
        assert counts["exposed_wait_seconds"] == 0.25

    def test_without_prefetch_the_fetch_waits_for_its_layer(self, pager, engine, counts):
        scheduler = PrefetchScheduler(pager, engine, counting(counts), prefetch=False)
        scheduler.announce(0, wanted(1), ahead=False)
        scheduler.announce(1, wanted(2), ahead=True)
        assert len(engine.tickets) == 1
        assert counts["frame_misses"] == 2
        scheduler.take(0)
        assert len(engine.tickets) == 1
        frames = scheduler.take(1)
        assert len(engine.tickets) == 2
        assert pager.layers[1].slab[int(frames[0, 1, 0])].equal(pager.host[1, 2, 1])
        assert counts["frame_misses"] == 4
        assert not counts["prefetch_issued"]
        assert not counts["prefetch_late"]

    def test_hits_misses_and_bytes(self, pager, engine, counts):
        scheduler = PrefetchScheduler(pager, engine, counting(counts))
        both = torch.tensor([[[1, 2], [1, 3]], [[2, 1], [3, -1]]])  # two tokens share all pieces
        scheduler.announce(0, both, ahead=False)
        scheduler.take(0)
        assert (counts["frame_hits"], counts["frame_misses"]) == (0, 4)
        scheduler.begin_step()
        scheduler.announce(0, wanted(1, 4), ahead=False)
        scheduler.take(0)
        assert (counts["frame_hits"], counts["frame_misses"]) == (2, 6)
        assert counts["host_to_device_bytes"] == 6 * 4 * 2 * 1 * 4
        assert not counts["prefetch_wasted"]

    def test_a_resident_layer_copies_nothing(self, engine, counts):
        pager = make_pager(frames=(16, 8, 8))
        scheduler = PrefetchScheduler(pager, engine, counting(counts))
        scheduler.announce(0, wanted(1, 7), ahead=False)
        frames = scheduler.take(0)
        assert frames.tolist() == [[[2, 14], [3, 15]]]
        assert (counts["frame_hits"], counts["frame_misses"]) == (4, 0)
        assert not counts["host_to_device_bytes"]
        assert not counts["exposed_wait_seconds"]

    @pytest.mark.parametrize("prefetch", [True, False])
    def test_a_new_step_forgets_what_a_failed_one_left(self, pager, engine, counts, prefetch):
        scheduler = PrefetchScheduler(pager, engine, counting(counts), prefetch)
        scheduler.announce(1, wanted(3, 4), ahead=True)
        scheduler.begin_step()
        assert counts["prefetch_wasted"] == (4 if prefetch else 0)
        assert all(ticket.done for ticket in engine.tickets), "frames are whole before a new step"
        pager.check_integrity()
        with pytest.raises(KeyError):
            scheduler.take(1)
        scheduler.begin_step()
        assert counts["prefetch_wasted"] == (4 if prefetch else 0), "counted once"
        # What was fetched is there, though.
        scheduler.announce(1, wanted(3, 4), ahead=True)
        scheduler.take(1)
        assert counts["frame_hits"] == (4 if prefetch else 0)

    def test_a_failed_copy_is_the_takers_error(self, pager, counts):
        def fail(*_):
            raise OSError("the link is down")

        engine = ThreadCopyEngine(fail)
        scheduler = PrefetchScheduler(pager, engine, counting(counts))
        scheduler.announce(0, wanted(3), ahead=False)
        with pytest.raises(RuntimeError, match="copying KV blocks"):
            scheduler.take(0)
        engine.close()


class StagingEngine(ManualEngine):
    """Sees to it that no half of the staging area is written before it was read.

    Args:
        eager: Copy at once instead of when somebody waits.
    """

    def __init__(self, eager: bool) -> None:
        super().__init__()
        self.eager = eager
        self.unread: set[int] = set()

    def submit(self, *arguments):
        half = arguments[0].data_ptr()
        assert half not in self.unread, "a tile is overwritten before it is read"
        self.unread.add(half)
        ticket = super().submit(*arguments)
        if self.eager:
            ticket.copy()
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
        tiles.append(Tile(torch.tensor(blocks), draw(st.integers(0, 5)), tokens, late))
    return tiles


class TestPromptStream:
    @given(tile_lists(), st.integers(1, 4), st.booleans(), st.booleans(), st.booleans())
    @settings(max_examples=200, deadline=None)
    def test_every_read_sees_its_tile(self, tiles, layers, prefetch, eager, resident):
        """Copies happen as early and as late as they may; each layer rewrites the late blocks."""
        frames = (2 * STREAM_BLOCKS if resident else 8, *[8] * (layers - 1))
        pager = make_pager(layers, STREAM_BLOCKS, frames=frames)
        engine, counts = StagingEngine(eager), Counter()
        stream = PromptStream(pager, engine, TILE_BLOCKS, counting(counts), prefetch)
        assert stream.nbytes == 2 * TILE_BLOCKS * 2 * pager.geometry.piece_bytes
        for step in range(2):
            stream.begin_step(tiles)
            for number, layer in enumerate(pager.layers):
                pieces = layer.source.view(STREAM_BLOCKS, 2, 4, 2)
                pieces[6:] += 1000
                if layer.resident:
                    layer.pieces.fill_(torch.nan)  # its frames are nearer
                for index, tile in enumerate(tiles):
                    rows = stream.read(number, index)
                    engine.unread.discard(rows.data_ptr())
                    assert rows.equal(pieces[tile.blocks].transpose(0, 1).flatten(1, 2))
                    reads = number * len(tiles) + index + 1
                    early = prefetch and reads < layers * len(tiles)
                    early &= index + 1 < len(tiles) or not tiles[0].late
                    assert len(engine.tickets) == step * layers * len(tiles) + reads + early
            assert not engine.unread
        fetched = sum(len(tile.blocks) for tile in tiles) * 2 * pager.geometry.piece_bytes
        assert counts["streamed_bytes"] == 2 * (layers - resident) * fetched
        assert counts["exposed_wait_seconds"] == (0 if eager else 0.25 * len(engine.tickets))

    def test_a_thread_stays_one_tile_ahead(self, counts, gated):
        engine, gate = gated
        pager = make_pager()
        stream = PromptStream(pager, engine, 2, counting(counts))
        tiles = [Tile(torch.tensor([b]), b, 4, False) for b in (1, 2)]
        stream.begin_step(tiles)
        threading.Timer(0.3, gate.set).start()
        rows = stream.read(0, 0)
        assert counts["exposed_wait_seconds"] > 0.05
        for layer in range(3):
            for index, tile in enumerate(tiles):
                if (layer, index) != (0, 0):
                    rows = stream.read(layer, index)
                assert rows.equal(pager.host[layer, int(tile.blocks)].flatten(1, 1))

    def test_a_new_step_waits_for_what_a_failed_one_left(self, counts):
        engine, pager = ManualEngine(), make_pager()
        stream = PromptStream(pager, engine, 2, counting(counts))
        stream.begin_step([Tile(torch.tensor([b]), b, 4, False) for b in (1, 2, 3)])
        stream.read(0, 0)
        assert [ticket.done for ticket in engine.tickets] == [True, False]
        other = Tile(torch.tensor([5, 6]), 0, 7, False)
        stream.begin_step([other])
        assert all(ticket.done for ticket in engine.tickets), "it would overwrite the new tile"
        rows = stream.read(0, 0)
        assert rows[:, :7].equal(pager.host[0, 5:7].transpose(0, 1).flatten(1, 2)[:, :7])

    def test_a_step_without_earlier_tokens_copies_nothing(self, counts):
        engine = ManualEngine()
        PromptStream(make_pager(), engine, 2, counting(counts)).begin_step(())
        assert not engine.tickets
