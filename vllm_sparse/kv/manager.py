# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Block accounting in the scheduler: free what compaction leaves behind, share what is safe."""

from __future__ import annotations

from collections import defaultdict
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakSet

from vllm.logger import init_logger
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

from vllm_sparse import metrics
from vllm_sparse.features import POLICIES, SPARDA, refuse
from vllm_sparse.kv.copies import PrefixCopies, copyable, unwritten
from vllm_sparse.kv.requests import (
    case_of,
    control_of_request,
    of_hashes,
    of_id,
    watch_engines,
    watch_requests,
)
from vllm_sparse.policies.controlled import policy_for
from vllm_sparse.policies.protocol import Policy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.request import Request

    from vllm_sparse.metrics.definitions import Family


# A child of vLLM's logger: others have no handler in its processes.
logger = init_logger("vllm.sparse")

# Pairs of a prompt length and a control; more than requests run at once.
_MOST_CASES = 4096


class PromptAwareManager(FullAttentionManager):
    """Full attention that shares only what is the same whoever computes it.

    The spec's ``publishable_tokens(prompt_len, control)`` says how many leading tokens of a request
    are; its blocks beyond are never published (:meth:`cache_blocks`). What is taken from the cache
    ends where ``hittable_tokens`` does (:meth:`find_longest_cache_hit`).
    """

    family: ClassVar[Family] = SPARDA
    _begun: ClassVar[WeakSet[Request]] = WeakSet()

    def __init__(self, kv_cache_spec: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, *args, **kwargs)
        # Asked in every step of every request.
        self._publishable = lru_cache(_MOST_CASES)(kv_cache_spec.publishable_tokens)
        watch_requests()
        if kv_cache_spec.instance:
            watch_engines()
            counters = metrics.counters()
            counters.publish_to(metrics.folder(kv_cache_spec.instance), self.family)
            counters.set_gauge("pool_blocks", self.block_pool.num_gpu_blocks - 1)  # one is null

    def cache_blocks(
        self,
        request: Request,
        num_tokens: int,
        retention_interval: int | None = None,
        *,
        replay_boundaries: Sequence[int],
    ) -> None:
        """Publish full blocks, but only the publishable ones, and note what the step will write."""
        limit = self._publishable(*case_of(request))
        if limit is not None:
            if request.num_computed_tokens < request.num_prompt_tokens:
                self._pin(request, num_tokens)
            num_tokens = min(num_tokens, limit)
        first = self.num_cached_block.get(request.request_id, 0)
        super().cache_blocks(
            request, num_tokens, retention_interval, replay_boundaries=replay_boundaries
        )
        last = self.num_cached_block.get(request.request_id, 0)
        if last > first:
            blocks = self.req_to_blocks[request.request_id][first:last]
            unwritten(self.block_pool).update(block.block_id for block in blocks)

    def new_step_starts(self) -> None:
        """What was published before is written when the step begins."""
        super().new_step_starts()
        unwritten(self.block_pool).clear()

    def pop_blocks_for_free(self, request_id: str) -> Any:
        """Take back what was published of a request that this very step preempts.

        vLLM plans the step without it then, and nobody writes these blocks. Those of a request that
        ends are written by a step under way.
        """
        request = of_id(self.block_pool, request_id)
        if request is not None and not request.is_finished():
            row = {block.block_id for block in self.req_to_blocks.get(request_id, ())}
            self.block_pool.evict_blocks(row & unwritten(self.block_pool))
        return super().pop_blocks_for_free(request_id)

    def _pin(self, request: Request, num_tokens: int) -> None:
        """Have groups of other kinds keep what a hit at our limit needs.

        Layers with windows or states keep it at the prompt's end only, where hits of the same
        prompt never get, and another turn's only if it is long enough.
        They also keep it at a *junction*, which vLLM notes where a lookup found a prefix that other
        requests share: until that is computed, it goes first. A limit in the first chunk comes too
        late for a group that is asked before ours.
        """
        limit = self.kv_cache_spec.hittable_tokens(*case_of(request)) or 0
        first_chunk = request not in self._begun
        self._begun.add(request)
        if first_chunk and self.kv_cache_group_id and 0 < limit <= num_tokens:
            metrics.counters().add("prefix_limits_missed", 1)
        computed = self.num_cached_block.get(request.request_id, 0) * self.block_size
        if computed >= request.shared_prefix_boundary:
            limit = limit // self.block_size * self.block_size
            request.shared_prefix_boundary = max(request.shared_prefix_boundary, limit)

    @classmethod
    def find_longest_cache_hit(
        cls, block_hashes: Any, max_length: int, *args: Any, **kwargs: Any
    ) -> Any:
        """Longest hit that leaves everything else to be computed by the request itself.

        The length does not tell whose lookup it is: a preempted request looks its prompt and its
        output up in one go, and another group's hit may have shortened it.
        """
        request, (pool, spec, dropped) = of_hashes(block_hashes), cls._where(*args, **kwargs)
        if request is None:
            return super().find_longest_cache_hit(block_hashes, 0, *args, **kwargs)
        if (limit := spec.hittable_tokens(*case_of(request))) is not None:
            max_length = min(max_length, limit + dropped)
        found = super().find_longest_cache_hit(block_hashes, max_length, *args, **kwargs)
        if (end := cls._hit_end(pool, spec, request, found[0])) is None:
            return found
        return super().find_longest_cache_hit(block_hashes, end + dropped, *args, **kwargs)

    @classmethod
    def _hit_end(cls, pool: Any, spec: Any, request: Request, hits: Any) -> int | None:
        """Tokens of a hit that the request can take in this step; ``None``: all."""
        return None

    @staticmethod
    def _where(
        kv_cache_group_ids: Any, block_pool: Any, kv_cache_spec: Any,
        drop_eagle_block: bool = False, alignment_tokens: int = 0, *_: Any, **__: Any,
    ) -> tuple[Any, Any, int]:  # fmt: skip
        """Things that a lookup gets beside hashes and length, by place or by name.

        The last are the tokens that vLLM drops from a hit for a drafter's layers.
        """
        return block_pool, kv_cache_spec, alignment_tokens if drop_eagle_block else 0


