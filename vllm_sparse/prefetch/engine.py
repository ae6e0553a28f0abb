# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Copies from host memory to the device that run beside the computation."""

from __future__ import annotations

import os
import queue
import threading
import time
import weakref
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import Tensor


class Ticket(Protocol):
    """A submitted copy."""

    @property
    def done(self) -> bool:
        """Whether it has finished."""
        ...

    def wait(self) -> float:
        """Let the computation wait for the copy.

        Returns:
            Seconds that the caller stood still.

        Raises:
            RuntimeError: The copy failed.
        """
        ...


class CopyEngine(Protocol):
    """Executes copies in the order of submission."""

    def index(self, values: Tensor, device: torch.device) -> Tensor:
        """Returns indices as :meth:`submit` takes them, which may serve many copies.

        Args:
            values: int64 ``[count]``, on the host.
            device: Where the target is.
        """
        ...

    def submit(
        self, target: Tensor, target_index: Tensor, source: Tensor, source_index: Tensor
    ) -> Ticket:
        """Start copying ``source[source_index]`` to ``target[target_index]``.

        Args:
            target: Contiguous ``[n, ...]``.
            target_index: See :meth:`index`, ``[count]``.
            source: Contiguous ``[m, ...]``.
            source_index: Likewise.

        Returns:
            What to wait for before reading the target.
        """
        ...

    def close(self) -> None:
        """Finish what was submitted and release threads or streams."""
        ...


class _Job:
    def __init__(self, *arguments: Tensor) -> None:
        self.arguments = arguments
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


class ThreadCopyEngine:
    """A worker thread; on a CPU, host and device are two pools in one memory.

    Args:
        copy: Copies pieces; must release Python's lock to overlap.
        gb_per_s: Rate of the link in 1e9 bytes per second; ``None`` copies as fast as memory does.
    """

    def __init__(self, copy: Callable[..., None], gb_per_s: float | None = None) -> None:
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        # The thread must not keep the engine alive, or nobody could ever close it.
        self._thread = threading.Thread(
            target=_work, args=(self._jobs, copy, gb_per_s), name="sparda-copy", daemon=True
        )
        self._thread.start()
        # Also runs at exit: a thread that Python kills inside C++ would abort the process.
        self._closer = weakref.finalize(self, _close, self._jobs, self._thread)

    def index(self, values: Tensor, device: torch.device) -> Tensor:
        """See :class:`CopyEngine`."""
        return values

    def submit(
        self, target: Tensor, target_index: Tensor, source: Tensor, source_index: Tensor
    ) -> Ticket:
        """See :class:`CopyEngine`."""
        job = _Job(target, target_index, source, source_index)
        if not len(target_index):
            job.finish()
        elif not self._closer.alive:
            raise RuntimeError("the copy engine is closed")
        else:
            self._jobs.put(job)
        return job

    def close(self) -> None:
        """Finish what was submitted and end the thread."""
        self._closer()


def _close(jobs: queue.SimpleQueue[_Job | None], thread: threading.Thread) -> None:
    jobs.put(None)
    if thread is not threading.current_thread():  # where a garbage collection may run this
        thread.join()


def _work(
    jobs: queue.SimpleQueue[_Job | None], copy: Callable[..., None], gb_per_s: float | None
) -> None:
    # vLLM pins its threads; a copy on the core that computes would overlap with nothing.
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
    free_at = 0.0
    while (job := jobs.get()) is not None:
        # A queued copy starts when the link is free, however late this thread wakes up.
        start = max(job.submitted, free_at)
        try:
            copy(*job.arguments)
        except BaseException as error:
            job.error = error
        if gb_per_s is not None:
            target, index = job.arguments[0], job.arguments[1]
            free_at = start + len(index) * target[0].nbytes / (gb_per_s * 1e9)
            time.sleep(max(0.0, free_at - time.perf_counter()))
        job.finish()
