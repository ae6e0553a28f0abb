# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Plans of single tokens on a GPU, and prompts that end in one, without an engine."""

from __future__ import annotations

from collections import Counter
from functools import partial
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")
from support.devices import META, elsewhere, tensors_of, upload_to_meta
from support.policies import make_policy
from support.runner import PROMPT, batch, dummy_of_v1, table_of, take_up
from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadataBuilder

from vllm_sparse.backends import policy_gpu
from vllm_sparse.backends.policy import Planning
from vllm_sparse.backends.policy_gpu import PolicyGpuBuilder
from vllm_sparse.errors import UnsupportedError
from vllm_sparse.policies.quest import Quest
from vllm_sparse.policies.rocketkv import RocketKV
from vllm_sparse.policies.snapkv import SnapKV
from vllm_sparse.steps.split import StepPlanner


class Builder(PolicyGpuBuilder):
    """One whose kernel plans nothing, and whose layers note which blocks they compact."""

    def __init__(self, policy, drafts=0):
        planner = StepPlanner(policy)
        self.compacted = []
        sparse = SimpleNamespace(
            compacts_together=False,
            compact_parked=lambda cache, prompt: self.compacted.append(prompt),
        )
        layer = SimpleNamespace(impl=SimpleNamespace(sparse=sparse), kv_cache=torch.zeros(1))
        self.counts = Counter()
        self._planning = SimpleNamespace(
            count=self._count, policy=policy, layers=[layer], planner=planner
        )
        self._planning.split = partial(Planning.split, self._planning)
        self._planning.compact_begun = partial(Planning.compact_begun, self._planning)
        self._planner, self._rules = planner, planner.rules.on_device
        self._kernels = SimpleNamespace(plan_rows=self._plan)
        self._counters, self._uncounted = SimpleNamespace(values=[], publish=lambda: None), []
        self._read, self._window, self._per_block = 64, policy.window, 1
        self._table, self._max_rows, self._drafts = None, 8, drafts
        self.device, self.block_size = META, policy.shape.block_size
        self._drafted_for = self._drafting = False

    def _count(self, name, amount, reason=""):
        self.counts[name] += amount

    def _plan(self, *arguments, **_):
        arguments[5].append(1)
        self.planned = arguments[1:4]


@pytest.fixture
def table(monkeypatch):
    return table_of(monkeypatch, "a", "b", "c")


@pytest.fixture(autouse=True)
def _meta(monkeypatch):
    upload_to_meta(monkeypatch)


@pytest.mark.parametrize("drafts", [0, 3])
@pytest.mark.parametrize("kind", [RocketKV, Quest])
def test_single_tokens_are_planned_on_the_device(table, kind, drafts):
    builder = Builder(make_policy(kind), drafts)
    ends, counts = [340, PROMPT, 320], (1 + drafts, 1, 1)
    step = builder.build(0, batch(table, "abc", ends, counts))
    assert not elsewhere(step)
    assert sum(1 for _ in tensors_of(step)) == 4 + (drafts > 0)
    assert not builder.compacted
    builder.build(0, batch(table, "abc", [n + 1 + drafts for n in ends], (1 + drafts,) * 3))
    assert not elsewhere(builder.compacted)
    assert len(builder.compacted) == (kind is RocketKV)


def test_a_step_is_asked_once_whether_it_is_a_rehearsal(table, monkeypatch):
    """Which adds up prompt lengths where they are on the host."""
    asked, ask = [], policy_gpu.is_rehearsal
    monkeypatch.setattr(policy_gpu, "is_rehearsal", lambda x: asked.append(x) or ask(x))
    builder = Builder(make_policy())
    builder.build(0, batch(table, "abc", [340, PROMPT, 320], (1, 1, 1)))
    assert hasattr(builder, "planned")
    assert len(asked) == 1


class TwoSizes(SnapKV):
    """Of which no setting tells."""

    page_sizes = (4, 8)


def test_one_page_size_serves_all_requests_of_a_captured_graph():
    spec = SimpleNamespace(policy=make_policy(TwoSizes, kernels="triton"), backend="NEW")
    with pytest.raises(UnsupportedError, match=r"page_sizes=\[4, 8\]: on GPUs one page size"):
        Planning(spec, [], None, 16, None, False, None)


