# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The tier behind the prefix cache: vLLM's real scheduler, with a stand-in for workers that copy.

The stand-in knows what each block holds and copies late and in its own time, as streams do.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from support.scheduler import BLOCK, PAGE_BYTES, Machine, prompts

from vllm_sparse.policies.quest import Quest

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm


class Copy(NamedTuple):
    """A transfer that was ordered and not yet made."""

    event: int
    source: list[int]
    target: list[int]


class TierMachine(Machine):
    """A scheduler with a tier.

    Attributes:
        host: As ``device``, of the tier.
    """

    def __init__(self, model, *, host_blocks: int, **options: Any) -> None:
        super().__init__(model, kv_offloading_size=host_blocks * PAGE_BYTES / 2**30, **options)
        self.tier = self.scheduler.connector.scheduler_manager
        assert self.tier.num_cpu_blocks == host_blocks
        self.host: dict[int, Any] = {}
        self.stores: list[Copy] = []
        self.loads: list[Copy] = []
        self.stores_done: dict[int, int] = {}  # event -> workers that made it
        self.loads_done: set[int] = set()
        self.stored = 0

    def _busy(self) -> bool:
        return self.tier.has_pending_stores()

    def _begin(self, out: Any) -> None:
        order = out.kv_connector_metadata
        if order.need_flush:
            while self.stores:
                self._make(self.stores, self.device, self.host)
            while self.loads:
                self._make(self.loads, self.host, self.device)
        if order.load_gpu_blocks:
            for block in order.load_gpu_blocks:
                self.device[block] = "not loaded yet"
            self.loads.append(Copy(order.load_event, order.load_cpu_blocks, order.load_gpu_blocks))

    def _end(self, out: Any) -> Any:
        from vllm.v1.outputs import KVConnectorOutput
        from vllm.v1.simple_kv_offload.metadata import SimpleCPUOffloadWorkerMetadata

        order = out.kv_connector_metadata
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
        told = KVConnectorOutput(
            finished_recving=loaded or None,
            kv_connector_worker_meta=SimpleCPUOffloadWorkerMetadata(self.stores_done),
        )
        self.stores_done, self.loads_done = {}, set()
        return told

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


def test_evicted_prefixes_come_back_up_to_the_limit(llama):
    """Six prompts through a pool that holds one and a half, twice, and no room for tails."""
    machine = TierMachine(llama, blocks=40, host_blocks=200)
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
    machine = TierMachine(llama, blocks=60, host_blocks=200)
    long = [1] * 700 + list(range(30))
    machine.add(long)
    machine.run()
    for other in prompts(4, first=2):
        machine.add(other)
    machine.run()
    short = machine.add(long[:400])
    machine.run()
    published = machine.policy.publishable_tokens(len(long))
    limit = machine.policy.hittable_blocks(400) * BLOCK
    assert limit < 399 // BLOCK * BLOCK < published, "otherwise nothing could be taken wrongly"
    assert machine.first_hits[short.request_id] == limit


def test_a_resumed_request_takes_whole_blocks_only(llama):
    """Where tokens stay in place, what it may take ends with its prompt, in the midst of a block.

    A longer prompt, which begins with prompt and output of the request, has put that block there.
    """
    machine = TierMachine(llama, blocks=90, host_blocks=200, kind=Quest)
    prompt = [*range(1, 390), *[7] * 16]
    resumed = machine.add(prompt, new_tokens=60)
    while resumed.num_output_tokens < 20:
        machine.step()
    machine.add([*prompt, *[7] * 40])
    while len(machine.scheduler.requests) > 1 or machine.tier.has_pending_stores():
        machine.step()
    machine.scheduler.running.remove(resumed)
    machine.scheduler._preempt_request(resumed, 0.0)
    assert len(prompt) % BLOCK != 0
    assert machine.stored > len(prompt) // BLOCK
    machine.run()
    assert resumed.num_output_tokens == 60


def test_whatever_is_left_on_the_device_the_tier_has_the_rest(llama):
    """Its lookups see only the rest of a prompt, so none may guess the prompt's length there."""
    from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

    machine = TierMachine(llama, blocks=60, host_blocks=200)
    assert type(machine.tier.cpu_coordinator.single_type_managers[0]) is FullAttentionManager
    prompt = prompts(1)[0]
    machine.add(prompt)
    machine.run()
    machine.serve([*prompt, *range(400)])  # stores what was in the tail
    request = machine.add(prompt)
    limit = machine.policy.hittable_blocks(len(prompt)) * BLOCK
    for local in range(0, len(prompt), BLOCK):
        found, waits = machine.scheduler.connector.get_num_new_matched_tokens(request, local)
        assert (found, waits) == ((limit - local, True) if local < limit else (0, False))
    machine.run()


