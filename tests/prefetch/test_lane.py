# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Work beside the computation: order, waiting, the rate of the link, and the end of threads."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import subprocess
import sys
import threading
import time
import weakref
from types import SimpleNamespace

import pytest
import torch
from support.lanes import copy_threads, gated_lane, open_when_waited_for

from vllm_sparse.prefetch import lane as lane_module
from vllm_sparse.prefetch.lane import LateLane, StreamLane, ThreadLane


@pytest.fixture
def gated():
    """A lane whose work happens only when the gate is open, and the gate."""
    with gated_lane() as (lane, gate):
        yield lane, gate


def write(target: torch.Tensor, value: float = 1.0):
    """Work that writes one number."""
    return lambda: target.fill_(value)


class TestThreadLane:
    def test_works_in_the_order_of_its_forks(self):
        lane, done = ThreadLane(), []
        for number in range(200):
            ticket = lane.fork(lambda number=number: done.append(number))
        ticket.wait()
        assert done == list(range(200))
        lane.close()

    def test_the_caller_goes_on_while_work_runs(self, gated):
        lane, gate = gated
        target = torch.zeros(1)
        first, second = lane.fork(write(target)), lane.fork(write(torch.zeros(1)))
        assert not first.done
        assert not second.done
        assert target.item() == 0
        gate.set()
        second.wait()
        assert first.done
        assert second.done
        assert target.item() == 1
        assert first.wait() == 0, "waiting for finished work takes no time"

    def test_waiting_reports_how_long_the_caller_stood_still(self, gated, monkeypatch):
        lane, gate = gated
        ticket = lane.fork(write(torch.zeros(1)))
        open_when_waited_for(gate, monkeypatch, 0.2)
        start = time.perf_counter()
        waited = ticket.wait()
        assert 0.15 < waited <= time.perf_counter() - start

    @pytest.mark.parametrize("jobs", [1, 4])
    def test_the_link_is_as_slow_as_asked(self, jobs):
        """80 ms in total, however it is divided; the work itself takes next to nothing."""
        nbytes = 400_000 // jobs
        lane = ThreadLane(gb_per_s=400_000 / 0.08 / 1e9)
        fastest, rounds = 10.0, 0
        while fastest >= 0.12 and rounds < 100:  # the machine may be busy
            rounds += 1
            start = time.perf_counter()
            tickets = [lane.fork(write(torch.zeros(1)), nbytes) for _ in range(jobs)]
            waited = sum(ticket.wait() for ticket in tickets)
            took = time.perf_counter() - start
            assert waited <= took
            assert took >= 0.08
            fastest = min(fastest, took)
        lane.close()
        assert fastest < 0.12

    def test_an_idle_link_saves_no_time_up(self):
        lane = ThreadLane(gb_per_s=4 / 0.03 / 1e9)
        lane.fork(write(torch.zeros(1)), 4).wait()
        time.sleep(0.05)
        start = time.perf_counter()
        lane.fork(write(torch.zeros(1)), 4).wait()
        assert time.perf_counter() - start >= 0.03
        lane.close()

    def test_a_copy_may_take_longer_than_the_link_would(self):
        lane = ThreadLane(gb_per_s=1e3)
        ticket = lane.fork(lambda: time.sleep(0.01), 4)
        lane.close()
        assert ticket.done

    def test_a_thread_that_may_not_choose_its_cores_works(self, monkeypatch):
        def refuse(*_):
            raise OSError(22, "Invalid argument")

        monkeypatch.setattr(os, "sched_setaffinity", refuse)
        lane, target, done = ThreadLane(), torch.zeros(1), threading.Event()
        lane.fork(lambda: (target.fill_(1), done.set()))
        assert done.wait(60)
        lane.close()

    @pytest.mark.parametrize("parent", [None, 1234, 1])
    def test_it_stays_on_the_cores_that_the_server_was_given(self, monkeypatch, parent):
        """A worker is pinned to some of its parent's; nobody leaves those of a `taskset`."""
        chosen, masks = [], {0: {5}, 1234: {4, 5}}

        def mask(pid):
            if pid not in masks:
                raise ProcessLookupError
            return set(masks[pid])

        monkeypatch.setattr(os, "sched_getaffinity", mask)
        monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cores: chosen.append(cores))
        found = None if parent is None else SimpleNamespace(pid=parent)
        monkeypatch.setattr(multiprocessing, "parent_process", lambda: found)
        lane = ThreadLane()
        lane.fork(write(torch.zeros(1))).wait()
        lane.close()
        assert chosen == [{4, 5} if parent == 1234 else {5}]

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
    def test_a_dead_thread_is_not_waited_for(self, monkeypatch):
        def fail():
            raise MemoryError

        monkeypatch.setattr(lane_module, "_allowed_cores", fail)
        lane = ThreadLane()
        lane._thread.join(60)
        with pytest.raises(RuntimeError, match="has died"):
            lane.fork(write(torch.zeros(1)))
        lane.close()

    def test_errors_surface_where_the_work_is_awaited(self):
        lane, target = ThreadLane(), torch.zeros(1)
        bad = lane.fork(lambda: target[torch.tensor([7])])
        good = lane.fork(write(target))
        for _ in range(2):
            with pytest.raises(RuntimeError, match="copying KV blocks") as error:
                bad.wait()
            assert isinstance(error.value.__cause__, IndexError)
        good.wait()
        assert target.item() == 1, "the thread survives"
        lane.close()

    def test_closing_finishes_what_was_forked_and_leaves_no_thread(self):
        before = copy_threads()
        lane, done = ThreadLane(), []
        (thread,) = copy_threads() - before
        tickets = [
            lane.fork(lambda number=number: (time.sleep(0.01), done.append(number)))
            for number in range(5)
        ]
        lane.close()
        assert all(ticket.done for ticket in tickets)
        assert not any(ticket.wait() for ticket in tickets)
        assert done == list(range(5))
        assert not thread.is_alive()
        lane.close()
        with pytest.raises(RuntimeError, match="closed"):
            lane.fork(write(torch.zeros(1)))

    def test_a_forgotten_lane_ends_its_thread(self):
        before = copy_threads()
        lane = ThreadLane()
        lane.fork(write(torch.zeros(1))).wait()
        (thread,) = copy_threads() - before
        del lane
        gc.collect()
        thread.join(60)
        assert not thread.is_alive()

    def test_an_exiting_interpreter_finishes_the_work(self, tmp_path):
        """A thread that Python ends inside C++ takes the process down with an abort."""
        done = tmp_path / "done"
        code = (
            "import sys, time, torch\n"
            "from pathlib import Path\n"
            "from vllm_sparse.prefetch.lane import ThreadLane\n"
            "def work():\n"
            "    time.sleep(0.3)\n"
            f"    Path({str(done)!r}).write_text(str(torch.ones(4, 2).sum().item()))\n"
            "lane = ThreadLane()\n"
            "lane.fork(work)\n"
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


def test_late_work_runs_in_order_and_only_when_it_is_waited_for():
    lane, done = LateLane(), []
    tickets = [lane.fork(lambda name=name: done.append(name)) for name in "abcd"]
    assert not done
    assert not any(ticket.done for ticket in tickets)
    assert tickets[1].wait() == 0.0
    assert done == ["a", "b"]  # a stream would have run what comes before
    assert [ticket.done for ticket in tickets] == [True, True, False, False]
    tickets[0].wait()
    tickets[2].wait()
    assert done == ["a", "b", "c"]
    lane.close()
    assert done == ["a", "b", "c", "d"]


class Recorder:
    """Streams and events that note what is asked of them, in order."""

    def __init__(self, monkeypatch):
        self.said, self.on = [], ["main"]
        recorder = self

        class Event:
            def record(self, stream=None):
                recorder.said.append(("record", self, stream.name if stream else recorder.on[-1]))

            def query(self):
                return False

        class Stream:
            def __init__(self, device=None, priority=0, name="side"):
                self.name, self.priority = name, priority

            def wait_event(self, event):
                recorder.said.append(("wait", event, self.name))

        @contextlib.contextmanager
        def within(stream):
            recorder.on.append(stream.name)
            yield
            recorder.on.pop()

        for name, stand_in in (
            ("Event", Event), ("Stream", Stream), ("stream", within),
            ("current_stream", lambda: Stream(name=recorder.on[-1])),
        ):  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, stand_in)


def test_a_stream_begins_behind_what_it_needs_and_is_waited_for(monkeypatch):
    """The copy follows what was computed before it, and attention follows the copy."""
    recorder = Recorder(monkeypatch)
    lane, kept = StreamLane(torch.device("cpu")), torch.zeros(1)
    gone = weakref.ref(kept)

    def work(kept=kept):
        recorder.said.append(("work", None, recorder.on[-1]))
        return kept

    ticket = lane.fork(work)
    del work, kept
    gc.collect()
    assert not ticket.done
    assert gone() is not None, "memory that the side stream uses went back to the allocator"
    assert ticket.wait() == 0.0
    (recorded, waited, worked, done, joined) = recorder.said
    assert (recorded[0], recorded[2]) == ("record", "main")
    assert waited == ("wait", recorded[1], "side")
    assert worked == ("work", None, "side")
    assert (done[0], done[2]) == ("record", "side")
    assert joined == ("wait", done[1], "main")
    assert lane._stream.priority < 0
    recorder.said.clear()
    gc.collect()
    assert gone() is None
