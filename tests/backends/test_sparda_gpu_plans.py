# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""SPARDA's plans on a GPU as a whole, without an engine."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")
from support.devices import META, elsewhere, upload_to_meta
from support.runner import PROMPT, batch, dummy_of_v1, table_of, take_up

from vllm_sparse import metrics
from vllm_sparse.backends import sparda_gpu
from vllm_sparse.backends.prompts import Newcomers
from vllm_sparse.backends.sparda_gpu import SpardaGpuBuilder
from vllm_sparse.control import DENSE
from vllm_sparse.policies.sparda import SpardaSettings
from vllm_sparse.steps.host import SpardaPlanner
from vllm_sparse.steps.host_rows import RowPlanner

SETTINGS = SpardaSettings(selector="previous", block_size=16, kernel_stride=4, top_k=5, dense_len=0,
                          local_blocks=1)  # fmt: skip


class Builder(SpardaGpuBuilder):
    """One without layers, whose counts can be seen."""

    def __init__(self, counts, device=META):
        self.polls = 0
        self.runtime = SimpleNamespace(poll=self._poll)
        self.device, self._steps, self._bytes_per_token = device, 1, 7
        self.planner = SpardaPlanner(SETTINGS, 50, counts.add, split_fresh=True)
        self._rehearsal = SpardaPlanner(SETTINGS, 50, lambda *_: None, split_fresh=True)
        self._rows = RowPlanner(SETTINGS, 8, device, captured=True)
        self._newcomers = Newcomers(True)
        self._newcomers.arrived()  # looking for who shares a block reads the table

    def _poll(self):
        self.polls += 1


class Counts:
    """What is counted."""

    def __init__(self):
        self.found = Counter()

    def add(self, name, amount, reason=""):
        self.found[name] += amount


@pytest.mark.parametrize("counts", [(1, 1), (40, 1)], ids=["single", "mixed"])
@pytest.mark.parametrize(
    ("names", "served"), [(("_warmup_0_", "_warmup_1_"), False), (("a", "_warmup_0_"), True)]
)
def test_a_plan_is_on_the_device_and_counts_who_is_served(monkeypatch, names, served, counts):
    upload_to_meta(monkeypatch)
    found = Counts()
    monkeypatch.setattr(metrics, "counters", lambda: found)
    table = table_of(monkeypatch, *names)
    builder = Builder(found)
    step = builder.build(0, batch(table, names, [PROMPT, 320], counts))
    assert not elsewhere(step)
    assert builder.polls == 1
    expected = {
        "requests": 1, "decode_rows": 1, "visible_blocks": 20, "selected_blocks": 5,
        "device_to_host_bytes": 7 * sum(counts),
    }  # fmt: skip
    assert found.found == (expected if served else {})


def test_a_name_of_vllm_s_own_changes_the_counts_only(monkeypatch):
    """A client may name its request as it likes, and have it read everything."""
    upload_to_meta(monkeypatch)
    monkeypatch.setattr(metrics, "counters", Counts)
    table = table_of(monkeypatch, "_warmup_a", "_warmup_b")
    table._vllm_sparse = np.full(4, DENSE, dtype=np.int32)
    builder, planned = Builder(Counts()), []
    step = SimpleNamespace(to=lambda device: None)
    for planner in (builder.planner, builder._rehearsal):
        monkeypatch.setattr(planner, "plan", lambda *given: planned.append(given) or step)
    take_up(table, "_warmup_c")
    builder.build(0, batch(table, ("_warmup_a", "_warmup_b"), [PROMPT, PROMPT], [40, 40]))
    *_, new, dense, _ = planned[0]
    assert new
    assert dense.tolist() == [True, True]


@pytest.mark.parametrize("length", [1, 300])
def test_what_an_idle_rank_computes_touches_no_request(monkeypatch, length):
    """Model Runner V1 fills it up with rows of its table; their blocks may be in the prefix cache.

    While it measures what graphs take, it lets them be long.
    """
    found = Counts()
    monkeypatch.setattr(metrics, "counters", lambda: found)
    builder = Builder(found, torch.device("cpu"))
    live = dummy_of_v1(2, length)
    step = builder.build_for_cudagraph_capture(live)
    assert step.slots.tolist() == [0, 0], "vLLM's null block"
    assert not step.decode.table.any()
    assert step.decode.framed.tolist() == [0, 0]
    assert not found.found
    assert live.block_table_tensor.all(), "what the runner goes on with"


def test_a_run_before_there_are_requests_counts_for_nothing(monkeypatch):
    """As Model Runner V1 makes it before it captures: nobody has a prompt."""
    found = Counts()
    monkeypatch.setattr(metrics, "counters", lambda: found)
    common = dummy_of_v1(2, 1)
    common.rswa_prefix_lens = torch.zeros(2, dtype=torch.int32)
    Builder(found, torch.device("cpu")).build(0, common)
    assert not found.found


def test_pinning_is_told_of_before_it_begins(monkeypatch):
    """It faults in hundreds of gigabytes on one thread."""
    told: list[str] = []
    monkeypatch.setattr(sparda_gpu.logger, "info", lambda text, *values: told.append(text % values))
    monkeypatch.setattr(sparda_gpu, "pin_tensor", lambda _: told.append("pinned"))
    monkeypatch.setattr(sparda_gpu, "get_accelerator_view_from_cpu_tensor", lambda host: host)
    sparda_gpu._pinned_view([], torch.empty(96 << 30, dtype=torch.uint8, device=META))
    sparda_gpu._pinned_view([], torch.empty(1 << 20, dtype=torch.uint8, device=META))
    assert ["Pinning 96.0 GiB" in told[0], *told[1:]] == [True, "pinned", "pinned"]
