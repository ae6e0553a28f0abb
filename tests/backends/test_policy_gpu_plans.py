# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Plans of single tokens on a GPU, and prompts that end in one, without an engine."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")
from support.devices import META, elsewhere, tensors_of, upload_to_meta
from support.policies import make_policy
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.worker.gpu.states import RequestState

from vllm_sparse.backends import prompts
from vllm_sparse.backends.policy_gpu import PolicyGpuBuilder
from vllm_sparse.policies.quest import Quest
from vllm_sparse.policies.rocketkv import RocketKV
from vllm_sparse.steps.split import StepPlanner

PROMPT = 300


class Builder(PolicyGpuBuilder):
    """One whose kernel plans nothing, and whose layers note which blocks they compact."""

    def __init__(self, policy, drafts=0):
        planner = StepPlanner(policy)
        self.compacted = []
        sparse = SimpleNamespace(
            compact_parked=lambda cache, prompt: self.compacted.append(prompt.prompt_len)
        )
        layer = SimpleNamespace(impl=SimpleNamespace(sparse=sparse), kv_cache=torch.zeros(1))
        self._planning = SimpleNamespace(count=lambda *_: None, policy=policy, layers=[layer])
        self._planner, self._rules = planner, planner.rules.on_device
        self._kernels = SimpleNamespace(plan_rows=lambda *_, **__: None)
        self._counters = SimpleNamespace(values=None, publish=lambda: None)
        self._read, self._window, self._per_block = 64, policy.window, 1
        self._table, self._late, self._max_rows, self._drafts = None, [], 8, drafts
        self.device, self.block_size = META, policy.shape.block_size


@pytest.fixture
def table(monkeypatch):
    """The runner's table of three requests, at indices 3, 2 and 1."""
    for name in ("add_request", "remove_request"):
        monkeypatch.setattr(RequestState, name, getattr(RequestState, name))
    monkeypatch.setattr(prompts, "_requests", None)
    prompts.watch_requests()
    table = RequestState.__new__(RequestState)
    table.max_num_reqs, table.free_indices = 4, [0, 1, 2, 3]
    table.req_id_to_index, table.index_to_req_id = {}, {}
    table.max_seq_len = np.zeros(4, dtype=np.int32)
    table.num_computed_prefill_tokens = table.num_computed_tokens_np = table.max_seq_len
    table.prompt_len = table.prefill_len = SimpleNamespace(np=np.zeros(4, dtype=np.int32))
    ignored = SimpleNamespace(stage_write=lambda *_: None, stage_write_elem=lambda *_: None)
    table.total_len = table.all_token_ids = table.num_computed_tokens = ignored
    table.draft_tokens = torch.zeros(4, 0)
    for name in "abc":
        take_up(table, name)
    return table


def take_up(table, name):
    table.add_request(
        req_id=name, prompt_len=PROMPT, all_token_ids=[0] * PROMPT, num_computed_tokens=0,
        max_tokens=1,
    )  # fmt: skip


def batch(table, ends, counts=(1, 1, 1), names="abc"):
    """Requests of the table that have so many tokens after the step."""
    starts = torch.tensor([0, *counts]).cumsum(0).int()
    index, lens = [table.req_id_to_index[name] for name in names], torch.tensor(ends).int()
    return CommonAttentionMetadata(
        query_start_loc=starts.to(META), query_start_loc_cpu=starts, seq_lens=lens.to(META),
        num_reqs=len(ends), num_actual_tokens=sum(counts), max_query_len=max(counts),
        max_seq_len=max(ends), seq_lens_cpu_upper_bound=lens, req_idx=np.array(index),
        block_table_tensor=torch.zeros(len(ends), 40, dtype=torch.int32, device=META),
        slot_mapping=torch.zeros(sum(counts), dtype=torch.int64, device=META),
        is_prefilling=lens <= PROMPT,
        rswa_prefix_lens=torch.full((len(ends),), PROMPT, dtype=torch.int32, device=META),
    )  # fmt: skip


@pytest.fixture(autouse=True)
def _meta(monkeypatch):
    upload_to_meta(monkeypatch)


@pytest.mark.parametrize("drafts", [0, 3])
@pytest.mark.parametrize("kind", [RocketKV, Quest])
def test_single_tokens_are_planned_on_the_device(table, kind, drafts):
    builder = Builder(make_policy(kind), drafts)
    ends, counts = [340, PROMPT, 320], (1 + drafts, 1, 1)
    step = builder.build(0, batch(table, ends, counts))
    assert not elsewhere(step)
    late = [prompt for prompt, _ in builder._late]
    assert not elsewhere(late)
    assert sum(1 for _ in tensors_of(step)) == 4 + (drafts > 0)
    assert len(late) == (kind is RocketKV)


@pytest.mark.parametrize("fate", ["runs on", "ends", "is replaced", "is preempted and back"])
def test_a_prompt_that_ends_alone_is_compacted_unless_its_request_has_left(table, fate):
    """Its blocks may be another's then, with a prefix that is just being loaded."""
    builder = Builder(make_policy())
    builder.build(0, batch(table, [340, PROMPT, 320]))
    assert not builder.compacted
    if fate != "runs on":
        table.remove_request("b")
    if fate == "is replaced":
        take_up(table, "d")
    elif fate == "is preempted and back":
        take_up(table, "b")
    builder.build(0, batch(table, [341, 321], (1, 1), "ac"))
    assert builder.compacted == [PROMPT] * (fate == "runs on")
    builder.build(0, batch(table, [342, 322], (1, 1), "ac"))
    assert len(builder.compacted) == (fate == "runs on")


def test_where_nobody_tells_who_left_a_prompt_is_compacted(table, monkeypatch):
    """Model Runner V1 gives no indices."""
    builder, common = Builder(make_policy()), batch(table, [340, PROMPT, 320])
    common.req_idx = None
    common.rswa_prefix_lens = torch.full((3,), PROMPT)
    builder.build(0, common)
    table.remove_request("b")
    builder.build(0, common)
    assert builder.compacted == [PROMPT]
