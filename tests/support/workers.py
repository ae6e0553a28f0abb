# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What a made-up engine of a benchmark has in common with others: nothing to start or to stop."""

from __future__ import annotations

import contextlib


class IdleWorker:
    """Stands in for ``benchmarks.worker.Worker``; subclasses answer calls."""

    def __init__(self, arm, arguments, **_):
        self.arm, self.group, self.start_seconds = arm, 0, 0.0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def pause(self):
        pass

    def running(self):
        return contextlib.nullcontext(self)
