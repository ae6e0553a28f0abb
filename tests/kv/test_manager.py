# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The scheduler's block accounting under a policy that moves tokens and one that does not."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from support.policies import make_policy
from support.scheduler import Machine, prompts

from vllm_sparse.metrics import counters
from vllm_sparse.policies.protocol import Retention
from vllm_sparse.policies.rocketkv import RocketKV
from vllm_sparse.policies.sparda import SpardaSettings
from vllm_sparse.policies.streamingllm import StreamingLLM


@pytest.mark.vllm
class TestManager:
    """The real manager on vLLM's real block pool, driven by random requests."""

    def test_random_lives(self):
        pytest.importorskip("vllm")
        PoolMachine.TestCase.settings = settings(
            max_examples=25, stateful_step_count=60, deadline=None
        )
        PoolMachine.TestCase().runTest()

    @pytest.mark.parametrize("keeps", [True, False])
    def test_a_resumed_request_hits_no_more_than_a_new_one(self, keeps):
        """Its lookup covers prompt and output, so its length does not tell the prompt's.

        Another request, whose longer prompt begins with both, has published blocks that lie in the
        window, or the tail, of the preempted one.
        """
        pytest.importorskip("vllm")
        machine = PoolMachine(keep_prefixes=keeps)
        prompt = [1] * 400
        short = machine.request(prompt)
        machine.prefill(short)
        for _ in range(100):
            short.append_output_token_ids(7)
        machine.running.pop(short.request_id)
        machine.manager.free(short)
        short.num_computed_tokens = 0

        long = machine.request([*short.all_token_ids, *[9] * 700])
        machine.prefill(long)
        machine.finish_all()
        limit = machine.limit(len(prompt))
        published = machine.policy.retention(long.num_prompt_tokens).dropped_blocks * 16
        assert published > limit, "otherwise there is nothing to hit wrongly"
        assert machine.limit(short.num_tokens) > limit
        _, hit, *_ = machine.manager.get_computed_blocks(short)
        assert hit == limit
        machine.prefill(short)

    def test_a_dense_request_keeps_and_shares_everything(self):
        """With a sparse one before and after it, each of which hits as much as it ever does."""
        pytest.importorskip("vllm")
        machine, hits = PoolMachine(), []
        for sparse in (True, False, True):
            request = machine.request([1] * 400, {"vllm_sparse.sparse": sparse})
            hits.append(machine.manager.get_computed_blocks(request)[1])
            machine.prefill(request)
            for _ in range(40):
                request.append_output_token_ids(7)
                assert machine._schedule(request, 1) is not None
                machine._compute(request, 1)
            if not sparse:
                blocks = machine._blocks(request)
                assert not any(block.is_null for block in blocks)
                # The last token's keys and values are not there yet.
                assert [b.block_hash is not None for b in blocks] == [True] * 27 + [False]
            machine.finish_all()
        assert hits == [0, 399 // 16 * 16, machine.limit(400)]
        long = machine.request([*[1] * 400, *[7] * 40], {"vllm_sparse.sparse": False})
        assert machine.manager.get_computed_blocks(long)[1] == 27 * 16

    @pytest.mark.parametrize("keeps", [True, False])
    def test_a_hit_beside_a_drafters_layers_ends_where_others_do(self, keeps):
        """vLLM drops a block of it, which may be one that is not taken anyway."""
        pytest.importorskip("vllm")
        machine = PoolMachine(eagle=True, keep_prefixes=keeps)
        long = machine.request([1] * 700)
        machine.prefill(long)
        machine.finish_all()
        _, hit, _ = machine.manager.get_computed_blocks(machine.request([1] * 400))
        assert hit == machine.limit(400)

    @pytest.mark.parametrize("sparda", [False, True])
    @pytest.mark.parametrize(("preempted", "hit"), [("this step", 64), ("the next", 128)])
    def test_what_a_step_planned_for_whom_it_preempts_is_published_no_more(
        self, sparda, preempted, hit
    ):
        """Nobody computes it; what was planned before is computed."""
        pytest.importorskip("vllm")
        machine = PoolMachine(sparda=sparda)
        request = machine.request([1] * 400)
        machine._admit(request)
        assert machine._schedule(request, 64) is not None
        if preempted == "the next":
            machine.manager.new_step_starts()
        machine.manager.free(request)
        machine.running.clear()
        assert machine.manager.get_computed_blocks(machine.request([1] * 400))[1] == hit

    def test_dropped_blocks_are_freed_once_the_step_after_the_prompt_is_processed(self):
        """That step may begin with compaction, which reads them."""
        pytest.importorskip("vllm")
        machine = PoolMachine()
        request = machine.request([1] * 400)
        machine.prefill(request)
        dropped = machine.policy.retention(400).dropped_blocks
        assert dropped
        for held in (dropped, 0):
            request.append_output_token_ids(7)
            assert machine._schedule(request, 1) is not None
            blocks = machine._blocks(request)[:dropped]
            assert sum(not block.is_null for block in blocks) == held
            machine._compute(request, 1)


@pytest.mark.vllm
def test_what_leaves_a_window_is_freed_block_by_block(llama):
    """While outputs move it along; neither a block too few nor one that is still read."""
    machine = Machine(llama, blocks=60, kind=StreamingLLM, settings={"sinks": 20})
    request = machine.add(prompts(1)[0], new_tokens=200)
    found = []
    while not request.is_finished():
        machine.step()
        computed = request.num_computed_tokens - 1  # when blocks were freed last
        row = machine.manager.req_to_blocks.get(request.request_id, ())
        gone = [index for index, block in enumerate(row) if block.is_null]
        if row and computed > request.num_prompt_tokens:
            assert gone == list(range(*machine.policy.freed_blocks(400, computed)))
            found.append(len(gone))
    assert found[-1] > found[0] + 10
    assert machine.free_blocks() == 59


@pytest.mark.vllm
class TestBesideOtherGroups:
    """A pool that layers of other kinds share."""

    def test_another_groups_hit_does_not_hide_the_prompts_length(self):
        """Full attention that is looked up first shrinks what ours is asked for.

        Lengths are not kept in step with limits: of 208 tokens 48 are shared, of 220 only 32.
        """
        pytest.importorskip("vllm")
        machine = PoolMachine(beside="full")
        limit = machine.policy.publishable_tokens
        assert limit(209) > limit(220)
        machine.prefill(machine.request([1] * 700))
        for length in range(150, 320):
            _, hit, *_ = machine.manager.get_computed_blocks(machine.request([1] * length))
            assert hit <= min(limit(length) or length, length - 1), length
            assert hit >= (limit(length) or 32) - 32, length

    def test_another_turn_hits_beside_window_layers(self):
        """These keep what a hit at our limit needs, not only at the prompt's end behind it."""
        pytest.importorskip("vllm")
        machine, limits = PoolMachine(beside="window"), []
        for turn, length in enumerate((500, 900, 1300)):
            request = machine.request([1] * length)
            _, hit, _ = machine.manager.get_computed_blocks(request)
            assert hit == (limits[-1] if turn else 0)
            limits.append(machine.policy.publishable_tokens(length))
            machine.prefill(request)
            machine.finish_all()

    def test_a_limit_in_the_first_chunk_is_counted(self):
        """It comes too late for window layers, which are asked first."""
        pytest.importorskip("vllm")
        from vllm_sparse import metrics

        def missed(beside, whole):
            machine = PoolMachine(beside=beside)
            before = metrics.counters().value("prefix_limits_missed")
            request = machine.request([1] * 500)
            if whole:
                machine._schedule(request, 500)
            else:
                machine.prefill(request)
            return metrics.counters().value("prefix_limits_missed") - before

        assert missed("window", whole=True) == 1
        assert missed("window", whole=False) == missed("", whole=True) == 0

    def test_a_prefix_that_prompts_share_stays_pinned_beside_window_layers(self):
        """vLLM keeps what a junction needs once it has been seen; ours come after it."""
        pytest.importorskip("vllm")
        machine, shared, hits = PoolMachine(beside="window"), [1] * 256, []
        for own in range(3):
            request = machine.request([*shared, *[2 + own] * 600])
            _, hit, _ = machine.manager.get_computed_blocks(request)
            hits.append(hit)
            machine.prefill(request)
            machine.finish_all()
        assert hits == [0, 0, 256]


class PoolMachine(RuleBasedStateMachine):
    """Requests are admitted, computed in chunks, preempted, resumed, finished; blocks are checked.

    ``content`` mirrors what a worker has written: tail blocks are overwritten by the step behind
    the prompt, so a block that another request may still read must never be one.
    """

    def __init__(self, beside="", eagle=False, sparda=False, **settings):
        super().__init__()
        import torch
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_manager import KVCacheManager
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.kv_cache_interface import (
            FullAttentionSpec,
            KVCacheConfig,
            KVCacheGroupSpec,
            SlidingWindowSpec,
        )

        from vllm_sparse.kv.spec import PolicySpec, SpardaSpec

        init_none_hash(sha256)
        self.policy = make_policy(**settings)
        layer = {"block_size": 16, "num_kv_heads": 2, "head_size": 16, "dtype": torch.float32}
        stock = FullAttentionSpec(**layer)
        others = {"full": stock, "window": SlidingWindowSpec(sliding_window=40, **layer)}
        spec = PolicySpec.wrap(stock, self.policy, beside_others=bool(beside))
        if sparda:
            spec = SpardaSpec.wrap(stock, SpardaSettings(selector="query", local_blocks=2, top_k=8))
        groups = [KVCacheGroupSpec(["ours"], spec)]
        if beside:
            groups.insert(0, KVCacheGroupSpec(["other"], others[beside]))
        self.group = len(groups) - 1
        config = KVCacheConfig(
            num_blocks=400 if beside else 80,
            kv_cache_tensors=[],
            kv_cache_groups=groups,
            prefix_cache_retention_interval=0 if beside == "window" else None,
        )
        self.manager = KVCacheManager(
            config,
            max_model_len=2048,
            scheduler_block_size=16,
            hash_block_size=16,
            enable_caching=True,
            use_eagle=eagle,
        )
        self.hasher = get_request_block_hasher(16, sha256)
        self.pool = self.manager.block_pool
        self.running: dict[str, object] = {}
        self.preempted: list[object] = []
        self.saved_before = counters().value("blocks_saved")
        self.content: dict[int, tuple] = {}  # block id -> what the worker wrote there
        self.serial = 0

    def request(self, tokens, extra_args=None):
        from vllm import SamplingParams
        from vllm.v1.request import Request

        from vllm_sparse.kv.requests import note_request

        self.serial += 1
        request = Request(
            request_id=str(self.serial),
            prompt_token_ids=tokens,
            sampling_params=SamplingParams(max_tokens=500, extra_args=extra_args),
            pooling_params=None,
            block_hasher=self.hasher,
        )
        note_request(self.pool, request)
        return request

    def prefill(self, request):
        assert self._admit(request)
        while request.num_computed_tokens < request.num_tokens:
            tokens = min(request.num_tokens - request.num_computed_tokens, 64)
            assert self._schedule(request, tokens) is not None
            self._compute(request, tokens)

    def limit(self, length):
        """Tokens that a prompt may find in the prefix cache."""
        return self.manager.coordinator.single_type_managers[
            self.group
        ].kv_cache_spec.hittable_tokens(length, 0)

    def finish_all(self):
        while self.running:
            self.manager.free(self.running.popitem()[1])

    def _retention(self, request):
        """What the worker makes of the request, which gets its sampling parameters with it."""
        asked = request.sampling_params.extra_args or {}
        if not asked.get("vllm_sparse.sparse", True):
            return Retention(sparse=False)
        tokens = asked.get("vllm_sparse.token_budget", self.policy.settings.token_budget)
        return make_policy(token_budget=tokens).retention(request.num_prompt_tokens)

    def _blocks(self, request):
        return self.manager.coordinator.single_type_managers[self.group].req_to_blocks[
            request.request_id
        ]

    def _schedule(self, request, tokens, hit=None):
        """A step of one request, if there is room; its copies are made at once."""
        blocks, count = hit or (None, 0)
        self.manager.new_step_starts()
        found = self.manager.allocate_slots(request, tokens, count, blocks)
        copies, held = self.manager.take_kv_cache_block_copies()
        contents = [self.content[copy.src_block_id] for copy in copies]
        for copy, content in zip(copies, contents, strict=True):
            assert self.pool.blocks[copy.dst_block_id].block_hash is None
            self.content[copy.dst_block_id] = content
        self.pool.free_blocks(held)
        return found

    def _compute(self, request, tokens):
        """What the worker does in the step: compact what ended before, write logical blocks."""
        start = request.num_computed_tokens
        request.num_computed_tokens += tokens
        blocks, prompt_len = self._blocks(request), request.num_prompt_tokens
        retention = self._retention(request)
        for index in range(start // 16, -(-request.num_computed_tokens // 16)):
            logical = tuple(request.all_token_ids[: (index + 1) * 16])
            if len(logical) == (index + 1) * 16:
                self.content[blocks[index].block_id] = logical
        if retention.sparse and start <= prompt_len < request.num_computed_tokens:
            for block in blocks[retention.dropped_blocks :]:
                assert block.ref_cnt == 1, "compaction would overwrite a shared block"
                assert block.block_hash is None, "compaction would overwrite a published block"
                self.content[block.block_id] = ("tail", request.request_id)

    def _admit(self, request):
        hit_blocks, hit, request.shared_prefix_boundary = self.manager.get_computed_blocks(request)
        retention = self._retention(request)
        if retention.sparse:
            assert hit <= request.num_prompt_tokens - self.policy.window
        for index, block in enumerate(hit_blocks.blocks[self.group]):
            expected = tuple(request.all_token_ids[: (index + 1) * 16])
            assert self.content[block.block_id] == expected, "a hit on foreign content"
        tokens = min(request.num_tokens - hit, 64)
        if self._schedule(request, tokens, (hit_blocks, hit)) is None:
            return False
        request.num_computed_tokens = hit
        self.running[request.request_id] = request
        self._compute(request, tokens)
        return True

    @rule(
        family=st.integers(0, 2), shared=st.integers(0, 300), own=st.integers(1, 200),
        asked=st.sampled_from([
            None, {"vllm_sparse.sparse": False},
            {"vllm_sparse.token_budget": 32}, {"vllm_sparse.token_budget": 150},
        ]),
    )  # fmt: skip
    def arrive(self, family, shared, own, asked):
        self._admit(self.request([family] * shared + [100 + self.serial] * own, asked))

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def step(self, data):
        request = self.running[data.draw(st.sampled_from(sorted(self.running)))]
        if request.num_computed_tokens >= request.num_tokens:
            request.append_output_token_ids(7)
        tokens = min(request.num_tokens - request.num_computed_tokens, 64)
        if self._schedule(request, tokens) is not None:
            self._compute(request, tokens)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def preempt(self, data):
        request = self.running.pop(data.draw(st.sampled_from(sorted(self.running))))
        self.manager.free(request)
        request.num_computed_tokens = 0
        self.preempted.append(request)

    @precondition(lambda self: self.preempted)
    @rule()
    def resume(self):
        if self._admit(self.preempted[0]):
            self.preempted.pop(0)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def finish(self, data):
        self.manager.free(self.running.pop(data.draw(st.sampled_from(sorted(self.running)))))

    @invariant()
    def freed_means_free(self):
        manager = self.manager.coordinator.single_type_managers[self.group]
        held = {b.block_id for copies in manager._copies._out.values() for b in copies.values()}
        for request in self.running.values():
            held |= {b.block_id for b in self._blocks(request) if not b.is_null}
        assert self.pool.get_num_free_blocks() == 79 - len(held)
        for request in self.running.values():
            retention = self._retention(request)
            for block in self._blocks(request)[retention.dropped_blocks :]:
                assert not retention.sparse or block.block_hash is None
                assert not block.is_null, "a kept block was given back"

    @invariant()
    def what_running_requests_save_is_counted(self):
        blocks = [block for request in self.running.values() for block in self._blocks(request)]
        saved = counters().value("blocks_saved") - self.saved_before
        assert saved == sum(block.is_null for block in blocks)

    def teardown(self):
        self.finish_all()
        if hasattr(self, "pool"):
            assert self.pool.get_num_free_blocks() == 79


@pytest.mark.vllm
@pytest.mark.parametrize("length", [400, 40], ids=["sparse", "dense"])
def test_the_policy_is_not_asked_again_in_every_step(llama, monkeypatch, length):
    """What a prompt keeps does not change; a server has hundreds of such requests in each step."""
    machine = Machine(llama, blocks=120)
    machine.add(prompts(1, length)[0], new_tokens=60)
    for _ in range(15):
        machine.step()
    assert machine.policy.retention(length).sparse == (length == 400)
    asked, retention = [], RocketKV.retention
    monkeypatch.setattr(
        RocketKV, "retention", lambda self, length: asked.append(length) or retention(self, length)
    )
    monkeypatch.setattr(machine, "_compute", lambda name, tokens: [7])
    for _ in range(20):
        machine.step()
    assert machine.scheduler.requests
    assert asked == []
