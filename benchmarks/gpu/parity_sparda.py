# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The Triton kernels of SPARDA against their references; see `parity`.

What looks up and copies must be equal, whatever order programs run in. Blocks are chosen by sums in
another order than the reference's, so that near-ties may swap. On a GPU the host pool is pinned and
read through a device view, as in the engine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from vllm_sparse.kernels.types import Blocks, Ranking, Unframed

from benchmarks.gpu.batches_sparda import PagedCase, Pool, empty_table, make_pool, pinned
from benchmarks.gpu.compare import COMPUTED, WRONG, error, same, unless

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor
    from vllm_sparse.kernels.types import Selected

    Found = tuple[str, float, float]

SAME_BLOCKS = 0.99
STEPS = 6

CASES = (
    PagedCase("sparda, minicpm-8b", 32, 2, 128, 5, 8000, Blocks(64, 16, 1, 8, 40), 200),
    PagedCase("sparda, llama-8b", 32, 8, 128, 4, 6000, Blocks(64, 16, 1, 4, 24), 150),
    PagedCase("sparda, qwen-0.5b", 14, 2, 64, 5, 4000, Blocks(64, 16, 1, 2, 16), 131),
)
SANITIZED = (PagedCase("sparda, sanitized", 8, 2, 64, 4, 700, Blocks(64, 16, 1, 1, 5), 40),)
TINY = (PagedCase("sparda, tiny", 4, 2, 32, 4, 300, Blocks(32, 16, 1, 1, 4), 20),)


def differences(
    case: PagedCase, device: torch.device, generator: torch.Generator, graphs: bool
) -> Iterator[Found]:
    """Yields the name of each kernel, its error, and the largest that it may have."""
    pool = make_pool(case, device, generator)
    yield from _selection(case, pool, generator)
    yield "resolve", unless(_resolves_alike(case, device, generator)), 0.0
    yield "copy pieces", unless(_copies_alike(case, device, generator)), 0.0
    yield from _paged_steps(case, pool, generator, graphs and device.type == "cuda")
    yield "attend frames", _attention(case, device, generator), COMPUTED[case.dtype]
    yield "attend host rows", _host_rows(case, pool, generator), COMPUTED[case.dtype]
    yield from _parts(case, device, generator)
    yield from _tokens(case, pool, generator)  # last: it changes the pool


def _noise(case: PagedCase, *shape: int, generator: torch.Generator) -> Tensor:
    values = torch.randn(shape, generator=generator, device=generator.device)
    return values.to(case.dtype)


def _selection(case: PagedCase, pool: Pool, generator: torch.Generator) -> Iterator[Found]:
    from vllm_sparse.kernels.reference import sparda_select as ref
    from vllm_sparse.kernels.triton import sparda_select

    for name, ranking, heads in (
        ("Forecast", Ranking(False), case.kv_heads),
        ("softmax", Ranking(True, case.dim**-0.5, lag=1), case.heads),
    ):
        vectors = _noise(case, case.rows, heads + 1, case.dim, generator=generator)[:, :heads]
        arguments = (pool.compressed, vectors, pool.table, pool.positions, ranking, case.blocks)
        dense_len = 2 * case.blocks.block_size
        expected, actual = (
            module.select_blocks(*arguments, dense_len=dense_len) for module in (ref, sparda_select)
        )
        found = 1.0 - _share(case, pool, actual, expected)
        yield f"select blocks, {name}", found, 1.0 - SAME_BLOCKS


def _share(case: PagedCase, pool: Pool, actual: Selected, expected: Selected) -> float:
    """Share of the expected blocks that were chosen; ``-WRONG`` if the rest is not as it must."""
    real = expected.blocks >= 0
    head = torch.arange(case.kv_heads, device=real.device)[:, None]
    chosen = actual.blocks.clamp(min=0).long()
    physical = pool.table.long()[:, None].expand(-1, case.kv_heads, -1).gather(2, chosen)
    pieces = torch.where(real, physical * case.kv_heads + head, -1)
    ascending = (actual.blocks.diff(dim=-1) > 0) | ~real[..., 1:]
    consistent = (
        actual.lengths.equal(expected.lengths)
        and (actual.blocks >= 0).equal(real)
        and actual.pieces.equal(pieces.int())
        and bool(ascending.all())
    )
    if not consistent:
        return -WRONG
    found = (actual.blocks[..., :, None] == expected.blocks[..., None, :]).any(-1) & real
    return float(found.sum() / real.sum())


