# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The rule that scheduler and worker share, and the scheduler's block accounting under it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from vllm_sparse.kv.tail.retention import RetentionRule
from vllm_sparse.policies.rocketkv import plan


def make_rule(**changes) -> RetentionRule:
    return RetentionRule(
        **{
            "token_budget": 64,
            "window": 8,
            "page_sizes": (4,),
            "min_context": 64,
            "generation_reserve": 32,
            "stage1": True,
            "stage2": True,
            "head_dim": 16,
            "group_size": 2,
            "block_size": 16,
            "max_model_len": 2048,
            **changes,
        }
    )


@given(st.integers(1, 32768), st.sampled_from([16, 32, 128]), st.sampled_from([64, 256, 1024]))
@settings(max_examples=300, deadline=None)
def test_the_tail_holds_the_papers_capacity(prompt_len, block_size, budget):
    retention_rule = make_rule(block_size=block_size, token_budget=budget, max_model_len=32768)
    retention = retention_rule(prompt_len)
    reserve = min(32, 32768 - prompt_len)
    capacity = plan(prompt_len, reserve, budget, 16, 8, (4,)).capacity
    kept = prompt_len - retention.dropped_blocks * block_size
    if not retention.sparse:
        assert retention.dropped_blocks == 0
        assert retention.reason in ("short_prompt", "fits_budget")
        return
    assert retention.dropped_blocks >= 1
    assert kept >= min(capacity, prompt_len)
    # Full tail blocks beyond the capacity would be memory kept for nothing.
    smallest = max(-(-capacity // block_size), retention_rule.min_kept_blocks)
    assert prompt_len // block_size - retention.dropped_blocks == smallest


def test_parked_queries_fit_into_blocks_that_exist_before_the_prompt_ends():
    for block_size in (16, 32, 128):
        for group in (1, 2, 4, 7):
            retention_rule = make_rule(block_size=block_size, group_size=group, window=32)
            room = retention_rule.queries_per_block
            for prompt_len in range(65, 2000, 7):
                retention = retention_rule(prompt_len)
                if retention.sparse:
                    first_query = prompt_len - 32
                    whole = first_query // block_size - retention.dropped_blocks
                    assert whole * room >= 32


def test_without_stage1_nothing_is_dropped_but_long_prompts_are_sparse():
    retention = make_rule(stage1=False)(1000)
    assert retention.sparse
    assert retention.dropped_blocks == 0
    assert make_rule(stage1=False).publishable_blocks(1000) == 0


def test_short_and_fitting_prompts_stay_dense_and_shared():
    assert make_rule()(64).reason == "short_prompt"
    assert make_rule(token_budget=4096)(1000).reason == "fits_budget"
    assert make_rule().publishable_blocks(64) is None


@pytest.mark.vllm
class TestManager:
    """The real manager on vLLM's real block pool, driven by random requests."""

    def test_random_lives(self):
        pytest.importorskip("vllm")
        PoolMachine.TestCase.settings = settings(
            max_examples=25, stateful_step_count=60, deadline=None
        )
        PoolMachine.TestCase().runTest()

    def test_a_resumed_request_never_hits_into_its_tail(self):
        """Its lookup covers prompt and output, so its length does not tell the prompt's.

        Another request, whose longer prompt begins with both, has published blocks that lie in the
        tail of the preempted one.
        """
        pytest.importorskip("vllm")
        machine = PoolMachine()
        prompt = [1] * 400
        short = machine.request(prompt)
        machine.prefill(short)
        for _ in range(100):
            short.append_output_token_ids(7)
        machine.running.pop(short.request_id)
        machine.manager.free(short)
        short.num_computed_tokens = 0

        long = machine.request([*short.all_token_ids, *[9] * 400])
        machine.prefill(long)
        dropped = machine.rule(len(prompt)).dropped_blocks
        published = machine.rule(long.num_prompt_tokens).dropped_blocks
        assert published > dropped, "otherwise there is nothing to hit wrongly"
        assert machine.rule(short.num_tokens).dropped_blocks > dropped
        _, hit, *_ = machine.manager.get_computed_blocks(short)
        assert hit == dropped * 16
        machine.prefill(short)


class PoolMachine(RuleBasedStateMachine):
    """Requests are admitted, computed in chunks, preempted, resumed, finished; blocks are checked.

    ``owner`` mirrors what a worker would have written: tail blocks are overwritten at the prompt's
    end, so a block that another request may still read must never be one.
    """

    def __init__(self):
        super().__init__()
        import torch
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_manager import KVCacheManager
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

        from vllm_sparse.kv.spec import RocketKVSpec

        init_none_hash(sha256)
        self.rule = make_rule()
        stock = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=16, dtype=torch.float32)
        spec = RocketKVSpec.wrap(stock, self.rule)
        config = KVCacheConfig(
            num_blocks=80,
            kv_cache_tensors=[],
            kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
        )
        self.manager = KVCacheManager(
            config,
            max_model_len=2048,
            scheduler_block_size=16,
            hash_block_size=16,
            enable_caching=True,
        )
        self.hasher = get_request_block_hasher(16, sha256)
        self.pool = self.manager.block_pool
        self.running: dict[str, object] = {}
        self.preempted: list[object] = []
        self.content: dict[int, tuple] = {}  # block id -> what the worker wrote there
        self.serial = 0

    def request(self, tokens):
        from vllm import SamplingParams
        from vllm.v1.request import Request

        self.serial += 1
        return Request(
            request_id=str(self.serial),
            prompt_token_ids=tokens,
            sampling_params=SamplingParams(max_tokens=500),
            pooling_params=None,
            block_hasher=self.hasher,
        )

    def prefill(self, request):
        assert self._admit(request)
        while request.num_computed_tokens < request.num_tokens:
            tokens = min(request.num_tokens - request.num_computed_tokens, 64)
            assert self._schedule(request, tokens) is not None
            self._compute(request, tokens)

    def _blocks(self, request):
        return self.manager.coordinator.single_type_managers[0].req_to_blocks[request.request_id]

    def _schedule(self, request, tokens, hit=None):
        if hit is None:
            return self.manager.allocate_slots(request, tokens)
        blocks, count = hit
        return self.manager.allocate_slots(request, tokens, count, blocks)

    def _compute(self, request, tokens):
        """What the worker does in the step: write logical blocks, compact at the prompt's end."""
        start = request.num_computed_tokens
        request.num_computed_tokens += tokens
        blocks, prompt_len = self._blocks(request), request.num_prompt_tokens
        retention = self.rule(prompt_len)
        for index in range(start // 16, -(-request.num_computed_tokens // 16)):
            logical = tuple(request.all_token_ids[: (index + 1) * 16])
            if len(logical) == (index + 1) * 16:
                self.content[blocks[index].block_id] = logical
        if retention.sparse and start < prompt_len <= request.num_computed_tokens:
            for block in blocks[retention.dropped_blocks :]:
                assert block.ref_cnt == 1, "compaction would overwrite a shared block"
                assert block.block_hash is None, "compaction would overwrite a published block"
                self.content[block.block_id] = ("tail", request.request_id)

    def _admit(self, request):
        hit_blocks, hit, *_ = self.manager.get_computed_blocks(request)
        retention = self.rule(request.num_prompt_tokens)
        if retention.sparse:
            assert hit <= retention.dropped_blocks * 16
        for index, block in enumerate(hit_blocks.blocks[0]):
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
    )  # fmt: skip
    def arrive(self, family, shared, own):
        self._admit(self.request([family] * shared + [100 + self.serial] * own))

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
        held = set()
        for request in self.running.values():
            held |= {b.block_id for b in self._blocks(request) if not b.is_null}
        assert self.pool.get_num_free_blocks() == 79 - len(held)
        for request in self.running.values():
            retention = self.rule(request.num_prompt_tokens)
            blocks = self._blocks(request)
            for block in blocks[retention.dropped_blocks :] if retention.sparse else ():
                assert block.block_hash is None
                assert not block.is_null, "a kept block was given back"

    def teardown(self):
        for request in [*self.running.values()]:
            self.manager.free(request)
        if hasattr(self, "pool"):
            assert self.pool.get_num_free_blocks() == 79
