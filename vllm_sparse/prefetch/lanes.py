# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Work beside the computation on a device, forked and joined as a CUDA graph can capture it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from vllm_sparse.upload import upload

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm_sparse.prefetch.engine import Ticket


class Lane(Protocol):
    """Runs work in the order of its forks, beside the computation."""

    def fork(self, work: Callable[[], object]) -> Ticket:
        """Start work that sees everything computed so far.

        Args:
            work: Launches kernels; what it returns is kept until the ticket is waited for.

        Returns:
            What to wait for before anything that the work reads or writes is touched again.
        """
        ...


class StreamLane:
    """A CUDA stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def fork(self, work: Callable[[], object]) -> Ticket:
        """See :class:`Lane`."""
        ready, done = torch.cuda.Event(), torch.cuda.Event()
        ready.record()
        self._stream.wait_event(ready)
        with torch.cuda.stream(self._stream):
            kept = work()
        done.record(self._stream)
        return _StreamTicket(done, kept)


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

    def fork(self, work: Callable[[], object]) -> Ticket:
        """See :class:`Lane`."""
        ticket = _LateTicket(self._queue, work)
        self._queue.append(ticket)
        return ticket


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


class LaneCopyEngine:
    """The :class:`.engine.CopyEngine` of a GPU.

    Args:
        lane: Where copies run.
        copy: Copies as many pieces as a tensor says; see ``kernels.reference.sparda_steps``.
    """

    def __init__(self, lane: Lane, copy: Callable[..., None]) -> None:
        self._lane = lane
        self._copy = copy

    def index(self, values: Tensor, device: torch.device) -> Tensor:
        """See :class:`.engine.CopyEngine`."""
        return upload(values, device, torch.int32)

    def submit(
        self, target: Tensor, target_index: Tensor, source: Tensor, source_index: Tensor
    ) -> Ticket:
        """See :class:`.engine.CopyEngine`."""
        count = torch.full((1,), len(target_index), dtype=torch.int32, device=target.device)

        def work() -> object:
            self._copy(target, target_index, source, source_index, count)
            return target_index, source_index, count

        return self._lane.fork(work)

    def close(self) -> None:
        """Nothing to release: a stream ends with its process."""