class PolicyManager(PromptAwareManager):
    """Full attention that gives blocks back which the policy says no later step reads.

    A policy that moves tokens rewrites a request's *tail* (its last full prompt blocks and
    everything after) in the worker. It stays correct with prefix caching because the tail is
    private: what is shared with others is copied, see :mod:`.copies`. Freed blocks keep their hash,
    so they stay hit-able until someone needs the memory.
    """

    family: ClassVar[Family] = POLICIES

    def __init__(self, kv_cache_spec: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, *args, **kwargs)
        wanted, size = kv_cache_spec.policy.shape.block_size, kv_cache_spec.block_size
        if wanted != size:  # the worker sees parts of blocks only, on GPUs
            refuse("other-blocks", POLICIES, False, wanted=wanted, size=size)
        self._saved: defaultdict[str, int] = defaultdict(int)
        self._frees_once = type(kv_cache_spec.policy).freed_blocks is Policy.freed_blocks
        self._copies = PrefixCopies(self)
        # How many blocks other layers take, nobody tells this group.
        if kv_cache_spec.instance and not kv_cache_spec.beside_others:
            logger.info_once(self._capacity_line())

    def _capacity_line(self) -> str:
        """vLLM's own "Maximum concurrency" counts whole prompts, which need room only once."""
        policy, blocks = self.kv_cache_spec.policy, self.block_pool.num_gpu_blocks
        longest = policy.shape.max_model_len
        held = -(-longest // self.block_size)
        kept = policy.held_blocks(longest, longest)
        return (
            f"{self.kv_cache_spec.backend}: {blocks} KV blocks hold {blocks / kept:.1f} decoding "
            f"requests of {longest} tokens ({kept} blocks each after prefill) instead of "
            f"{blocks / held:.1f}; a prompt needs its {held} blocks while it is prefilled"
        )

    @classmethod
    def _hit_end(cls, pool: Any, spec: Any, request: Request, hits: Any) -> int | None:
        if not (tail := spec.tail_blocks(*case_of(request))):
            return None
        limits = tail, spec.block_size, spec.most_copies
        ends = [(len(row), copyable(pool, request, row, *limits)) for row in hits]
        return min((end * spec.block_size for whole, end in ends if end < whole), default=None)

    def new_step_starts(self) -> None:
        """Publish what the steps planned before copy."""
        super().new_step_starts()
        self._copies.step_starts()

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        *args: Any,
        **kwargs: Any,
    ) -> int:
        """Blocks that a request needs, those for copies of what it has hit included."""
        hit = new_computed_blocks, num_local_computed_tokens
        needed: int = super().get_num_blocks_to_allocate(
            request_id, num_tokens, hit[0], total_computed_tokens, hit[1], *args, **kwargs
        )
        return needed + self._copies.blocks_needed(request_id, *hit)

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[KVCacheBlock],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:
        """Take what was hit."""
        hit = new_computed_blocks, num_local_computed_tokens
        super().add_local_computed_blocks(request_id, *hit, num_external_computed_tokens)
        self._copies.note_hit(request_id, *hit)

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        """Allocate, and have copied what must be before the step."""
        request = of_id(self.block_pool, request_id)
        copies = self._copies.copy_in(request) if request else []
        blocks = super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model)
        if request:
            self._copies.copy_out(request)
        return copies + blocks

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        """Free what the steps processed so far have made superfluous, once the prompt is done.

        Not before the step after the prompt's last is processed too, which begins with compaction.
        Without async scheduling copies into blocks that are allocated for that step, which may be
        those freed here, would run still earlier.
        """
        if num_prompt_tokens is None or processed_computed_tokens <= num_prompt_tokens:
            return
        if request_id in self._saved and self._frees_once:
            return
        if not (blocks := self.req_to_blocks.get(request_id)):
            return
        policy = policy_for(
            self.kv_cache_spec.policy, control_of_request(of_id(self.block_pool, request_id))
        )
        first, last = policy.freed_blocks(num_prompt_tokens, processed_computed_tokens)
        last = min(last, len(blocks))
        count = 0  # what was freed before lies before the rest
        while last - count > first and blocks[last - count - 1] is not self._null_block:
            count += 1
        self._saved[request_id] += count
        if count:
            self._remove_blocks_in_range(request_id, first, last)
            metrics.counters().add("blocks_evicted", count)
            metrics.counters().add("blocks_saved", count)

    def pop_blocks_for_free(self, request_id: str) -> Any:
        """A request that ends, or is preempted, saves nothing any more."""
        self._copies.leave(request_id)
        if saved := self._saved.pop(request_id, 0):
            metrics.counters().add("blocks_saved", -saved)
        return super().pop_blocks_for_free(request_id)
