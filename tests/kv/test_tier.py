# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The tier behind the prefix cache: vLLM's real scheduler, with a stand-in for workers that copy.

The stand-in knows what each block holds and copies late and in its own time, as streams do.
"""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import pytest
from support.policies import make_policy

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

BLOCK, PAGE_BYTES = 16, 1 << 12


class Copy(NamedTuple):
    """A transfer that was ordered and not yet made."""

    event: int
    source: list[int]
    target: list[int]


class Machine:
    """A scheduler with a tier, and what blocks hold.

    Attributes:
        device: By block: the tokens up to its end, or a word for what nobody may read.
        host: The same for the tier.
        first_hits: By request: tokens that it did not compute when it first ran.
    """

    def __init__(self, model, *, blocks: int, host_blocks: int, seed: int = 0) -> None:
        import torch
        from vllm.engine.arg_utils import EngineArgs
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.core.sched.scheduler import Scheduler
        from vllm.v1.kv_cache_interface import (
            FullAttentionSpec,
            KVCacheConfig,
            KVCacheGroupSpec,
            KVCacheTensor,
        )
        from vllm.v1.structured_output import StructuredOutputManager

        from vllm_sparse.kv.spec import PolicySpec

        init_none_hash(sha256)
        self.hasher = get_request_block_hasher(BLOCK, sha256)
        self.policy = make_policy()
        self.random = random.Random(seed)
        config = EngineArgs(
            model=str(model), attention_backend="ROCKETKV", skip_tokenizer_init=True,
            max_model_len=1024, block_size=BLOCK, max_num_batched_tokens=96, max_num_seqs=4,
            async_scheduling=False, kv_offloading_size=host_blocks * PAGE_BYTES / 2**30,
            scheduler_reserve_full_isl=False,
        ).create_engine_config()  # fmt: skip
        config.cache_config.num_gpu_blocks = blocks
        stock = FullAttentionSpec(
            block_size=BLOCK, num_kv_heads=2, head_size=16, dtype=torch.float32
        )
        size = blocks * PAGE_BYTES
        placed = KVCacheTensor(size, ["layer"], layer_stride=size, block_stride=PAGE_BYTES)
        group = KVCacheGroupSpec(["layer"], PolicySpec.wrap(stock, self.policy))
        cache = KVCacheConfig(blocks, [placed], [group])
        manager = StructuredOutputManager(config)
        self.scheduler: Any = Scheduler(config, cache, manager, BLOCK, BLOCK)
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self.tier = self.scheduler.connector.scheduler_manager
        assert self.tier.num_cpu_blocks == host_blocks
        self.device: dict[int, Any] = {}
        self.host: dict[int, Any] = {}
        self.stores: list[Copy] = []
        self.loads: list[Copy] = []
        self.stores_done: dict[int, int] = {}  # event -> workers that made it
        self.loads_done: set[int] = set()
        self.first_hits: dict[str, int] = {}
        self.stored = self.preemptions = 0
        self.serial = 0

    def add(self, prompt: list[int], new_tokens: int = 8) -> Any:
        from vllm import SamplingParams
        from vllm.v1.request import Request

        self.serial += 1
        request = Request(
            request_id=str(self.serial),
            prompt_token_ids=prompt,
            sampling_params=SamplingParams(max_tokens=new_tokens, ignore_eos=True),
            pooling_params=None,
            block_hasher=self.hasher,
        )
        self.scheduler.add_request(request)
        return request

    def abort(self, request: Any) -> None:
        from vllm.v1.request import RequestStatus

        self.scheduler.finish_requests(request.request_id, RequestStatus.FINISHED_ABORTED)

    def step(self) -> None:
        from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
        from vllm.v1.simple_kv_offload.metadata import SimpleCPUOffloadWorkerMetadata

        out = self.scheduler.schedule()
        order = out.kv_connector_metadata
        self.preemptions += len(out.preempted_req_ids or ())
        if order.need_flush:
            while self.stores:
                self._make(self.stores, self.device, self.host)
            while self.loads:
                self._make(self.loads, self.host, self.device)
        if order.load_gpu_blocks:
            for block in order.load_gpu_blocks:
                self.device[block] = "not loaded yet"
            self.loads.append(Copy(order.load_event, order.load_cpu_blocks, order.load_gpu_blocks))
        sampled = [self._compute(name, n) for name, n in out.num_scheduled_tokens.items()]
        if order.store_gpu_blocks:
            for block in order.store_gpu_blocks:
                assert self.pool.blocks[block].block_hash is not None, "stores what is private"
            for block in order.store_cpu_blocks:
                self.host[block] = "not stored yet"
            self.stores.append(
                Copy(order.store_event, order.store_gpu_blocks, order.store_cpu_blocks)
            )
        while self.stores and self.random.random() < 0.4:
            self._make(self.stores, self.device, self.host)
        while self.loads and self.random.random() < 0.4:
            self._make(self.loads, self.host, self.device)
        loaded = {
            name for event in self.loads_done for name in order.load_event_to_reqs.get(event, ())
        }
        names = list(out.num_scheduled_tokens)
        result = ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: index for index, name in enumerate(names)},
            sampled_token_ids=sampled,
            kv_connector_output=KVConnectorOutput(
                finished_recving=loaded or None,
                kv_connector_worker_meta=SimpleCPUOffloadWorkerMetadata(self.stores_done),
            ),
        )
        self.stores_done, self.loads_done = {}, set()
        self.scheduler.update_from_output(out, result)

    def run(self) -> None:
        for _ in range(3000):
            if not self.scheduler.requests and not self.tier.has_pending_stores():
                return
            self.step()
        raise AssertionError("requests do not end")

    def _make(self, copies: list[Copy], source: dict, target: dict) -> None:
        """Make the oldest copy now; only what is whole and shareable may be seen at any time."""
        copy = copies.pop(0)
        for a, b in zip(copy.source, copy.target, strict=True):
            assert isinstance(source[a], tuple), f"copies {source[a]}"
            target[b] = source[a]
        if source is self.device:
            self.stored += len(copy.source)
            self.stores_done[copy.event] = 1
        else:
            self.loads_done.add(copy.event)

    def _compute(self, name: str, tokens: int) -> list[int]:
        """A step of a request: read what is there, write what is new, compact at the end."""
        request = self.scheduler.requests[name]
        manager = self.scheduler.kv_cache_manager.coordinator.single_type_managers[0]
        blocks = [block.block_id for block in manager.req_to_blocks[name]]
        end = request.num_computed_tokens
        start, prompt = end - tokens, request.num_prompt_tokens
        retention = self.policy.retention(prompt)
        self.first_hits.setdefault(name, start)
        compacted = retention.sparse and start >= prompt
        for index in range(start // BLOCK):
            if compacted and index >= retention.dropped_blocks:
                assert self.device[blocks[index]] == name, "another's tail"
            elif not compacted:
                expected = tuple(request.all_token_ids[: (index + 1) * BLOCK])
                assert self.device[blocks[index]] == expected, "reads foreign content"
        for index in range(start // BLOCK, -(-end // BLOCK)):
            whole = (index + 1) * BLOCK <= end
            prefix = tuple(request.all_token_ids[: (index + 1) * BLOCK])
            self.device[blocks[index]] = prefix if whole else "unfinished"
        if retention.sparse and end >= prompt:
            for block in blocks[retention.dropped_blocks :]:
                assert self.pool.blocks[block].block_hash is None, "compacts what is published"
                self.device[block] = name
        return [7] if end >= request.num_tokens else []


def prompts(count: int, length: int = 400, first: int = 1) -> list[list[int]]:
    return [[first + i] * (length - 30) + list(range(30)) for i in range(count)]


def test_evicted_prefixes_come_back_up_to_the_limit(llama):
    """Six prompts through a pool that holds one and a half, twice, and no room for tails."""
    machine = Machine(llama, blocks=40, host_blocks=200)
    for _ in range(2):
        for prompt in prompts(6):
            machine.add(prompt)
            machine.run()
    limit = machine.policy.publishable_tokens(400)
    assert [machine.first_hits[str(i)] for i in range(1, 7)] == [0] * 6
    assert [machine.first_hits[str(i)] for i in range(7, 13)] == [limit] * 6
    assert machine.stored == 6 * limit // BLOCK, "each block once, and nothing of a tail"


def test_a_longer_prompt_takes_of_a_tier_what_it_may(llama):
    """The tier holds blocks beyond the limit of a shorter prompt, and of a resumed request."""
    machine = Machine(llama, blocks=60, host_blocks=200)
    long = [1] * 700 + list(range(30))
    machine.add(long)
    machine.run()
    for other in prompts(4, first=2):
        machine.add(other)
    machine.run()
    short = machine.add(long[:400])
    machine.run()
    published = machine.policy.publishable_tokens(len(long))
    limit = machine.policy.publishable_tokens(400)
    assert limit < 399 // BLOCK * BLOCK < published, "otherwise nothing could be taken wrongly"
    assert machine.first_hits[short.request_id] == limit


def test_whatever_is_left_on_the_device_the_tier_has_the_rest(llama):
    """Its lookups see only the rest of a prompt, so none may guess the prompt's length there."""
    from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

    machine = Machine(llama, blocks=60, host_blocks=200)
    assert type(machine.tier.cpu_coordinator.single_type_managers[0]) is FullAttentionManager
    prompt = prompts(1)[0]
    machine.add(prompt)
    machine.run()
    request = machine.add(prompt)
    limit = machine.policy.publishable_tokens(len(prompt))
    for local in range(0, len(prompt), BLOCK):
        found, waits = machine.scheduler.connector.get_num_new_matched_tokens(request, local)
        assert (found, waits) == ((limit - local, True) if local < limit else (0, False))
    machine.run()


@pytest.mark.parametrize("seed", range(12))
def test_random_lives(llama, seed):
    """Requests of a few families come, are preempted, and go, some before they are done."""
    machine = Machine(llama, blocks=45, host_blocks=30 + 20 * (seed % 4), seed=seed)
    draw = machine.random
    alive = []
    for _ in range(300):
        if draw.random() < 0.15 and len(alive) < 12:
            prompt = [draw.randrange(3)] * draw.randrange(250)
            prompt += [draw.randrange(50)] * draw.randrange(1, 200)
            alive.append(machine.add(prompt, draw.randrange(1, 60)))
        if alive and draw.random() < 0.02:
            machine.abort(alive.pop(draw.randrange(len(alive))))
        machine.step()
        alive = [request for request in alive if not request.is_finished()]
    machine.run()
    for _ in range(30):
        machine.step()
    assert not machine.stores
    assert not machine.loads
    assert machine.stored > 0
    assert machine.pool.get_num_free_blocks() == 44
    assert machine.tier.cpu_block_pool.get_num_free_blocks() == machine.tier.num_cpu_blocks - 1
    assert any(machine.first_hits.values())
