# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Random lives of requests on host blocks and frames: whatever is read is what was written."""

from __future__ import annotations

import random
import time
from collections import Counter, deque
from typing import ClassVar, NamedTuple

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from vllm_sparse.kernels import dispatch
from vllm_sparse.kernels.reference import paging as reference

from vllm_sparse.config import SpardaSettings
from vllm_sparse.errors import IntegrityError
from vllm_sparse.kv.host.geometry import Geometry, blocks_per_row
from vllm_sparse.kv.host.pager import Pager
from vllm_sparse.prefetch.engine import ThreadCopyEngine
from vllm_sparse.prefetch.scheduler import PrefetchScheduler
from vllm_sparse.prefetch.stream import PromptStream
from vllm_sparse.steps.host import SpardaPlanner

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
FUSED = dispatch.sparda_paging("cpu")
REFERENCE = FUSED._replace(resolve=reference.resolve, copy_pieces=reference.copy_pieces)


def make_pager(frames: tuple[int, ...], kernels=REFERENCE, poison: bool = True) -> Pager:
    geometry = Geometry(LAYERS, BLOCKS, HEADS, SIZE, DIM, 4, frames)
    return Pager(geometry, torch.float32, kernels, poison)


def rows_of(contents: torch.Tensor, layer: int) -> torch.Tensor:
    """Keys and values of tokens, ``[..., G, 2 * D]``: another number wherever anything differs."""
    width = HEADS * 2 * DIM
    numbers = (contents[..., None] * LAYERS + layer) * width + torch.arange(width)
    return numbers.float().unflatten(-1, (HEADS, 2 * DIM))


class Request:
    """What the scheduler of vLLM knows of a request."""

    def __init__(self, prompt: list[int]) -> None:
        self.prompt_len = len(prompt)
        self.tokens = list(prompt)
        self.contents: list[int] = []  # of each token: a number for all tokens up to it
        self.blocks: list[int] = []
        self.computed = 0


class Allocator:
    """vLLM's block pool: counts references, shares full blocks, forgets them when it must."""

    def __init__(self) -> None:
        self.free = deque(range(1, BLOCKS))  # block 0 is vLLM's null block
        self.references: Counter[int] = Counter()
        self.block_of: dict[int, int] = {}
        self.content_of: dict[int, int] = {}

    def allocate(self) -> int:
        block = self.free.popleft()
        self.forget(block)
        self.references[block] = 1
        return block

    def share(self, block: int) -> None:
        if not self.references[block]:
            self.free.remove(block)
        self.references[block] += 1

    def publish(self, block: int, content: int) -> None:
        if content not in self.block_of:
            self.block_of[content] = block
            self.content_of[block] = content

    def forget(self, block: int) -> None:
        content = self.content_of.pop(block, None)
        self.block_of.pop(content, None)

    def release(self, blocks: list[int]) -> None:
        for block in reversed(blocks):
            self.references[block] -= 1
            assert self.references[block] >= 0
            if not self.references[block]:
                self.free.append(block)


class Row(NamedTuple):
    request: Request
    start: int
    end: int


class LateEngine:
    """Copies as late as it may; the thread may be as early as it can."""

    def __init__(self, copy) -> None:
        self._copy = copy
        self._jobs: deque[LateEngine.Job] = deque()

    class Job:
        def __init__(self, engine, arguments) -> None:
            self.engine, self.arguments = engine, arguments
            self.done = not len(arguments[1])

        def wait(self) -> float:
            while not self.done:
                self.engine.copy_one()
            return 0.0

    def index(self, values, device):
        return values

    def submit(self, *arguments):
        job = self.Job(self, arguments)
        if not job.done:
            self._jobs.append(job)
        return job

    def copy_one(self) -> None:
        job = self._jobs.popleft()
        self._copy(*job.arguments)
        job.done = True

    def close(self) -> None:
        while self._jobs:
            self.copy_one()


class HalfwayError(Exception):
    """A step that fails."""


