# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Random lives of requests on the layers of a worker: whatever is read is what was written."""

from __future__ import annotations

import random
import time
from collections import Counter
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from hypothesis import seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from support.block_pool import Allocator, Request, Row
from support.choices import AnySelector, any_choice
from support.kernels import REFERENCE, sparda
from vllm_sparse.kernels.types import Selected

from vllm_sparse.kv.host.geometry import Geometry, blocks_per_row
from vllm_sparse.kv.host.pager import Pager
from vllm_sparse.policies.sparda import SpardaSettings
from vllm_sparse.prefetch.fetcher import Fetcher
from vllm_sparse.prefetch.lane import LateLane, ThreadLane
from vllm_sparse.prefetch.stream import PromptStream
from vllm_sparse.steps.host import SpardaPlanner
from vllm_sparse.steps.host_layer import Layer, Runtime
from vllm_sparse.steps.host_rows import RowPlanner

LAYERS, HEADS, SIZE, DIM = 3, 2, 4, 2
MAX_LEN, MAX_ROWS, BLOCKS = 44, 4, 27
SETTINGS = SpardaSettings(
    selector="query",
    block_size=SIZE,
    kernel_stride=2,
    init_blocks=1,
    local_blocks=1,
    top_k=4,
    dense_len=6,
    staging_blocks=2,
)


def rows_of(contents: torch.Tensor, layer: int) -> torch.Tensor:
    """Keys and values of tokens, ``[..., G, 2 * D]``: another number wherever anything differs."""
    width = HEADS * 2 * DIM
    numbers = (contents[..., None] * LAYERS + layer) * width + torch.arange(width)
    return numbers.float().unflatten(-1, (HEADS, 2 * DIM))


class HalfwayError(Exception):
    """A step that fails."""


