# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Who else uses the machine while something is measured."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.harness import progress

if TYPE_CHECKING:
    from benchmarks.worker import Worker


class Neighbours:
    """How much of the machine processes other than the benchmark's use.

    Args:
        workers: The benchmark's workers; their processes and this one are not neighbours.
        patience_s: How long `wait` waits in all for a quiet machine.
    """

    QUIET_CORES = 0.15

    def __init__(self, workers: list[Worker], patience_s: float) -> None:
        self._groups = {os.getpgrp(), *(worker.group for worker in workers)}
        self._patience_s = patience_s
        self._announced = False

    @contextlib.contextmanager
    def observed(self, into: list[float]):
        """Appends the cores that neighbours used on average during the ``with`` block."""
        begin, ticks = time.perf_counter(), self._ticks()
        yield
        elapsed = (time.perf_counter() - begin) * os.sysconf("SC_CLK_TCK")
        into.append(round(max(0.0, self._ticks() - ticks) / elapsed, 3))

    def wait(self) -> None:
        """Returns when the neighbours are quiet, or when patience is used up."""
        while self._patience_s > 0:
            used: list[float] = []
            with self.observed(used):
                time.sleep(0.3)
            if used[0] < self.QUIET_CORES:
                return
            if not self._announced:
                progress(f"waiting for a quiet machine: others use {used[0]:.1f} cores")
                self._announced = True
            time.sleep(1.0)
            self._patience_s -= 1.3

    def _ticks(self) -> int:
        """Clock ticks that all cores spent on others so far, stolen time included."""
        fields = [int(value) for value in Path("/proc/stat").read_text().split("\n")[0].split()[1:]]
        user, nice, system, _idle, _iowait, irq, softirq, steal = fields[:8]
        busy = user + nice + system + irq + softirq + steal
        own = 0
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    stat = (entry / "stat").read_text().rpartition(")")[2].split()
                    if int(stat[2]) in self._groups:
                        own += int(stat[11]) + int(stat[12])
        return busy - own
