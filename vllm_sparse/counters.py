# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Counters that kernels add to, read back now and then without waiting for the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor


class DeviceCounters:
    """A row of counters on the device.

    Args:
        names: What they count.
        device: Where kernels add to :attr:`values`.
        count: Receives names and amounts.
        every: Steps between two readings.
        captured: Graphs may replay steps, of whose work the host then reads nothing back.

    Attributes:
        values: int64 ``[len(names)]``.
        readable: The host may read them in every step: host and device share memory, so that it
            waits for nothing.
    """

    def __init__(
        self,
        names: Sequence[str],
        device: torch.device,
        count: Callable[..., None],
        every: int = 4,
        captured: bool = True,
    ) -> None:
        self.values = torch.zeros(len(names), dtype=torch.int64, device=device)
        self.readable = device.type == "cpu" and not captured
        self._names = names
        self._count = count
        self._every = every
        self._steps = 0
        self._copied = torch.zeros(len(names), dtype=torch.int64, pin_memory=device.type == "cuda")
        self._published = [0] * len(names)
        self._event = torch.cuda.Event() if device.type == "cuda" else None
        self._pending = False

    def poll(self) -> None:
        """Called between steps: publish what has arrived, unless :meth:`settle` publishes all."""
        if not self.readable:
            self.publish()

    def settle(self) -> None:
        """Called between steps: publish everything counted so far, where that waits for nothing."""
        if self.readable:
            self._pending = False
            self._report(self.values)

    def publish(self) -> None:
        """Called once per step: start a reading, or publish the one that has arrived."""
        if self._pending and (self._event is None or self._event.query()):
            self._pending = False
            self._report(self._copied)
        if self._steps % self._every == 0 and not self._pending:
            self._copied.copy_(self.values, non_blocking=True)
            if self._event is not None:
                self._event.record()
            self._pending = True
        self._steps += 1

    def _report(self, values: Tensor) -> None:
        for i, (name, value) in enumerate(zip(self._names, values.tolist(), strict=True)):
            if value > self._published[i]:
                self._count(name, value - self._published[i])
                self._published[i] = value