class LayerMachine(RuleBasedStateMachine):
    """Requests arrive, are computed in chunks, decode, are preempted, replayed, aborted.

    The layers are the real ones, but for three kernels: two choose any blocks that a selection
    could choose, the other compares the frames with what the content of the requests demands.
    """

    seen: ClassVar[Counter[str]] = Counter()
    ahead: ClassVar[bool]
    prefetch: ClassVar[bool]

    def __init__(self) -> None:
        super().__init__()
        self.allocator = Allocator(BLOCKS)
        self.numbers: dict[tuple[int, int], int] = {}
        self.running: list[Request] = []
        self.waiting: list[Request] = []

    @initialize(
        resident=st.sampled_from(["none", "first", "all"]),
        fused=st.booleans(),
        lane=st.sampled_from(["thread", "slow thread", "late"]),
        captured=st.booleans(),
        sparse_prefill=st.sampled_from([False, True, 5]),
    )
    def start(self, resident, fused, lane, captured, sparse_prefill) -> None:
        base = sparda("cpu") if fused else REFERENCE
        if captured:  # as start-up demands on a GPU
            sparse_prefill = bool(sparse_prefill)
        self.settings = SETTINGS.model_copy(update={"sparse_prefill": sparse_prefill})
        per_step = MAX_ROWS * HEADS * blocks_per_row(self.settings, MAX_LEN)
        whole = BLOCKS * HEADS
        assert per_step < whole, "otherwise nothing would ever be evicted"
        frames = {
            "none": (per_step,) * LAYERS,
            "first": (whole, *(per_step,) * (LAYERS - 1)),
            "all": (whole,) * LAYERS,
        }[resident]
        self.resident, self.captured = resident, captured
        geometry = Geometry(LAYERS, BLOCKS, HEADS, SIZE, DIM, 4, frames)
        view = (lambda host: host) if captured else None  # as a GPU: what is resident is not hosted
        self.pager = Pager(geometry, torch.float32, poison=True, view=view)

        def torn_copy(target, target_index, source, source_index, count) -> None:
            """What was read is old when it is written."""
            first = slice(int(count))
            held = source[source_index[first].long()]
            time.sleep(1e-4)
            target[target_index[first].long()] = held

        def resolve(table, wanted, *rest):
            self.wanted += len(wanted[wanted >= 0].unique())
            return base.resolve(table, wanted, *rest)

        kernels = base._replace(
            copy_pieces=torn_copy if lane == "slow thread" else base.copy_pieces,
            resolve=resolve,
            select_blocks=self._select,
            choose_blocks=self._choose,
            attend_frames=self._check_frames,
        )
        self.lane = LateLane() if lane == "late" else ThreadLane()
        self.counts: Counter[str] = Counter()
        self.wanted = 0
        shared = self.pager, kernels, self.lane
        self.fetcher = Fetcher(*shared, self._count, self.prefetch)
        self.stream = PromptStream(*shared, SETTINGS.staging_blocks, self._count, self.prefetch)
        caches = [
            SimpleNamespace(kv_cache=torch.zeros(BLOCKS, HEADS, 1, SIZE // 2 * DIM))
            for _ in range(LAYERS)
        ]
        self.needed: dict[tuple[int, int], torch.Tensor] = {}
        stream = SimpleNamespace(
            begin_step=self.stream.begin_step, end_step=self.stream.end_step,
            read=self._read, note_needs=self._note_needs,
        )  # fmt: skip
        selector = AnySelector(self.ahead, HEADS, DIM)
        runtime = Runtime(
            self.settings, 1.0, self.pager, kernels, selector, self.fetcher, stream, caches
        )
        self.caches = [cache.kv_cache.data_ptr() for cache in caches]
        self.layers = [Layer(runtime, number) for number in range(LAYERS)]
        self.planner = SpardaPlanner(self.settings, BLOCKS, lambda *_: None)
        self.rows = RowPlanner(self.settings, MAX_ROWS, torch.device("cpu"), captured)

    def _count(self, name: str, amount: float) -> None:
        self.counts[name] += amount

    # What users and vLLM's scheduler do.

    @rule(
        like=st.integers(0, 9),
        shared=st.integers(0, 30),
        own=st.integers(1, 20),
        follow=st.booleans(),
        copies=st.integers(1, 3),
    )
    def arrive(self, like: int, shared: int, own: int, follow: bool, copies: int) -> None:
        """Prompts begin like another request, its output included, and may go on as it will."""
        requests = self.running + self.waiting
        known = requests[like % len(requests)].tokens[:shared] if requests else []
        for copy in range(min(copies, 7 - len(requests))):
            request = Request(known)
            for _ in range(min(own, MAX_LEN - 2 - len(known))):
                self._extend(request, None if follow else copy)
            request.prompt_len = len(request.tokens)
            self.waiting.append(request)

    def _extend(self, request: Request, token: int | None = None) -> None:
        """Append a token; without one, what a greedy model would sample."""
        while len(request.contents) < len(request.tokens):
            self._number(request, request.tokens[len(request.contents)])
        if token is None:
            token = (request.contents[-1] if request.contents else 0) % 2
        request.tokens.append(token)
        self._number(request, token)

    def _number(self, request: Request, token: int) -> None:
        before = request.contents[-1] if request.contents else 0
        number = self.numbers.setdefault((before, token), len(self.numbers) + 1)
        request.contents.append(number)

    @precondition(lambda self: self.running)
    @rule(index=st.integers(0, 9), abort=st.booleans())
    def interrupt(self, index: int, abort: bool) -> None:
        request = self.running.pop(index % len(self.running))
        self._release(request)
        if not abort:
            self.waiting.insert(0, request)

    def _release(self, request: Request) -> None:
        self.allocator.release(request.blocks)
        request.blocks, request.computed = [], 0

    @precondition(lambda self: self.running or self.waiting)
    @rule(
        chunk=st.integers(1, 2 * MAX_LEN),
        picks=st.lists(st.integers(0, 9), min_size=1, max_size=2 * MAX_ROWS),
        times=st.integers(1, 12),
        seed=st.integers(0, 1 << 16),
        failure=st.sampled_from(["", "", "", "", "", "chosen", "read", "done"]),
        failing_layer=st.integers(0, LAYERS - 1),
        retry=st.booleans(),
    )
    def steps(self, chunk, picks, times, seed, failure, failing_layer, retry) -> None:
        for time_ in range(times):
            if not self.running + self.waiting:
                return
            self.choice = random.Random(seed + time_)
            requests = self.running + self.waiting
            rows = self._schedule([requests[pick % len(requests)] for pick in picks], chunk)
            if not rows:
                return
            self._step(rows, (failing_layer, failure) if time_ + 1 == times else None, retry)

    @precondition(lambda self: self.running)
    @rule(index=st.integers(0, 9), chunk=st.integers(20, MAX_LEN), seed=st.integers(0, 1 << 16))
    def overtake(self, index: int, chunk: int, seed: int) -> None:
        """A preempted request comes back in the very step that another one computes its prefix."""
        back = self.running[index % len(self.running)]
        if len(back.tokens) > MAX_LEN - 2:
            return
        self.running.remove(back)
        for block in back.blocks:  # as if others had used them in between
            if self.allocator.references[block] == 1:
                self.allocator.forget(block)
        self._release(back)
        ahead = Request(back.tokens)
        self._extend(ahead, 0)
        ahead.prompt_len = len(ahead.tokens)
        self.waiting += [ahead, back]
        self.choice = random.Random(seed)
        if rows := self._schedule([ahead, back], chunk):
            self._step(rows, None, False)

    # vLLM's scheduler.

    def _schedule(self, requests: list[Request], chunk: int) -> list[Row]:
        rows: list[Row] = []
        for request in dict.fromkeys(requests):
            if len(rows) == MAX_ROWS:
                break
            if request.computed == len(request.tokens):
                if len(request.tokens) == MAX_LEN:
                    self.running.remove(request)
                    self._release(request)
                    continue
                self._extend(request)
            if self._allocate(request, chunk):
                start, request.computed = request.computed, self._end(request, chunk)
                rows.append(Row(request, start, request.computed))
                self._publish(request)
        self.choice.shuffle(rows)
        return rows

    def _end(self, request: Request, chunk: int) -> int:
        return min(request.computed + chunk, len(request.tokens))

    def _allocate(self, request: Request, chunk: int) -> bool:
        fresh = request in self.waiting
        if fresh:
            for last in range(SIZE - 1, len(request.tokens) - 1, SIZE):
                block = self.allocator.block_of.get(request.contents[last])
                if block is None:
                    break
                self.allocator.share(block)
                request.blocks.append(block)
            request.computed = len(request.blocks) * SIZE
        more = -(-self._end(request, chunk) // SIZE) - len(request.blocks)
        if more > len(self.allocator.free):
            if fresh:
                self._release(request)
            return False
        request.blocks += [self.allocator.allocate() for _ in range(more)]
        if fresh:
            self.waiting.remove(request)
            self.running.append(request)
        return True

    def _publish(self, request: Request) -> None:
        """As vLLM does: before the step has computed anything."""
        for index in range(request.computed // SIZE):
            content = request.contents[(index + 1) * SIZE - 1]
            self.allocator.publish(request.blocks[index], content)

    # The worker.

    def _step(self, rows: list[Row], failure, retry: bool) -> None:
        step, by_begin = self._plan(rows)
        contents = torch.tensor(
            [c for row in rows for c in row.request.contents[row.start : row.end]]
        )
        self.seen["steps"] += 1
        self.seen["late tiles"] += sum(tile.late for tile in step.tiles)
        if step.decode is not None and step.decode.unframed is not None:
            self.seen["lone prompt tokens"] += int((step.decode.unframed > 0).sum())
        if self.settings.sparse_prefill and step.decode is not None:
            assert step.decode.unframed is None or not step.decode.unframed.any()
            alike = self.settings.prompts_like_outputs
            for begin, position in zip(
                step.decode.tokens.index.tolist(), step.decode.framed.tolist(), strict=True
            ):
                in_prompt = 0 <= position < by_begin[begin].request.prompt_len
                self.seen["prompt tokens in frames"] += in_prompt
                assert alike or not in_prompt
        for prompt in step.prompts:
            row = by_begin[prompt.begin]
            assert (prompt.start, len(prompt)) == (row.start, row.end - row.start)
            assert sum(step.tiles[i].tokens for i in range(*prompt.tiles)) == row.start
            alone = len(prompt) == 1 and prompt.start >= row.request.prompt_len
            self.seen["decodes that borrow"] += alone
            self.seen["replays"] += prompt.start < row.request.prompt_len < row.end
        try:
            self._forward(step, contents, by_begin, failure)
        except HalfwayError:
            self.seen["failed steps"] += 1
            if retry:
                self._forward(step, contents, by_begin, None)
            else:
                self._undo(rows)
        self._check()

    def _plan(self, rows: list[Row]):
        """As the metadata builder does."""
        lengths = torch.tensor([row.end - row.start for row in rows])
        starts = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0))).int()
        # vLLM's table holds old entries beyond a row's blocks.
        table = torch.tensor(
            [[self.choice.randrange(BLOCKS) for _ in range(-(-MAX_LEN // SIZE))] for _ in rows]
        ).int()
        for line, row in zip(table, rows, strict=True):
            line[: len(row.request.blocks)] = torch.tensor(row.request.blocks)
        ends = torch.tensor([row.end for row in rows]).int()
        prompts = torch.tensor([row.request.prompt_len for row in rows]).int()
        step = None
        if bool((lengths == 1).all()):
            prefilling = bool((ends <= prompts).any())
            step = self.rows.plan(self.planner, ends, ends, prompts, table, prefilling)
            self.seen["batches of single tokens"] += step is not None
        if step is None:
            step = self.planner.plan(starts, ends, prompts, table)
        return step, dict(zip(starts.tolist(), rows, strict=False))

    def _undo(self, rows: list[Row]) -> None:
        """Preempt all requests of a step that failed; nothing that it wrote may be shared."""
        for row in rows:
            for block in row.request.blocks[row.start // SIZE :]:
                self.allocator.forget(block)
        for row in rows:
            self._release(row.request)
            self.running.remove(row.request)
            self.waiting.append(row.request)
        self.fetcher.begin_step()
        self.stream.begin_step(())

    def _forward(self, step, contents, by_begin, failure) -> None:
        self.now, self.by_begin, self.failure = step, by_begin, failure
        self.logical: dict[int, torch.Tensor] = {}
        query = torch.zeros(len(contents), HEADS, DIM)
        for number, layer in enumerate(self.layers):
            self.number = number
            key, value = rows_of(contents, number).split(DIM, -1)
            layer.run(query, key, value, step, torch.zeros_like(query))
            if failure == (number, "done"):
                raise HalfwayError

    def _select(self, compressed, vectors, table, positions, *_, dense_len) -> Selected:
        """Any choice of blocks that the selection could make."""
        layer = self.caches.index(compressed.data_ptr())
        if self.failure == (layer, "chosen"):
            raise HalfwayError
        assert dense_len == SETTINGS.dense_len
        logical = torch.full((len(positions), HEADS, 6), -1)
        lengths = torch.zeros(len(positions), dtype=torch.int32)
        for r, position in enumerate(positions.tolist()):
            if position < 0:
                continue
            own = position // SIZE
            count = own + 1 if position < dense_len else SETTINGS.blocks_read
            assert own < count or vectors is not None
            for head in range(HEADS):
                chosen = any_choice(self.choice, own, count)
                logical[r, head, : len(chosen)] = torch.tensor(chosen)
            lengths[r] = (len(chosen) - 1) * SIZE + position % SIZE + 1
        physical = table.long().unsqueeze(1).expand(-1, HEADS, -1)
        blocks = physical.gather(2, logical.clamp(min=0)) * HEADS + torch.arange(HEADS)[:, None]
        pieces = torch.where(logical < 0, -1, blocks).int()
        for number in range(LAYERS) if vectors is None else (layer,):
            self.logical[number] = logical
        return Selected(logical.int(), pieces, lengths)

    def _choose(self, compressed, vectors, table, positions, ranking, blocks) -> torch.Tensor:
        """The same for tokens of prompts."""
        chosen = torch.zeros(HEADS, len(positions), len(table), dtype=torch.bool)
        for t, position in enumerate(positions.tolist()):
            assert position >= SETTINGS.dense_len
            for head in range(HEADS):
                chosen[head, t, any_choice(self.choice, position // SIZE, blocks.top_k)] = True
        return chosen

    def _check_frames(self, slab, query, output, frames, lengths, scale, unframed, scales) -> None:
        if self.failure == (self.number, "read"):
            raise HalfwayError
        rows = self.now.decode
        logical = self.logical.pop(self.number)
        assert (frames >= 0).equal(logical >= 0)
        positions = logical[..., None] * SIZE + torch.arange(SIZE)
        visible = (logical >= 0)[..., None] & (positions <= rows.framed.view(-1, 1, 1, 1))
        assert visible.sum((2, 3)).equal(lengths.long()[:, None].expand(-1, HEADS))
        known = torch.zeros(len(query), MAX_LEN + SIZE, dtype=torch.int64)
        for line, begin in zip(known, rows.tokens.index.tolist(), strict=True):
            mine = self.by_begin[begin].request.contents
            line[: len(mine)] = torch.tensor(mine)
        line = torch.arange(len(query)).view(-1, 1, 1, 1)
        expected = rows_of(known[line, positions.clamp(min=0)], self.number)
        expected = expected[:, torch.arange(HEADS), :, :, torch.arange(HEADS)].transpose(0, 1)
        read = slab[frames.clamp(min=0).long()]
        assert read[visible].equal(expected[visible]), f"layer {self.number} reads foreign rows"
        whole = torch.zeros(len(query)) if unframed is None else unframed.lengths
        assert ((whole > 0) == (rows.framed < 0)).all()
        for row, length in enumerate(whole.int().tolist()):
            place = torch.arange(length)
            block = unframed.table[row, place // SIZE].long() if length else place
            read = self.pager.layers[self.number].host[block, :, place % SIZE]
            assert read.equal(rows_of(known[row, :length], self.number))

    def _note_needs(self, tiles: tuple[int, int], chosen: torch.Tensor, earlier: int) -> None:
        self.needed[tiles] = chosen.any(1)
        self.stream.note_needs(tiles, chosen, earlier)

    def _read(self, layer: int, index: int) -> torch.Tensor:
        staged, tile = self.stream.read(layer, index), self.now.tiles[index]
        (prompt,) = (p for p in self.now.prompts if p.tiles[0] <= index < p.tiles[1])
        before = tile.first_block * SIZE
        contents = self.by_begin[prompt.begin].request.contents
        mine = torch.tensor(contents[before : before + tile.tokens])
        wanted = torch.ones(HEADS, tile.tokens, dtype=torch.bool)
        assert tile.picked == (prompt.sparse_from == 0)
        if tile.picked:
            block = torch.arange(before, before + tile.tokens) // SIZE
            wanted = self.needed[prompt.tiles][:, block]
            self.seen["unread"] += bool((~wanted).any())
            in_prompt = prompt.start < self.by_begin[prompt.begin].request.prompt_len
            self.seen["picked in prompts"] += in_prompt
            self.seen["picked, late"] += in_prompt and tile.late
        assert staged[:, : tile.tokens][wanted].equal(rows_of(mine, layer).transpose(0, 1)[wanted])
        return staged

    def _check(self) -> None:
        self.fetcher.end_step()
        self.pager.check_integrity()
        geometry = self.pager.geometry
        assert self.counts["frame_hits"] + self.counts["frame_misses"] == self.wanted
        fetched = self.counts["frame_misses"] * geometry.piece_bytes
        assert self.counts["host_to_device_bytes"] == fetched
        if self.resident == "all":
            assert not fetched
            assert not self.counts["streamed_bytes"]
        self.seen.update({k: self.counts[k] > 0 for k in ("frame_hits", "frame_misses")})
        self.seen["wasted"] += self.counts["prefetch_wasted"] > 0
        slots = [
            (request.blocks[p // SIZE], p % SIZE, request.contents[p])
            for request in self.running
            for p in range(request.computed)
        ]
        if slots:
            block, offset, contents = torch.tensor(slots).T
            for layer, pager in enumerate(self.pager.layers):
                assert pager.host[block, :, offset].equal(rows_of(contents, layer))

    def teardown(self) -> None:
        if hasattr(self, "lane"):
            self.lane.close()
        for request in self.running:
            self._release(request)
        assert len(self.allocator.free) == BLOCKS - 1


@pytest.mark.slow
def test_random_lives() -> None:
    LayerMachine.seen.clear()
    seen, events = LayerMachine.seen, (
        *("late tiles", "decodes that borrow", "replays", "failed steps", "lone prompt tokens"),
        *("batches of single tokens", "frame_hits", "frame_misses", "wasted"),
        *("unread", "picked in prompts", "picked, late", "prompt tokens in frames"),
    )  # fmt: skip
    lives = settings(max_examples=30, stateful_step_count=40, deadline=None)
    # Left to chance, whole runs go by without a fetch ahead that nobody reads.
    kinds = ((False, False), (False, True), (True, False), (True, True))
    for number, (ahead, prefetch) in enumerate(kinds * 5):
        LayerMachine.ahead, LayerMachine.prefetch = ahead, prefetch
        run_state_machine_as_test(seed(number)(LayerMachine), settings=lives)
        # What a seed gives is another thing with the next Hypothesis.
        if number % 4 == 3 and seen["steps"] > 1000 and all(seen[event] for event in events):
            return
    raise AssertionError(f"the machine shows less than it says: {seen}")
