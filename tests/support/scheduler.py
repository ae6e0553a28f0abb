# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""vLLM's real scheduler with a stand-in for workers, which knows what each block holds.

It reads and writes blocks as a worker does, and sees at once what nobody may read or write.
"""

from __future__ import annotations

import copy
import random
from functools import cache
from typing import TYPE_CHECKING, Any

from vllm_sparse.policies.rocketkv import RocketKV

if TYPE_CHECKING:
    from vllm_sparse.policies.protocol import Policy
    from vllm_sparse.policies.sparda import SpardaSettings

BLOCK, PAGE_BYTES = 16, 1 << 12


class Machine:
    """A scheduler, and what blocks hold.

    Args:
        model: Checkpoint folder, for vLLM's configuration.
        blocks: Of the pool.
        ahead: Steps that are scheduled before the oldest one is processed; 0: none.
        seed: Of ``random``.
        kind: The policy.
        settings: Of it.
        stock: Serve as vLLM itself does.
        sparda: Settings of SPARDA, whose blocks are given out instead, densely read.
        block: Tokens per block.
        copied_bytes: Of a layer, that a step may copy beside the least.
        **engine: Further arguments of vLLM.

    Attributes:
        device: By block: the tokens up to its end, or a word for what nobody may read.
        first_hits: By request: tokens that it did not compute when it first ran.
        copied: Copies of blocks.
    """

    def __init__(
        self, model, *, blocks: int, ahead: int = 0, seed: int = 0, settings=None,
        kind: type[Policy] = RocketKV, stock: bool = False, block: int = BLOCK,
        copied_bytes: int = 0, sparda: SpardaSettings | None = None, **engine: Any,
    ) -> None:  # fmt: skip
        import torch
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.core.sched.async_scheduler import AsyncScheduler
        from vllm.v1.core.sched.scheduler import Scheduler
        from vllm.v1.kv_cache_interface import (
            FullAttentionSpec,
            KVCacheConfig,
            KVCacheGroupSpec,
            KVCacheTensor,
        )
        from vllm.v1.structured_output import StructuredOutputManager

        from support.policies import make_policy
        from vllm_sparse.kv.spec import PolicySpec, SpardaSpec

        init_none_hash(sha256)
        self.hasher = get_request_block_hasher(block, sha256)
        dense = {"min_context": 1 << 20} if stock or sparda else {}
        self.policy = make_policy(kind, block_size=block, **(settings or {}), **dense)
        self.block = block
        self.random = random.Random(seed)
        arguments = {
            "block_size": block, "max_model_len": 1024, "max_num_batched_tokens": 96,
            "max_num_seqs": 4, "scheduler_reserve_full_isl": False, **engine,
        }  # fmt: skip
        config = copy.deepcopy(_config(str(model), ahead > 0, tuple(sorted(arguments.items()))))
        config.cache_config.num_gpu_blocks = blocks
        spec = FullAttentionSpec(
            block_size=block, num_kv_heads=2, head_size=16, dtype=torch.float32
        )
        size = blocks * PAGE_BYTES
        placed = KVCacheTensor(size, ["layer"], layer_stride=size, block_stride=PAGE_BYTES)
        ours: Any = PolicySpec.wrap(spec, self.policy, copied_bytes=copied_bytes)
        if sparda is not None:
            ours = SpardaSpec.wrap(spec, sparda)
        group = KVCacheGroupSpec(["layer"], spec if stock else ours)
        cache = KVCacheConfig(blocks, [placed], [group])
        scheduler = AsyncScheduler if ahead else Scheduler
        manager = StructuredOutputManager(config)
        self.scheduler: Any = scheduler(config, cache, manager, block, block)
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self.manager = self.scheduler.kv_cache_manager.coordinator.single_type_managers[0]
        self.device: dict[int, Any] = {}
        self.first_hits: dict[str, int] = {}
        self.preemptions = self.copied = self.serial = 0
        self._ahead, self._in_flight = ahead, []

    def add(self, prompt: list[int], new_tokens: int = 8, priority: int = 0) -> Any:
        from vllm import SamplingParams
        from vllm.v1.request import Request

        self.serial += 1
        request = Request(
            request_id=str(self.serial),
            prompt_token_ids=prompt,
            sampling_params=SamplingParams(max_tokens=new_tokens, ignore_eos=True),
            pooling_params=None,
            block_hasher=self.hasher,
            priority=priority,
        )
        self.scheduler.add_request(request)
        return request

    def abort(self, request: Any) -> None:
        from vllm.v1.request import RequestStatus

        self.scheduler.finish_requests(request.request_id, RequestStatus.FINISHED_ABORTED)

    def serve(self, prompt: list[int], new_tokens: int = 8) -> int:
        """A request alone; how many tokens it found in the prefix cache."""
        request = self.add(prompt, new_tokens)
        self.run()
        return self.first_hits[request.request_id]

    def step(self) -> None:
        """Schedule a step, do its work, and process the oldest one if enough are in flight."""
        from vllm.v1.outputs import ModelRunnerOutput

        out = self.scheduler.schedule()
        self.preemptions += len(out.preempted_req_ids or ())
        self._begin(out)
        self._copy(out.kv_cache_block_copies or ())
        sampled = [self._compute(name, n) for name, n in out.num_scheduled_tokens.items()]
        told = self._end(out)
        names = list(out.num_scheduled_tokens)
        result = ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: index for index, name in enumerate(names)},
            sampled_token_ids=sampled,
            kv_connector_output=told,
        )
        self._in_flight.append((out, result))
        while len(self._in_flight) > (self._ahead if names else 0):
            self.scheduler.update_from_output(*self._in_flight.pop(0))

    def run(self) -> None:
        """Until all requests have ended."""
        for _ in range(3000):
            if not self.scheduler.requests and not self._busy():
                break
            self.step()
        else:
            raise AssertionError("requests do not end")
        while self._in_flight:
            self.step()

    def free_blocks(self) -> int:
        """Of the pool, of which all but one can be."""
        free: int = self.pool.get_num_free_blocks()
        return free

    def _begin(self, out: Any) -> None:
        """What a worker does before it computes a step."""

    def _end(self, out: Any) -> Any:
        """What it does behind, and tells the scheduler."""

    def _busy(self) -> bool:
        return False

    def _copy(self, copies: Any) -> None:
        """All are read before any is written."""
        contents = [self.device[pair.src_block_id] for pair in copies]
        for pair, content in zip(copies, contents, strict=True):
            assert isinstance(content, tuple), f"copies {content}"
            assert self.pool.blocks[pair.dst_block_id].block_hash is None, "writes the published"
            self.device[pair.dst_block_id] = content
        self.copied += len(contents)

    def _compute(self, name: str, tokens: int) -> list[int]:
        """A step of a request: compact what ended, read what is there, write what is new."""
        request = self.scheduler.requests[name]
        row, size = self.manager.req_to_blocks[name], self.block
        blocks = [block.block_id for block in row]
        end = request.num_computed_tokens
        start, prompt = end - tokens, request.num_prompt_tokens
        text = [*request.prompt_token_ids, *[7] * end]
        retention = self.policy.retention(prompt)
        self.first_hits.setdefault(name, start)
        moves = self.policy.moves and retention.sparse
        freed = range(*self.policy.freed_blocks(prompt, start)) if start > prompt else ()
        for index in range(start // size):
            if index in freed:
                continue
            if moves and start > prompt:
                assert self.device[blocks[index]] == name, "another's tail"
            else:
                expected = tuple(text[: (index + 1) * size])
                assert self.device[blocks[index]] == expected, "reads foreign content"
        for index in range(start // size, -(-end // size)):
            whole = (index + 1) * size <= end
            content = tuple(text[: (index + 1) * size]) if whole else "unfinished"
            if row[index].block_hash is not None:
                assert whole, "publishes what is not whole"
                shared = self.policy.publishable_tokens(prompt)
                assert shared is None or (index + 1) * size <= shared, "publishes an output"
            self.device[blocks[index]] = content
        if moves and end > prompt:
            for block in row[retention.dropped_blocks :]:
                assert block.block_hash is None, "compacts what is published"
                assert start > prompt or not block.is_null
                self.device[block.block_id] = name
        return [] if request.is_prefill_chunk else [7]


@cache
def _config(model: str, ahead: bool, arguments: tuple[tuple[str, Any], ...]) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(
        model=model, attention_backend="ROCKETKV", skip_tokenizer_init=True,
        async_scheduling=ahead, **dict(arguments),
    ).create_engine_config()  # fmt: skip


def prompts(count: int, length: int = 400, first: int = 1) -> list[list[int]]:
    """Prompts that differ from their first token on."""
    return [[first + i] * (length - 30) + list(range(30)) for i in range(count)]


def follow_events(machine: Machine) -> tuple[set[Any], list[tuple[Any, ...]]]:
    """Check after every step what a router believes that follows a machine's events.

    It need not know of all: of two blocks with one hash vLLM tells when the first goes.

    Returns:
        The hashes of blocks that it believes in, and all events, each block's by itself, in order:
        a name and a hash, and of a stored one the parent's hash and tokens, too.
    """
    from vllm.v1.core.kv_cache_utils import get_block_hash, maybe_convert_block_hash

    believed: set[Any] = set()
    seen: list[tuple[Any, ...]] = []
    machine.pool.enable_kv_cache_events = True
    machine.scheduler.kv_cache_manager.take_events = lambda: None
    step = machine.step

    def followed_step() -> None:
        step()
        for event in machine.pool.take_events():
            stored = hasattr(event, "token_ids")
            change = believed.update if stored else believed.difference_update
            change(event.block_hashes)
            name, parent = type(event).__name__, getattr(event, "parent_block_hash", None)
            for index, block in enumerate(event.block_hashes):
                size = machine.block
                tokens = event.token_ids[index * size : (index + 1) * size] if stored else ()
                seen.append((name, block, parent, *tokens))
                parent = block if stored else None
        keys = machine.pool.cached_block_hash_to_block._cache
        cached = {maybe_convert_block_hash(get_block_hash(key)) for key in keys}
        assert believed <= cached, "a router would send requests to what is not there"

    machine.step = followed_step  # type: ignore[method-assign]
    return believed, seen


def random_lives(machine: Machine) -> None:
    """Turns of a few conversations, beside aborts and preemption, until all have ended."""
    draw, alive, texts = machine.random, [], [[i] * 60 for i in range(3)]
    for _ in range(400):
        if draw.random() < 0.2 and len(alive) < 10:
            which = draw.randrange(3)
            texts[which] = (texts[which] + [draw.randrange(9)] * draw.randrange(1, 120))[-700:]
            if draw.random() < 0.1 or len(texts[which]) > 600:
                texts[which] = [which] * 60
            new = draw.choice([1, 2, draw.randrange(1, 60)])
            alive.append(machine.add(list(texts[which]), new, draw.randrange(3)))
        if alive and draw.random() < 0.03:
            machine.abort(alive.pop(draw.randrange(len(alive))))
        machine.step()
        alive = [request for request in alive if not request.is_finished()]
    machine.run()
    assert machine.preemptions > 0
    assert machine.free_blocks() == machine.pool.num_gpu_blocks - 1