@pytest.mark.parametrize("seed", range(12))
def test_random_lives(llama, seed):
    """Requests of a few families come, are preempted, and go, some before they are done."""
    machine = TierMachine(llama, blocks=45, host_blocks=30 + 20 * (seed % 4), seed=seed)
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


@pytest.mark.parametrize("retention", [None, 0])
def test_a_shorter_hit_brings_the_windows_before_its_own_end(llama, retention):
    """A tier has all of a dense prompt, of which the same prompt, sparse, may take a part.

    Of a window layer it needs the last blocks of that part, not those of the whole, which are all
    that vLLM keeps by default.
    """
    from vllm import SamplingParams
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher
    from vllm.v1.kv_cache_interface import (
        FullAttentionSpec,
        KVCacheConfig,
        KVCacheGroupSpec,
        KVCacheTensor,
        SlidingWindowSpec,
    )
    from vllm.v1.request import Request

    from vllm_sparse.kv.spec import PolicySpec
    from vllm_sparse.kv.tier import PrefixTierConnector

    machine = TierMachine(llama, blocks=10, host_blocks=200)  # for its configuration
    heads = {"block_size": BLOCK, "num_kv_heads": 2, "head_size": 16, "dtype": torch.float32}
    full, window = FullAttentionSpec(**heads), SlidingWindowSpec(**heads, sliding_window=2 * BLOCK)
    ours = PolicySpec.wrap(full, machine.policy, beside_others=True)

    def cache(spec):
        placed = KVCacheTensor(PAGE_BYTES * 99, ["a"], layer_stride=0, block_stride=PAGE_BYTES)
        groups = [KVCacheGroupSpec(["a"], window), KVCacheGroupSpec(["b"], spec)]
        return KVCacheConfig(99, [placed], groups, prefix_cache_retention_interval=retention)

    connector = PrefixTierConnector(
        machine.scheduler.vllm_config, KVConnectorRole.SCHEDULER, cache(ours)
    )
    sizes = {"scheduler_block_size": BLOCK, "hash_block_size": BLOCK}
    held = KVCacheManager(cache(full), max_model_len=1024, enable_caching=True, **sizes)
    tier = connector.scheduler_manager
    tier.cpu_coordinator, tier.cpu_block_pool = held.coordinator, held.block_pool
    tier._gpu_block_pool = held.block_pool
    hasher = get_request_block_hasher(BLOCK, sha256)
    dense, sparse = (
        Request(name, list(range(400)), SamplingParams(max_tokens=8), None, block_hasher=hasher)
        for name in ("dense", "sparse")
    )
    for _ in range(4):  # in chunks, so that windows are published along the way
        held.new_step_starts()
        assert held.allocate_slots(dense, 100) is not None
        dense.num_computed_tokens += 100
    held.free(dense)

    limit = ours.hittable_tokens(400, 0)
    assert 2 * BLOCK < limit < 399 // BLOCK * BLOCK, "otherwise nothing is cut, or nothing left"
    found = connector.get_num_new_matched_tokens(sparse, 0)
    rows = list(range(30)), list(range(30, 60))
    if retention == 0:
        assert found == (0, False)
    else:
        assert found == (limit, True)
        placed = SimpleNamespace(get_block_ids=lambda: rows)
        connector.update_state_after_alloc(sparse, placed, limit)
        last = limit // BLOCK
        loaded = tier._reqs_to_load["sparse"].transfer_meta.gpu_block_ids
        assert loaded == [*rows[0][last - 2 : last], *rows[1][:last]]
    assert not tier._pending_cpu_hits, "pins what nobody takes"


def test_every_byte_of_a_block_is_copied_once():
    """Three layers, of which a group of one overlays the first; and one of another worker."""
    from vllm_sparse.kv.tier import block_regions

    memory = torch.arange(72, dtype=torch.uint8)
    first, second, third = memory.split(24)

    def placed(offset, *layers):
        return SimpleNamespace(layers=layers, offset=offset, layer_stride=24, block_stride=8)

    tensors = [placed(0, "elsewhere"), placed(0, "a", "b"), placed(0, "c"), placed(48, "d")]
    config = SimpleNamespace(num_blocks=3, kv_cache_tensors=tensors)
    caches = {"a": first.view(torch.int32), "b": second, "c": first, "d": third.view(3, 2, 4)}
    found = list(block_regions(caches, config))
    assert [region.tolist() for region in found] == memory.view(3, 3, 8).tolist()
    for region in found:
        region.zero_()
    assert not memory.any()