def _resolves_alike(case: PagedCase, device: torch.device, generator: torch.Generator) -> bool:
    """Whether tables and lists are the same after each of some steps, and blocks had to leave."""
    from vllm_sparse.kernels.reference import sparda_paging as ref
    from vllm_sparse.kernels.triton import sparda_paging

    pieces, size = case.num_blocks * case.kv_heads, case.wanted
    shape = (case.rows, case.kv_heads, -1)
    frames = size + size // 8
    ours = empty_table(pieces, frames, device)
    theirs = empty_table(pieces, frames, torch.device("cpu"))
    steps = [torch.zeros(1, dtype=torch.int64, device=at) for at in (device, "cpu")]
    counters = [torch.zeros(3, dtype=torch.int64, device=at) for at in (device, "cpu")]

    def random() -> Tensor:  # -1 is nothing; the same piece may be wanted several times
        return torch.randint(-1, pieces, (size,), generator=generator, device=device).int()

    wanted, missed = random(), 0
    for _ in range(STEPS):
        new = torch.rand(size, generator=generator, device=device) < 0.3
        wanted = torch.where(new, random(), wanted.flip(0))
        for step in steps:
            step += 1
        actual = sparda_paging.resolve(ours, wanted.view(shape), steps[0], counters[0])
        expected = ref.resolve(theirs, wanted.view(shape).cpu(), steps[1], counters[1])
        count = int(expected.misses)
        missed += count
        pairs = [
            *zip(ours, theirs, strict=True),
            (actual.frames, expected.frames),
            (actual.missing[:count], expected.missing[:count]),
            (actual.targets[:count], expected.targets[:count]),
            (actual.misses, expected.misses),
            (counters[0], counters[1]),
        ]
        if not all(a.cpu().equal(b) for a, b in pairs):
            return False
    return missed > frames


def _copies_alike(case: PagedCase, device: torch.device, generator: torch.Generator) -> bool:
    """Whether no, some and all pieces of a list arrive where they should, and nothing else does."""
    from vllm_sparse.kernels.reference import sparda_paging as ref
    from vllm_sparse.kernels.triton import sparda_paging

    size, most = case.blocks.block_size, case.wanted
    host = _noise(case, 2 * most, size, 2 * case.dim, generator=generator).cpu()
    source = pinned(host, device)[1]
    shuffled = torch.randperm(2 * most, generator=generator, device=device).int()
    for count in (0, 1, most - 1, most):
        index = torch.full((2, most), 1 << 30, dtype=torch.int32, device=device)
        index[0, :count], index[1, :count] = shuffled[:count], shuffled[-most:][:count]
        amount = torch.tensor([count], dtype=torch.int32, device=device)
        empty = torch.full_like(host, torch.nan)
        target = empty.to(device, copy=True)
        sparda_paging.copy_pieces(target, index[0], source, index[1], amount)
        ref.copy_pieces(empty, index[0].cpu(), host, index[1].cpu(), amount.cpu())
        if not same(target.cpu(), empty):
            return False
    return True


