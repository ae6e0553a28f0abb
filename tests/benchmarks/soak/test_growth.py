# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What counts as a leak."""

from __future__ import annotations

import pytest

from benchmarks.soak import growth
from benchmarks.soak.watch import Held

EARLY = {"worker": Held(40, 90, 800 << 20)}
LOOK = {"tensors": 200, "tensor_bytes": 10**7, "threads": ["MainThread"], "host_bytes": 5}


@pytest.mark.parametrize(
    ("late", "words"),
    [
        (Held(40, 90, EARLY["worker"].rss_bytes + growth.MOST_BYTES), []),
        (Held(39, 80, 1), []),
        (Held(41, 90, 1), ["40 threads became 41"]),
        (Held(40, 91, 1), ["90 open files became 91"]),
        (Held(40, 90, 2000 << 20), [f"{800 << 20} bytes became {2000 << 20}"]),
    ],
)
def test_processes(late, words):
    assert growth.of_processes(EARLY, {"worker": late}) == [f"worker: {part}" for part in words]


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({}, ""),
        ({"tensors": 205}, ""),
        ({"tensors": 300}, "tensors grew"),
        ({"tensor_bytes": 2 * 10**7}, "tensor_bytes grew"),
        ({"host_bytes": 4}, "host_bytes were 5, are 4"),
        ({"threads": ["MainThread", "sparda-copy"]}, "threads were"),
    ],
)
def test_the_worker(changed, word):
    faults = growth.of_worker(LOOK, {**LOOK, **changed})
    assert len(faults) == bool(word)
    assert all(word in fault for fault in faults)
