# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Counters that live on a device."""

from __future__ import annotations

import torch

from vllm_sparse.counters import DeviceCounters


def published(every: int = 3) -> tuple[DeviceCounters, dict[str, int]]:
    """Counters on the CPU, and what they have published."""
    found: dict[str, int] = {}

    def count(name, amount):
        assert amount > 0
        found[name] = found.get(name, 0) + amount

    return DeviceCounters(("hits", "misses"), torch.device("cpu"), count, every), found


def test_device_counters_are_read_now_and_then():
    counters, found = published()
    for _ in range(7):  # readings begin in steps 0, 3 and 6, and are published one step later
        counters.publish()
        counters.values += torch.tensor([2, 0])
    assert found == {"hits": 6}
    counters.publish()
    assert found == {"hits": 12}
    assert "misses" not in found


def test_flushing_publishes_everything_once():
    counters, found = published()
    counters.publish()
    counters.values += torch.tensor([2, 1])
    counters.flush()
    counters.flush()
    counters.publish()
    assert found == {"hits": 2, "misses": 1}
