# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Lanes for tests: one that works when told, one behind a gate, and a pager to copy between."""

from __future__ import annotations

import sys
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import torch

from vllm_sparse.kv.host.geometry import Geometry
from vllm_sparse.kv.host.pager import Pager
from vllm_sparse.prefetch import lane as lane_module
from vllm_sparse.prefetch.lane import ThreadLane


def copy_threads() -> set[threading.Thread]:
    """The threads of all lanes."""
    return {thread for thread in threading.enumerate() if thread.name == "sparda-copy"}


@contextmanager
def gated_lane():
    """A thread that works only when a gate is open, and the gate."""
    gate = threading.Event()

    class Gated(ThreadLane):
        def fork(self, work, nbytes=0):
            return super().fork(lambda: (gate.wait(120), work()), nbytes)

    lane = Gated()
    yield lane, gate
    gate.set()
    lane.close()


def open_when_waited_for(gate: threading.Event, monkeypatch, seconds: float) -> None:
    """Open a gate so long after a ticket's wait has looked at the clock, not before it has."""
    timer = threading.Timer(seconds, gate.set)

    def now() -> float:
        found = time.perf_counter()
        if sys._getframe(1).f_code.co_name == "wait" and timer.ident is None:
            timer.start()
        return found

    monkeypatch.setattr(lane_module, "time", SimpleNamespace(perf_counter=now, sleep=time.sleep))


class ManualLane:
    """Works when told; remembers what was asked."""

    def __init__(self) -> None:
        self.tickets: list[ManualLane.Ticket] = []

    class Ticket:
        def __init__(self, work, nbytes) -> None:
            self._work = work
            self.nbytes = nbytes
            self.done = False
            self.waits = 0

        def work(self) -> None:
            if not self.done:
                self._work()
                self.done = True

        def wait(self) -> float:
            self.waits += 1
            waited = 0.0 if self.done else 0.25
            self.work()
            return waited

    def fork(self, work, nbytes=0):
        self.tickets.append(self.Ticket(work, nbytes))
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
    """Host blocks that are all different, frames full of NaN."""
    frames = frames if isinstance(frames, tuple) else (frames,) * layers
    pager = Pager(Geometry(layers, blocks, heads, size, dim, 4, frames), torch.float32, poison=True)
    pager.host.copy_(torch.arange(pager.host.numel()).view(pager.host.shape))
    for layer in pager.layers:
        if layer.resident:
            layer.slab.copy_(layer.pieces)
    return pager


def counting(counts):
    """A counter for names and amounts."""

    def count(name: str, amount: float) -> None:
        counts[name] += amount

    return count
