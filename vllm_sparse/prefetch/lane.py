# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Work beside the computation: on a thread of a CPU, on a stream of a GPU, or late in tests."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import threading
import time
import weakref
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Callable


class Ticket(Protocol):
    """Work that was forked."""

    @property
    def done(self) -> bool:
        """Whether it has finished."""
        ...

    def wait(self) -> float:
        """Let the computation wait for the work.

        Returns:
            Seconds that the caller stood still.

        Raises:
            RuntimeError: The work failed.
        """
        ...


class Lane(Protocol):
    """Runs work in the order of its forks, beside the computation."""

    def fork(self, work: Callable[[], object], nbytes: int = 0) -> Ticket:
        """Start work that sees everything computed so far.

        Args:
            work: Copies; what it returns is kept until the ticket is waited for.
            nbytes: Bytes that it moves over the link, where the host knows them.

        Returns:
            What to wait for before anything that the work reads or writes is touched again.
        """
        ...

    def close(self) -> None:
        """Finish what was forked and release the thread."""
        ...


class _Job:
    def __init__(self, work: Callable[[], object], nbytes: int) -> None:
        self.work = work
        self.nbytes = nbytes
        self.submitted = time.perf_counter()
        self.error: BaseException | None = None
        self._event = threading.Event()

    @property
    def done(self) -> bool:
        return self._event.is_set()

    def finish(self) -> None:
        self._event.set()

    def wait(self) -> float:
        waited = 0.0
        if not self._event.is_set():
            start = time.perf_counter()
            self._event.wait()
            waited = time.perf_counter() - start
        if self.error is not None:
            raise RuntimeError("copying KV blocks to the device failed") from self.error
        return waited


class ThreadLane:
    """A worker thread; on a CPU, host and device are two pools in one memory.

    Work must release Python's lock to overlap with the computation.

    Args:
        gb_per_s: Rate of the link in 1e9 bytes per second; ``None`` copies as fast as memory does.
    """

    def __init__(self, gb_per_s: float | None = None) -> None:
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        # The thread must not keep the lane alive, or nobody could ever close it.
        self._thread = threading.Thread(
            target=_work, args=(self._jobs, gb_per_s), name="sparda-copy", daemon=True
        )
        self._thread.start()
        # Also runs at exit: a thread that Python kills inside C++ would abort the process.
        self._closer = weakref.finalize(self, _close, self._jobs, self._thread)

    def fork(self, work: Callable[[], object], nbytes: int = 0) -> Ticket:
        """See :class:`Lane`."""
        if not self._closer.alive:
            raise RuntimeError("the lane is closed")
        if not self._thread.is_alive():
            raise RuntimeError("the thread that copies KV blocks has died; nothing would be copied")
        job = _Job(work, nbytes)
        self._jobs.put(job)
        return job

    def close(self) -> None:
        """Finish what was forked and end the thread."""
        self._closer()


def _close(jobs: queue.SimpleQueue[_Job | None], thread: threading.Thread) -> None:
    jobs.put(None)
    if thread is not threading.current_thread():  # where a garbage collection may run this
        thread.join()


def _allowed_cores() -> set[int]:
    """Cores that the server was started on: vLLM pins a worker to some of those of its parent."""
    cores = os.sched_getaffinity(0)
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid is not None:
        with contextlib.suppress(OSError):  # it has ended
            cores |= os.sched_getaffinity(parent.pid)
    return cores


def _work(jobs: queue.SimpleQueue[_Job | None], gb_per_s: float | None) -> None:
    # A copy on the core that computes would overlap with nothing; but it works there, too.
    if hasattr(os, "sched_setaffinity"):
        with contextlib.suppress(OSError):  # forbidden, or the cores have changed
            os.sched_setaffinity(0, _allowed_cores())
    free_at = 0.0
    while (job := jobs.get()) is not None:
        # A queued copy starts when the link is free, however late this thread wakes up.
        start = max(job.submitted, free_at)
        try:
            job.work()
        except BaseException as error:
            job.error = error
        if gb_per_s is not None:
            free_at = start + job.nbytes / (gb_per_s * 1e9)
            time.sleep(max(0.0, free_at - time.perf_counter()))
        job.finish()


class StreamLane:
    """A CUDA stream of its own, forked and joined as a CUDA graph can capture it."""

    def __init__(self, device: torch.device) -> None:
        # Before the computation in the queue for multiprocessors: it takes few, and is waited for.
        self._stream = torch.cuda.Stream(device, priority=-1)

    def fork(self, work: Callable[[], object], nbytes: int = 0) -> Ticket:
        """See :class:`Lane`."""
        ready, done = torch.cuda.Event(), torch.cuda.Event()
        ready.record()
        self._stream.wait_event(ready)
        with torch.cuda.stream(self._stream):
            kept = work()
        done.record(self._stream)
        return _StreamTicket(done, kept)

    def close(self) -> None:
        """Nothing to release: a stream ends with its process."""


class _StreamTicket:
    def __init__(self, event: torch.cuda.Event, kept: object) -> None:
        self._event = event
        # Memory that the side stream uses may not go back to the allocator before.
        self._kept = kept

    @property
    def done(self) -> bool:
        return self._event.query()

    def wait(self) -> float:
        """Make the current stream wait; the host goes on."""
        torch.cuda.current_stream().wait_event(self._event)
        self._kept = None
        return 0.0


class LateLane:
    """Without a device: work runs as late as it may, when it is waited for."""

    def __init__(self) -> None:
        self._queue: list[_LateTicket] = []

    def fork(self, work: Callable[[], object], nbytes: int = 0) -> Ticket:
        """See :class:`Lane`."""
        ticket = _LateTicket(self._queue, work)
        self._queue.append(ticket)
        return ticket

    def close(self) -> None:
        """Run what nobody waited for."""
        if self._queue:
            self._queue[-1].wait()


class _LateTicket:
    def __init__(self, queue: list[_LateTicket], work: Callable[[], object]) -> None:
        self._queue = queue
        self._work = work

    @property
    def done(self) -> bool:
        return self not in self._queue

    def wait(self) -> float:
        """Run everything up to this work, as the order of a stream would have it."""
        while not self.done:
            self._queue.pop(0)._work()
        return 0.0
