# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Copies of blocks between the prefix cache and tails, so that prompts keep their prefix hits.

A compacted request rewrites its tail, which must be private to it. So a hit that reaches into the
tail is copied into blocks of the request's own, and what the prompt has left in the tail is copied
out before it is rewritten, to be published. Workers copy at the start of a step whatever a manager
of vLLM asks them to: after blocks are zeroed, before the step is planned, all at once. Until then
both ends of a copy hold one more reference, which vLLM's scheduler gives back.
"""

from __future__ import annotations

from itertools import groupby, takewhile
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from vllm.v1.core.kv_cache_utils import resolve_block_hashes

from vllm_sparse import metrics
from vllm_sparse.kv.requests import case_of, of_id

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.request import Request

    from vllm_sparse.kv.manager import PolicyManager

_unwritten: WeakKeyDictionary[BlockPool, set[int]] = WeakKeyDictionary()
# Blocks that the last lookup left, and why.
_cut: WeakKeyDictionary[Request, tuple[int, str]] = WeakKeyDictionary()


def unwritten(pool: BlockPool) -> set[int]:
    """Blocks that were published since the scheduler began a step, which will write them.

    Whoever reads them in that step finds them written, but copies are made before.
    """
    return _unwritten.setdefault(pool, set())


def copyable(
    pool: BlockPool,
    request: Request,
    row: Sequence[KVCacheBlock],
    tail: range,
    size: int,
    most: int,
) -> int:
    """How many leading blocks of a hit a request can take in this step.

    Of its tail those that are written, that a step may copy, and that fit, each beside its copy,
    into a pool that must hold the whole request. The rest is computed: waiting would hold up
    whoever is behind.

    Args:
        pool: Of blocks.
        request: The request.
        row: What the prefix cache has of it.
        tail: Full prompt blocks that are copied.
        size: Tokens per block.
        most: Blocks that a step may copy.
    """
    _cut.pop(request, None)
    in_use = sum(block.ref_cnt > 0 for block in row[: tail.start])
    # One more for drafts, or the first outputs.
    room = pool.get_num_free_blocks() - (-(-request.num_tokens // size) + 1 - in_use)
    for place in range(tail.start, len(row)):
        if row[place].block_id in unwritten(pool):
            return place
        if row[place].ref_cnt == 0 and (room := room - 1) < 0:
            _cut[request] = len(row) - place, "hit_cut"
            return place
        if place - tail.start == most:
            _cut[request] = len(row) - place, "step_limit"
            return place
    return len(row)


class PrefixCopies:
    """What a block manager copies.

    Args:
        manager: The manager.
    """

    def __init__(self, manager: PolicyManager) -> None:
        self._manager = manager
        self._pool = manager.block_pool
        self._hits: dict[str, range] = {}
        self._out: dict[str, dict[int, KVCacheBlock]] = {}  # by place in the request
        self._counted = 0, 0  # requests, and the blocks that they wanted, in this step

    def _tail(self, request: Request) -> range:
        """Full prompt blocks that are not shared, empty where nothing is copied."""
        if not self._manager.enable_caching:
            return range(0)
        tail: range = self._manager.kv_cache_spec.tail_blocks(*case_of(request))
        return tail

    # -- in ----------------------------------------------------------------------------------------

    def _hit_tail(self, request_id: str, hit_blocks: Sequence[KVCacheBlock], tokens: int) -> range:
        request = of_id(self._pool, request_id) if hit_blocks else None
        if request is None or not (tail := self._tail(request)):
            return range(0)
        # vLLM itself copies a last block that is hit in part only.
        return range(tail.start, min(len(hit_blocks), tokens // self._manager.block_size))

    def blocks_needed(
        self, request_id: str, hit_blocks: Sequence[KVCacheBlock], hit_tokens: int
    ) -> int:
        """Blocks that a new request needs beside those of its tokens, to copy what it has hit.

        Args:
            request_id: The request.
            hit_blocks: What the prefix cache has of it.
            hit_tokens: How many tokens of it.
        """
        if not hit_blocks:  # as of every request that runs, in every step
            return 0
        needed, queued = len(self._hit_tail(request_id, hit_blocks, hit_tokens)), self._queued
        if needed and queued and queued + needed > self._manager.kv_cache_spec.most_copies:
            return self._pool.num_gpu_blocks  # the next step has room for it
        return needed

    def note_hit(
        self, request_id: str, hit_blocks: Sequence[KVCacheBlock], hit_tokens: int
    ) -> None:
        """Remember what of a hit must be copied, once all groups hold what they have hit."""
        if hit := self._hit_tail(request_id, hit_blocks, hit_tokens):
            self._hits[request_id] = hit

    def copy_in(self, request: Request) -> list[KVCacheBlock]:
        """Put private blocks where a hit reaches into the tail.

        Returns:
            These blocks.
        """
        if _cut:  # rarely; every request comes here in every step
            _count_skipped(*_cut.pop(request, (0, "hit_cut")))
        if not (hit := self._hits.pop(request.request_id, range(0))):
            return []
        blocks, private = self._manager.req_to_blocks[request.request_id], self._new(len(hit))
        # Given back in this order, so that a prefix is evicted from its end on.
        for place, copy in reversed(list(zip(hit, private, strict=True))):
            self._queue(blocks[place], copy)
            blocks[place].ref_cnt -= 1  # the request's: it has the copy now
            blocks[place] = copy
        metrics.counters().add("prefix_blocks_copied_in", len(hit))
        metrics.counters().add("prefix_tokens_copied_in", len(hit) * self._manager.block_size)
        return private

    # -- out ---------------------------------------------------------------------------------------

    def copy_out(self, request: Request) -> None:
        """Copy a tail that the step about to be scheduled rewrites, if there is ample room.

        That is the step that begins at the prompt's end. What others have published is left out.
        """
        request_id = request.request_id
        if request.num_computed_tokens != request.num_prompt_tokens or request_id in self._out:
            return
        if not (places := self._missing(request, self._tail(request))):
            return
        room = self._room(len(places))
        most = self._manager.kv_cache_spec.most_copies - self._queued
        count = max(min(room, most), 0)
        _count_skipped(len(places) - count, "pool_short" if room < most else "step_limit")
        places = places[:count]
        if not places:
            return
        blocks, copies = self._manager.req_to_blocks[request_id], self._new(len(places))
        self._out[request_id] = dict(zip(places, copies, strict=True))
        for place, copy in reversed(self._out[request_id].items()):
            self._queue(blocks[place], copy)
        metrics.counters().add("prefix_blocks_copied_out", len(places))

    def _room(self, blocks: int) -> int:
        """Free blocks that running requests leave in the step, or at least so many of them.

        Rows only grow in a step, so what was wanted at first is enough to know that there is room.
        """
        free, rows = self._pool.get_num_free_blocks(), len(self._manager.req_to_blocks)
        counted, wanted = self._counted
        if rows > counted or free - wanted < blocks:
            wanted = self._wanted()
            self._counted = rows, wanted
        return free - wanted

    def _wanted(self) -> int:
        """Blocks that running requests may take in the step: what their prompts lack, and one."""
        wanted, size = 0, self._manager.block_size
        for request_id, row in self._manager.req_to_blocks.items():
            request = of_id(self._pool, request_id)
            tokens = request.num_tokens if request else 0
            wanted += max(-(-tokens // size) - len(row), 0) + 1
        return wanted

    def step_starts(self) -> None:
        """Publish what the steps scheduled so far copy out: whatever is scheduled now runs later.

        Not sooner: in one step copies read before any is written.
        """
        self._counted = 0, 0
        for request_id, copies in self._out.items():
            if request := of_id(self._pool, request_id):
                self._publish(request, copies)
                self._pool.free_blocks(copies.values())
                self._refresh(request, self._tail(request))
        self._out.clear()

    def leave(self, request_id: str) -> None:
        """Publish what a request leaves that ends or is preempted: its copies or its own tail.

        The tail is untouched if the prompt is processed and no step behind it was scheduled.
        As with any request of vLLM's, the prompt is as recently used then as its last output.
        """
        copies, request = self._out.pop(request_id, {}), of_id(self._pool, request_id)
        row = self._manager.req_to_blocks.get(request_id)
        if request is None or not row:
            return
        if not self._queued:  # else by the very step, which does not take place then
            self._publish(request, copies)
        self._pool.free_blocks(copies.values())
        ended = request.num_computed_tokens == request.num_prompt_tokens
        if ended and not request.num_in_flight_tokens:
            tail = self._tail(request)
            own = {place: row[place] for place in tail}
            self._publish(request, own)
            row[tail.start : tail.stop] = [self._pool.null_block] * len(tail)
            self._pool.free_blocks(own.values())
        self._refresh(request, range(request.num_prompt_tokens // self._manager.block_size))

    # -- both --------------------------------------------------------------------------------------

    @property
    def _queued(self) -> int:
        return len(self._manager._pending_cow_copies)

    def _new(self, count: int) -> list[KVCacheBlock]:
        return self._pool.get_new_blocks(count)

    def _queue(self, source: KVCacheBlock, copy: KVCacheBlock) -> None:
        source.ref_cnt += 1
        copy.ref_cnt += 1
        self._manager._pending_cow_copies.append((source, copy))

    def _cached(self, request: Request, places: Sequence[int]) -> Iterator[KVCacheBlock | None]:
        """What the prefix cache has of a request's prompt, up to the first place without a hash.

        With some drafters vLLM 0.33 hashes a block together with tokens behind it, once it has
        them: the last of a prompt may lack its hash while outputs are awaited.
        """
        if not places:  # as where nothing is cached, whose hashes may be of no block size
            return
        pool, group = self._pool, [self._manager.kv_cache_group_id]
        hashes = resolve_block_hashes(
            request.block_hashes, pool.hash_block_size, self._manager.block_size
        )
        for place in takewhile(lambda place: place < len(hashes), places):
            found = pool.get_cached_block(hashes[place], group)
            yield found[0] if found else None

    def _missing(self, request: Request, places: Sequence[int]) -> list[int]:
        """Those of ascending places that the cache lacks and that have a hash."""
        cached = zip(places, self._cached(request, places), strict=False)
        return [place for place, block in cached if block is None]

    def _publish(self, request: Request, blocks: dict[int, KVCacheBlock]) -> None:
        """Publish blocks of a tail, by place, unless others have.

        Only neighbours at once: an event names all tokens from the first block to the last.
        """
        missing = enumerate(self._missing(request, sorted(blocks)))
        for _, run in groupby(missing, lambda numbered: numbered[1] - numbered[0]):
            places = [place for _, place in run]
            first, end = places[0], places[-1] + 1
            row = [blocks.get(place, self._pool.null_block) for place in range(end)]
            self._pool.cache_full_blocks(
                request, row, first, end, self._manager.block_size, self._manager.kv_cache_group_id
            )

    def _refresh(self, request: Request, places: Sequence[int]) -> None:
        """Have what the prefix cache has of a prompt evicted last, and from its end on.

        Up to the first block that is missing: what lies behind it is of no use.
        """
        if not self._manager.enable_caching:
            return
        blocks = list(takewhile(bool, self._cached(request, places)))
        self._pool.touch(blocks)
        self._pool.free_blocks(reversed(blocks))


def _count_skipped(blocks: int, reason: str) -> None:
    if blocks > 0:
        metrics.counters().add("prefix_blocks_not_copied", blocks, reason)