class _PagedLayer:
    """Chooses, fetches beside the computation and attends, as one layer of the engine does."""

    def __init__(self, case: PagedCase, pool: Pool, generator: torch.Generator) -> None:
        from vllm_sparse.prefetch.lane import LateLane, StreamLane

        self._case, self._pool, self._generator = case, pool, generator
        device = pool.table.device
        self._lane = StreamLane(device) if device.type == "cuda" else LateLane()
        size = case.blocks.block_size
        # No frame more than a step reads: whatever is chosen anew drives something out.
        reads = (pool.positions // size + 1).clamp(max=case.blocks.top_k)
        frames = case.kv_heads * int(reads.sum())
        self._slab = torch.full(
            (frames, size, 2 * case.dim), torch.nan, dtype=case.dtype, device=device
        )
        self._table = empty_table(case.num_blocks * case.kv_heads, frames, device)
        self._number = torch.zeros(1, dtype=torch.int64, device=device)
        self._counters = torch.zeros(3, dtype=torch.int64, device=device)
        self._missed = torch.zeros(1, dtype=torch.int64, device=device)
        self._query = _noise(case, case.rows, case.heads, case.dim, generator=generator)
        self._vectors = _noise(case, case.rows, case.kv_heads, case.dim, generator=generator)

    def change(self) -> None:
        """Other inputs, in the same place."""
        for part in (self._query, self._vectors):
            part.copy_(_noise(self._case, *part.shape, generator=self._generator))

    def step(self) -> tuple[Tensor, Selected]:
        """Returns the output and what it is made of."""
        from vllm_sparse.kernels.triton import sparda_attention, sparda_paging, sparda_select

        case, pool = self._case, self._pool
        self._number.add_(1)
        chosen = sparda_select.select_blocks(
            pool.compressed, self._vectors, pool.table, pool.positions, Ranking(False), case.blocks
        )
        found = sparda_paging.resolve(self._table, chosen.pieces, self._number, self._counters)

        def work() -> object:
            sparda_paging.copy_pieces(
                self._slab, found.targets, pool.pieces, found.missing, found.misses
            )
            return found

        ticket = self._lane.fork(work)
        output = torch.full_like(self._query, torch.nan)
        self._missed.add_(found.misses)
        ticket.wait()
        scale = case.dim**-0.5
        sparda_attention.attend_frames(
            self._slab, self._query, output, found.frames, chosen.lengths, scale
        )
        return output, chosen

    def error(self, output: Tensor, chosen: Selected) -> float:
        """Of a step's output, against attention over the pieces where they come from."""
        from vllm_sparse.kernels.reference import sparda_attention

        expected = torch.full_like(output, torch.nan)
        sparda_attention.attend_frames(
            self._pool.pieces, self._query, expected, chosen.pieces, chosen.lengths,
            self._case.dim**-0.5,
        )  # fmt: skip
        return error(output, expected)

    def is_sound(self) -> bool:
        """Whether frames hold their pieces, none was lacking, and pieces had to leave."""
        piece = self._table.piece_of
        held = (piece >= 0).nonzero()[:, 0]
        there = self._pool.pieces[piece[held]]
        return (
            same(self._slab[held], there)
            and not bool(self._counters[2])
            and int(self._missed) > len(piece)
        )


def _paged_steps(
    case: PagedCase, pool: Pool, generator: torch.Generator, graphs: bool
) -> Iterator[Found]:
    layer = _PagedLayer(case, pool, generator)
    worst = 0.0
    for _ in range(STEPS):
        layer.change()
        worst = max(worst, layer.error(*layer.step()))
    yield "paged steps", worst if layer.is_sound() else WRONG, COMPUTED[case.dtype]
    if not graphs:
        return
    layer = _PagedLayer(case, pool, generator)
    layer.step()  # everything is compiled by now, but libraries may still set themselves up
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = layer.step()
    worst = 0.0
    for number in range(2 * STEPS):
        layer.change()
        graph.replay()
        if number % 2:  # each second one follows at once, while the one before still runs
            worst = max(worst, layer.error(*result))
    torch.cuda.synchronize()
    yield "paged steps, graph", worst if layer.is_sound() else WRONG, COMPUTED[case.dtype]


def _attention(case: PagedCase, device: torch.device, generator: torch.Generator) -> float:
    from vllm_sparse.kernels.reference import sparda_attention as ref
    from vllm_sparse.kernels.triton import sparda_attention

    size, count, total = case.blocks.block_size, case.blocks.top_k, case.wanted
    slab = _noise(case, total + 9, size, 2 * case.dim, generator=generator)
    frames = torch.randperm(total + 9, generator=generator, device=device)[:total]
    frames = frames.view(case.rows, case.kv_heads, count).int()
    lengths = torch.randint(1, count * size, (case.rows,), generator=generator, device=device)
    lengths[0], lengths[-1] = count * size, 0
    for row, length in enumerate(lengths.tolist()):
        used = -(-length // size)
        if length % size:
            slab[frames[row, :, used - 1].long(), length % size :] = torch.nan
        slab[frames[row, :, used:].flatten().long()] = torch.nan
        frames[row, :, used:] = -1
    query = _noise(case, case.rows, case.heads + 2, case.dim, generator=generator)
    query = query[:, : case.heads]  # a slice of a fused row, as the engine has it
    outputs = [
        torch.full((case.rows, case.heads, case.dim), torch.nan, dtype=case.dtype, device=device)
        for _ in range(2)
    ]
    arguments = frames, lengths.int(), case.dim**-0.5
    ref.attend_frames(slab, query.contiguous(), outputs[0], *arguments)
    sparda_attention.attend_frames(slab, query, outputs[1], *arguments)
    return error(outputs[1], outputs[0])


def _host_rows(case: PagedCase, pool: Pool, generator: torch.Generator) -> float:
    """Rows without frames beside rows that have nothing to read."""
    from vllm_sparse.kernels.reference import sparda_attention as ref
    from vllm_sparse.kernels.triton import sparda_attention

    lengths = (pool.positions + 1).int()
    lengths[2::3] = 0
    query = _noise(case, case.rows, case.heads, case.dim, generator=generator)
    slab = torch.full_like(pool.pieces[:1], torch.nan, device=query.device)
    frames = torch.full((case.rows, case.kv_heads, 1), -1, dtype=torch.int32, device=query.device)
    outputs = [torch.full_like(query, torch.nan) for _ in range(2)]
    for module, output in zip((ref, sparda_attention), outputs, strict=True):
        module.attend_frames(
            slab, query, output, frames, torch.zeros_like(lengths), case.dim**-0.5,
            Unframed(pool.seen, pool.table, lengths),
        )  # fmt: skip
    return error(outputs[1], outputs[0])


def _parts(case: PagedCase, device: torch.device, generator: torch.Generator) -> Iterator[Found]:
    from vllm_sparse.kernels.reference import sparda_prefill as ref
    from vllm_sparse.kernels.triton import sparda_prefill

    size, tokens, scale = case.blocks.block_size, case.tokens, case.dim**-0.5
    group = case.heads // case.kv_heads
    query = _noise(case, tokens, case.heads, case.dim, generator=generator)
    query = query.view(tokens, case.kv_heads, group, case.dim).permute(1, 2, 0, 3)

    def rows(count: int) -> tuple[Tensor, ...]:
        rows = _noise(case, case.kv_heads, count, 2 * case.dim, generator=generator)
        return rows.split(case.dim, -1)

    first, blocks = 2 * size, 2 + -(-4 * tokens // size)  # keys from the third block on
    keys = blocks * size - first - 5
    chosen = torch.rand(
        (case.kv_heads, tokens, blocks), generator=generator, device=device
    ) < 0.3  # fmt: skip
    chosen[:, tokens // 3] = False  # sees nothing
    past = {"first_position": first, "block_size": size}
    for name, arguments, options in (
        ("causal", (*rows(tokens), None, True), {"first_position": 37}),
        ("chosen", (*rows(keys), chosen, False), past),
        ("chosen, past", (*rows(keys), chosen, False), {**past, "past_from": first + keys // 2}),
    ):
        expected, actual = (
            module.attend_part(query, *arguments, scale, **options)
            for module in (ref, sparda_prefill)
        )
        seen = expected[1] > -torch.inf
        worst = max(error(actual[0], expected[0]), error(actual[1][seen], expected[1][seen]))
        hidden = actual[0][~seen]
        if not (actual[1] > -torch.inf).equal(seen) or bool(hidden.any()):
            worst = WRONG
        yield f"attend part, {name}", worst, COMPUTED[case.dtype]


def _tokens(case: PagedCase, pool: Pool, generator: torch.Generator) -> Iterator[Found]:
    """Stores a step's tokens, then the windows that they complete."""
    from vllm_sparse.kernels.reference import sparda_tokens as ref
    from vllm_sparse.kernels.triton import sparda_tokens

    size, stride, device = case.blocks.block_size, case.blocks.kernel_stride, pool.table.device
    # Half of the rows complete a window; one of them in its block's first slot.
    positions = pool.positions.clone()
    positions[::2] = torch.where(
        positions[::2] < 0, -1, (positions[::2] + 1) // stride * stride - 1
    )
    positions[0] = positions[0] // size * size + stride - 1
    at = positions.clamp(min=0)
    block = pool.table.long().gather(1, at[:, None] // size)[:, 0]
    slots = torch.where(positions < 0, -1, block * size + at % size)
    fused = _noise(case, case.rows, 2 * case.kv_heads + 3, case.dim, generator=generator)
    key, value = fused[:, 1 : 1 + case.kv_heads], fused[:, -case.kv_heads :]
    frame_of = torch.full((case.num_blocks * case.kv_heads,), -1, dtype=torch.int32, device=device)
    held = (block[:, None] * case.kv_heads + torch.arange(case.kv_heads, device=device)).flatten()
    held = held[::3]  # the others have no frame
    frame_of[held] = torch.randperm(len(held), generator=generator, device=device).int()
    shape = (len(held) + 1, size, 2 * case.dim)
    results = []
    for module, host in ((ref, pool.seen.clone()), (sparda_tokens, pool.seen)):
        slab = torch.full(shape, torch.nan, dtype=case.dtype, device=device)
        module.write_tokens(host, slab, frame_of, slots, key, value)
        results.append((host, slab))
    equal = all(same(a, b) for a, b in zip(*results, strict=True))
    # What the device has written must be where the host finds it.
    yield "write tokens", unless(equal and same(pool.seen.cpu(), pool.host)), 0.0

    query = _noise(case, case.rows, case.heads, case.dim, generator=generator)
    last, kept = torch.arange(case.rows, device=device), []
    for module in (ref, sparda_tokens):
        kept.append(query.new_full((case.num_blocks, case.heads, case.dim), torch.nan))
        module.record_queries(kept[-1], query, slots, last, size)
    yield "record queries", unless(same(*kept)), 0.0

    windows = []
    for module in (ref, sparda_tokens):
        compressed = torch.full_like(pool.compressed, torch.nan)
        module.update_windows(compressed, pool.seen, positions, pool.table, stride)
        windows.append(compressed)
    written = ~windows[0].isnan()
    found = error(windows[1][written], windows[0][written])
    in_place = (~windows[1].isnan()).equal(written)
    yield "update windows", found if in_place else WRONG, COMPUTED[case.dtype]