class PagingMachine(RuleBasedStateMachine):
    """Requests arrive, are computed in chunks, decode, are preempted, replayed, aborted.

    The worker does what ``SpardaImpl.forward`` does; every row that it reads is compared with what
    the content of its request demands.
    """

    seen: ClassVar[Counter[str]] = Counter()

    def __init__(self) -> None:
        super().__init__()
        self.allocator = Allocator()
        self.numbers: dict[tuple[int, int], int] = {}
        self.running: list[Request] = []
        self.waiting: list[Request] = []

    @initialize(
        ahead=st.booleans(),
        prefetch=st.booleans(),
        resident=st.sampled_from(["none", "first", "all"]),
        fused=st.booleans(),
        engine=st.sampled_from(["thread", "slow thread", "late"]),
    )
    def start(self, ahead: bool, prefetch: bool, resident: str, fused: bool, engine: str) -> None:
        kernels = FUSED if fused else REFERENCE
        per_step = MAX_ROWS * HEADS * blocks_per_row(SETTINGS, MAX_LEN)
        whole = BLOCKS * HEADS
        assert per_step < whole, "otherwise nothing would ever be evicted"
        frames = {
            "none": (per_step,) * LAYERS,
            "first": (whole, *(per_step,) * (LAYERS - 1)),
            "all": (whole,) * LAYERS,
        }[resident]
        self.ahead, self.prefetch, self.resident = ahead, prefetch, resident
        self.pager = make_pager(frames, kernels)

        def slow(*arguments) -> None:
            time.sleep(1e-4)
            kernels.copy_pieces(*arguments)

        if engine == "late":
            self.engine = LateEngine(kernels.copy_pieces)
        else:
            self.engine = ThreadCopyEngine(slow if engine == "slow thread" else kernels.copy_pieces)
        self.counts: Counter[str] = Counter()
        self.streamed: Counter[str] = Counter()
        self.scheduler = PrefetchScheduler(self.pager, self.engine, self._count, prefetch)
        self.stream = PromptStream(
            self.pager, self.engine, SETTINGS.staging_blocks, self._count_streamed, prefetch
        )
        self.planner = SpardaPlanner(SETTINGS, BLOCKS, lambda *_: None)
        self.wanted = 0
        self.wanted_later: dict[int, int] = {}

    def _count(self, name: str, amount: float) -> None:
        self.counts[name] += amount

    def _count_streamed(self, name: str, amount: float) -> None:
        self.streamed[name] += amount

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
        failure=st.sampled_from(["", "", "", "", "announced", "taken"]),
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
        lengths = torch.tensor([row.end - row.start for row in rows])
        query_start = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0))).int()
        # vLLM's table holds old entries beyond a row's blocks.
        table = torch.tensor(
            [[self.choice.randrange(BLOCKS) for _ in range(-(-MAX_LEN // SIZE))] for _ in rows]
        ).int()
        for line, row in zip(table, rows, strict=True):
            line[: len(row.request.blocks)] = torch.tensor(row.request.blocks)
        step = self.planner.plan(
            query_start,
            torch.tensor([row.end for row in rows]).int(),
            torch.tensor([row.request.prompt_len for row in rows]).int(),
            table,
        )
        contents = torch.tensor(
            [c for row in rows for c in row.request.contents[row.start : row.end]]
        )
        by_begin = dict(zip(query_start.tolist(), rows, strict=False))
        self.seen["steps"] += 1
        self.seen["late tiles"] += sum(tile.late for tile in step.tiles)
        for prompt in step.prompts:
            row = by_begin[prompt.begin]
            alone = prompt.end - prompt.begin == 1 and prompt.start >= row.request.prompt_len
            self.seen["decodes that borrow"] += alone
            self.seen["replays"] += prompt.start < row.request.prompt_len < row.end
        try:
            self._forward(step, contents, by_begin, failure)
        except HalfwayError:
            self.seen["failed steps"] += 1
            # Rows that were not stored in their frames yet are stored by the repetition.
            if retry or failure[1] == "announced":
                self._forward(step, contents, by_begin, None)
            else:
                self._undo(rows)
        self._check()

    def _undo(self, rows: list[Row]) -> None:
        """Preempt all requests of a step that failed; nothing that it wrote may be shared."""
        for row in rows:
            for block in row.request.blocks[row.start // SIZE :]:
                self.allocator.forget(block)
        for row in rows:
            self._release(row.request)
            self.running.remove(row.request)
            self.waiting.append(row.request)
        self.scheduler.begin_step()
        self.stream.begin_step(())

    def _forward(self, step, contents, by_begin, failure) -> None:
        self.logical: dict[int, torch.Tensor] = {}
        for layer, pager in enumerate(self.pager.layers):
            if layer == 0:
                self.scheduler.begin_step()
                self.stream.begin_step(step.tiles)
                self.wanted_later.clear()
            rows = rows_of(contents, layer)
            pager.write_host(step.slots, rows)
            if pager.resident:
                pager.write_frames(step.slots, rows)
            elif len(step.prompt_blocks):
                pager.drop(step.prompt_blocks)
            if step.decode is not None:
                self._decode(layer, step, rows, by_begin, failure)
            for prompt in step.prompts:
                self._prompt(layer, step, prompt, by_begin[prompt.begin])
            if failure == (layer, "taken"):
                raise HalfwayError

    def _decode(self, layer: int, step, rows, by_begin, failure) -> None:
        if layer == 0 or not self.ahead:
            self._announce(layer, step.decode, ahead=False)
        if self.ahead and layer + 1 < LAYERS:
            self._announce(layer + 1, step.decode, ahead=True)
        if failure == (layer, "announced"):
            raise HalfwayError
        frames = self.scheduler.take(layer)
        self.wanted += self.wanted_later.pop(layer, 0)
        pager, decode = self.pager.layers[layer], step.decode
        index = decode.tokens.index
        if not pager.resident:
            pager.write_frames(step.slots[index], rows[index])

        logical = self.logical.pop(layer)
        assert (frames >= 0).equal(logical >= 0)
        positions = logical[..., None] * SIZE + torch.arange(SIZE)
        visible = (logical >= 0)[..., None] & (
            positions <= decode.tokens.positions.view(-1, 1, 1, 1)
        )
        assert visible.sum((2, 3)).equal(decode.lengths.long()[:, None].expand(-1, HEADS))
        known = torch.zeros(len(index), MAX_LEN + SIZE, dtype=torch.int64)
        for line, begin in zip(known, index.tolist(), strict=True):
            mine = by_begin[begin].request.contents
            line[: len(mine)] = torch.tensor(mine)
        line = torch.arange(len(index)).view(-1, 1, 1, 1)
        expected = rows_of(known[line, positions.clamp(min=0)], layer)
        expected = expected[:, torch.arange(HEADS), :, :, torch.arange(HEADS)].transpose(0, 1)
        read = pager.slab[frames.clamp(min=0).long()]
        assert read[visible].equal(expected[visible]), f"layer {layer} reads foreign rows"

    def _announce(self, layer: int, decode, *, ahead: bool) -> None:
        """Announce any choice of blocks that the selection could make."""
        logical = torch.full((len(decode.lengths), HEADS, decode.width), -1)
        for r, position in enumerate(decode.tokens.positions.tolist()):
            own = position // SIZE
            assert bool(decode.everything[r]) == (
                position < SETTINGS.dense_len or own < SETTINGS.blocks_read
            )
            for head in range(HEADS):
                chosen = set(range(own + 1))
                if not decode.everything[r]:
                    extra = SETTINGS.blocks_read - 3
                    chosen = {0, own - 1, own, *self.choice.sample(range(1, own - 1), extra)}
                logical[r, head, : len(chosen)] = torch.tensor(sorted(chosen))
        assert (logical >= 0).any(0).any(0).all(), "width is more than any row reads"
        physical = decode.block_table.unsqueeze(1).expand(-1, HEADS, -1)
        blocks = torch.where(logical < 0, -1, physical.gather(2, logical.clamp(min=0)))
        self.logical[layer] = logical
        pieces = {(b, g) for line in blocks.tolist() for g, row in enumerate(line) for b in row}
        count = sum(block >= 0 for block, _ in pieces)
        if ahead and not self.prefetch:
            self.wanted_later[layer] = count
        else:
            self.wanted += count
        self.scheduler.announce(layer, blocks, ahead=ahead)

    def _prompt(self, layer: int, step, prompt, row: Row) -> None:
        assert (prompt.start, prompt.end - prompt.begin) == (row.start, row.end - row.start)
        covered = 0
        for index in range(*prompt.tiles):
            tile = step.tiles[index]
            staged = self.stream.read(layer, index)
            assert tile.first_block * SIZE == covered
            mine = torch.tensor(row.request.contents[covered : covered + tile.tokens])
            covered += tile.tokens
            assert staged[:, : tile.tokens].equal(rows_of(mine, layer).transpose(0, 1))
        assert covered == row.start

    def _check(self) -> None:
        self.pager.check_integrity()
        geometry = self.pager.geometry
        assert self.counts["frame_hits"] + self.counts["frame_misses"] == self.wanted
        fetched = self.counts["frame_misses"] * geometry.piece_bytes
        assert self.counts["host_to_device_bytes"] == fetched
        if self.resident == "all":
            assert not fetched
            assert not self.streamed["streamed_bytes"]
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
        if hasattr(self, "engine"):
            self.engine.close()
        for request in self.running:
            self._release(request)
        assert len(self.allocator.free) == BLOCKS - 1


@pytest.mark.slow
def test_random_lives() -> None:
    PagingMachine.seen.clear()
    PagingMachine.TestCase.settings = settings(
        max_examples=90, stateful_step_count=40, deadline=None
    )
    PagingMachine.TestCase().runTest()
    seen = PagingMachine.seen
    assert seen["steps"] > 1000
    for event in (
        *("late tiles", "decodes that borrow", "replays", "failed steps"),
        *("frame_hits", "frame_misses", "wasted"),
    ):
        assert seen[event], f"no {event}: the machine shows less than it says ({seen})"


def fetch(pager: Pager, blocks: torch.Tensor) -> torch.Tensor:
    """Read blocks in the first layer."""
    layer = pager.layers[0]
    found = layer.resolve(blocks)
    reference.copy_pieces(layer.slab, found.targets, layer.pieces, found.missing)
    return found.frames


@pytest.fixture
def pager() -> Pager:
    """Blocks 3 and 5 are written and in frames of the first layer."""
    pager = make_pager((8, 8, 8))
    slots = torch.tensor([*range(12, 16), *range(20, 23)])
    pager.layers[0].write_host(slots, rows_of(torch.arange(7), 0))
    fetch(pager, torch.tensor([3, 5]).expand(1, HEADS, -1))
    pager.check_integrity()
    return pager


def test_integrity_notices_a_frame_that_differs_from_its_block(pager: Pager) -> None:
    pager.layers[0].write_host(torch.tensor([23]), rows_of(torch.tensor([7]), 0))
    with pytest.raises(IntegrityError, match="differs from its block"):
        pager.check_integrity()
    pager.layers[0].write_frames(torch.tensor([23]), rows_of(torch.tensor([7]), 0))
    pager.check_integrity()


def test_integrity_notices_two_pieces_in_one_frame(pager: Pager) -> None:
    table = pager.layers[0].table
    table.frame_of[3 * HEADS] = table.frame_of[5 * HEADS]
    with pytest.raises(IntegrityError, match="share a frame"):
        pager.check_integrity()


def test_integrity_notices_a_frame_whose_piece_is_elsewhere(pager: Pager) -> None:
    pager.layers[0].table.frame_of[3 * HEADS] = -1
    with pytest.raises(IntegrityError, match="elsewhere"):
        pager.check_integrity()


def test_a_dropped_block_is_fetched_again(pager: Pager) -> None:
    assert pager.frames_in_use() == 2 * HEADS
    pager.layers[0].drop(torch.tensor([3, 3, 9]))  # block 9 has no frames
    assert pager.frames_in_use() == HEADS
    pager.check_integrity()
    assert int(pager.layers[0].slab.isnan().all(-1).all(-1).sum()) == 8 - HEADS
    found = pager.layers[0].resolve(torch.tensor([3, 5]).expand(1, HEADS, -1))
    assert found.hits == HEADS
    assert sorted(found.missing.tolist()) == [3 * HEADS, 3 * HEADS + 1]


def test_a_reused_block_forgets_its_past(pager: Pager) -> None:
    """Its first token comes: with poison, nothing of the last owner can be read."""
    layer = pager.layers[0]
    slot, rows = torch.tensor([12]), rows_of(torch.tensor([9]), 0)
    layer.write_host(slot, rows)
    layer.write_frames(slot, rows)
    pager.check_integrity()
    assert layer.host[3, :, 0].equal(rows[0])
    assert layer.host[3, :, 1:].isnan().all()
    assert layer.slab[layer.table.frame_of[3 * HEADS].long()][1:].isnan().all()


def test_the_slab_full_error_names_the_frames() -> None:
    with pytest.raises(reference.SlabFullError, match="all 8 frames"):
        make_pager((8, 8, 8)).layers[0].resolve(torch.arange(5).expand(1, HEADS, -1))
