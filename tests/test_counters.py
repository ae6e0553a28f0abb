# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Counters that live on a device."""

from __future__ import annotations

import pytest
import torch

from vllm_sparse.counters import DeviceCounters


def published(**options) -> tuple[DeviceCounters, dict[str, int]]:
    """Counters on the CPU, and what they have published."""
    found: dict[str, int] = {}

    def count(name, amount):
        assert amount > 0
        found[name] = found.get(name, 0) + amount

    return DeviceCounters(("hits", "misses"), torch.device("cpu"), count, every=3, **options), found


def test_device_counters_are_read_now_and_then():
    counters, found = published()
    for _ in range(7):  # readings begin in steps 0, 3 and 6, and are published one step later
        counters.publish()
        counters.values += torch.tensor([2, 0])
    assert found == {"hits": 6}
    counters.publish()
    assert found == {"hits": 12}
    assert "misses" not in found


@pytest.mark.parametrize("captured", [False, True])
def test_what_the_host_may_read_is_published_at_once(captured):
    """Where graphs may replay steps it may not, and two steps later nothing has been read."""
    counters, found = published(captured=captured)
    assert counters.readable != captured
    counters.poll()
    counters.values += torch.tensor([2, 1])
    for _ in range(2):
        counters.settle()
        counters.poll()
    assert found == ({} if captured else {"hits": 2, "misses": 1})