@pytest.mark.parametrize("others", [1, 3], ids=["uniform", "beside others"])
@pytest.mark.parametrize("runner", ["V1", "V2"])
def test_a_replay_with_tokens_of_prompt_and_output_is_no_step_of_drafts(
    table, monkeypatch, runner, others
):
    """A preempted request's last chunk: three tokens of the prompt and its first output."""
    monkeypatch.setattr(FlashAttentionMetadataBuilder, "build", lambda *given: given[2])
    builder, counts = Builder(make_policy(), drafts=3), (4, 4) if others == 1 else (4, 1)
    common = batch(table, "ab", [PROMPT + 1, 340], counts)
    builder._counters.values = torch.zeros(3, device=META)
    if runner == "V1":
        common.req_idx, common.rswa_prefix_lens = None, torch.full((2,), PROMPT)
    step = builder.build(0, common)
    assert [prompt.compacts for prompt in step.prompts] == [True]
    assert not hasattr(builder, "planned")


@pytest.mark.parametrize("fate", ["runs on", "ends", "comes back"])
@pytest.mark.parametrize("chunk", [1, 40], ids=["alone", "in a chunk"])
def test_a_prompt_is_compacted_by_the_first_step_behind_it(table, monkeypatch, fate, chunk):
    """If there is one: its blocks may be another's then, with a prefix that is being loaded."""
    monkeypatch.setattr(FlashAttentionMetadataBuilder, "build", lambda *given: given[2])
    builder = Builder(make_policy())
    builder.build(0, batch(table, "abc", [340, PROMPT, 320], (1, chunk, 1)))
    assert not builder.compacted
    if fate != "runs on":
        table.remove_request("b")
    if fate == "comes back":
        take_up(table, "b")
        builder.build(0, batch(table, "abc", [341, 40, 321], (1, 40, 1)))
    names, ends = ("ac", [342, 322]) if fate == "ends" else ("abc", [342, PROMPT + 1, 322])
    builder.build(0, batch(table, names, ends))
    assert [prompt.prompt_len for prompt in builder.compacted] == [PROMPT] * (fate != "ends")
    builder.build(0, batch(table, names, [n + 1 for n in ends]))
    assert len(builder.compacted) == builder.counts["prompts_compacted"] == (fate != "ends")


@pytest.mark.parametrize("counts", [(1, 1), (40, 1)], ids=["single", "mixed"])
@pytest.mark.parametrize(
    ("names", "served"),
    [
        (("_warmup_0_", "_v2_mixed_warmup_prefill_"), False),
        (("_warmup_0_", "cmpl-1"), True),
        (("cmpl-_warmup_0_", "cmpl-1"), True),
    ],
)
def test_requests_that_vllm_makes_itself_count_for_nothing(monkeypatch, names, served, counts):
    monkeypatch.setattr(FlashAttentionMetadataBuilder, "build", lambda *given: given[2])
    builder, table = Builder(make_policy()), table_of(monkeypatch, *names)
    builder.build(0, batch(table, names, [PROMPT, 320], counts))
    assert (builder.counts["requests"] == 1) == served
    assert bool(builder.counts) == served
    if counts == (1, 1):
        assert len(builder._counters.values) == served
        assert len(builder._uncounted) == (not served)


def test_schedules_of_one_step_do_not_overwrite_each_other(table, monkeypatch):
    """Where graphs are captured, FlashAttention 3's builder has one buffer for them."""
    buffer = torch.zeros(1, dtype=torch.int32)

    def build(self, _, common, fast_build=False):
        if not fast_build:
            buffer.fill_(common.num_reqs)
        return SimpleNamespace(requests=common.num_reqs, schedule=None if fast_build else buffer)

    monkeypatch.setattr(FlashAttentionMetadataBuilder, "build", build)
    common = batch(table, "abc", [340, 200, 100], (1, 40, 40))
    step = Builder(make_policy(Quest, skip_layers=2)).build(0, common)
    whole = step.pages.whole
    assert (step.dense.requests, whole.requests) == (2, 3)
    for metadata in (step.dense, whole):
        assert metadata.schedule is None or metadata.schedule.item() == metadata.requests


def test_model_runner_v1_gives_lengths_without_indices(table):
    builder, common = Builder(make_policy()), batch(table, "abc", [340, PROMPT + 1, 320])
    common.req_idx = None
    common.rswa_prefix_lens = torch.full((3,), PROMPT)
    builder.build(0, common)
    assert [prompt.prompt_len for prompt in builder.compacted] == [PROMPT]


@pytest.mark.parametrize("drafts", [0, 3])
def test_what_an_idle_rank_computes_touches_no_request(drafts):
    """Model Runner V1 fills it up with rows that its table happens to have."""
    builder = Builder(make_policy(), drafts)
    builder.device = torch.device("cpu")
    builder.build_for_cudagraph_capture(dummy_of_v1(2, 300))
    lengths, prompts, table = builder.planned
    assert lengths.tolist() == [1, 1]
    assert not prompts.any()
    assert not table.any()
    assert not builder.compacted
    assert not builder.counts
    assert not builder._counters.values
