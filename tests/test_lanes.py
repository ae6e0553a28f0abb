# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Work beside a device's computation, and counters that live there."""

from __future__ import annotations

import pytest
import torch
from vllm_sparse.kernels.reference import sparda_steps

from vllm_sparse.prefetch.lanes import LaneCopyEngine, LateLane

CPU = torch.device("cpu")


def test_late_work_runs_in_order_and_only_when_it_is_waited_for():
    lane, done = LateLane(), []
    tickets = [lane.fork(lambda name=name: done.append(name)) for name in "abc"]
    assert not done
    assert not any(ticket.done for ticket in tickets)
    assert tickets[1].wait() == 0.0
    assert done == ["a", "b"]  # a stream would have run what comes before
    assert [ticket.done for ticket in tickets] == [True, True, False]
    tickets[0].wait()
    tickets[2].wait()
    assert done == ["a", "b", "c"]


def test_the_copy_engine_of_a_lane_copies_what_it_was_given():
    generator = torch.Generator().manual_seed(0)
    source = torch.randn(7, 4, 6, generator=generator)
    target = torch.zeros(5, 4, 6)
    engine = LaneCopyEngine(LateLane(), sparda_steps.copy_pieces)
    ticket = engine.submit(target, torch.tensor([4, 1]), source, torch.tensor([0, 6]))
    assert not target.any()
    ticket.wait()
    assert torch.equal(target[[4, 1]], source[[0, 6]])
    assert not target[[0, 2, 3]].any()
    none = torch.empty(0, dtype=torch.int64)
    engine.submit(target, none, source, none).wait()
    engine.close()


@pytest.mark.vllm
def test_device_counters_are_read_now_and_then():
    pytest.importorskip("vllm")
    from vllm_sparse.steps.counters import DeviceCounters

    published: dict[str, int] = {}

    def count(name, amount):
        assert amount > 0
        published[name] = published.get(name, 0) + amount

    counters = DeviceCounters(("hits", "misses"), CPU, count, every=3)
    for _ in range(7):  # readings begin in steps 0, 3 and 6, and are published one step later
        counters.publish()
        counters.values += torch.tensor([2, 0])
    assert published == {"hits": 6}
    counters.publish()
    assert published == {"hits": 12}
    assert "misses" not in published
