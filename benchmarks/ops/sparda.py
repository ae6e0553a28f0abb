# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""SPARDA's operations.

What looks up and copies must be equal, whatever order programs run in. Blocks are chosen by sums in
another order than the reference's, so that near-ties may swap. On a GPU the host pool is pinned and
read through a device view, as in the engine.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from vllm_sparse.kernels.types import Blocks, NewQueries, NewWindows, Ranking, Unframed

from benchmarks.ops.kernels import reference, triton
from benchmarks.ops.registry import WRONG, Op, Side, differences, error, output_error, same, unless
from benchmarks.ops.sparda_inputs import PagedCase, Pool, empty_table, make_pool, noise, pinned
from benchmarks.ops.sparda_steps import STEPS, paged_steps
from vllm_sparse.planner import bounds

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.ops.registry import Arguments, Found
    from vllm_sparse.planner.shapes import Shape

SAME_BLOCKS = 0.99

CASES = (
    PagedCase("sparda, minicpm-8b", 32, 2, 128, 5, 8000, Blocks(64, 16, 1, 8, 40), 200),
    PagedCase("sparda, llama-8b", 32, 8, 128, 4, 6000, Blocks(64, 16, 1, 4, 24), 150),
    PagedCase("sparda, qwen-0.5b", 14, 2, 64, 5, 4000, Blocks(64, 16, 1, 2, 16), 131),
)
SANITIZED = (PagedCase("sparda, sanitized", 8, 2, 64, 4, 700, Blocks(64, 16, 1, 1, 5), 40),)
TINY_CASES = (PagedCase("sparda, tiny", 4, 2, 32, 4, 300, Blocks(32, 16, 1, 1, 4), 20),)


class Cell(NamedTuple):
    """A shape to time: tokens of each request, requests, blocks read (MiniCPM4.1's)."""

    context: int
    batch: int
    blocks: Blocks = Blocks(64, 16, 1, 32, 96)


CELLS = (Cell(32768, 16), Cell(32768, 1), Cell(131072, 16), Cell(131072, 1))
TINY_CELLS = (Cell(600, 2, Blocks(32, 16, 1, 2, 10)),)
TUNED_CELLS = (Cell(32768, 16), Cell(131072, 1))


class Sizes(NamedTuple):
    """What the bytes of an operation follow from."""

    shape: Shape
    cell: Cell


def _missed_blocks(actual: Side, expected: Side) -> float:
    """Share of the expected blocks that were not chosen; `WRONG` if the rest is not as it must."""
    ours, theirs, table = actual.result, expected.result, expected.arguments["block_table"]
    real, kv_heads = theirs.blocks >= 0, theirs.blocks.shape[1]
    head = torch.arange(kv_heads, device=real.device)[:, None]
    chosen = ours.blocks.clamp(min=0).long()
    physical = table.long()[:, None].expand(-1, kv_heads, -1).gather(2, chosen)
    pieces = torch.where(real, physical * kv_heads + head, -1)
    ascending = (ours.blocks.diff(dim=-1) > 0) | ~real[..., 1:]
    consistent = (
        ours.lengths.equal(theirs.lengths)
        and (ours.blocks >= 0).equal(real)
        and ours.pieces.equal(pieces.int())
        and bool(ascending.all())
    )
    if not consistent:
        return WRONG
    found = (ours.blocks[..., :, None] == theirs.blocks[..., None, :]).any(-1) & real
    return 1.0 - float(found.sum() / real.sum())


def _part_error(actual: Side, expected: Side) -> float:
    (ours, our_sums), (theirs, sums) = actual.result, expected.result
    seen = sums > -torch.inf
    if not (our_sums > -torch.inf).equal(seen) or bool(ours[~seen].any()):
        return WRONG
    return max(error(ours, theirs), error(our_sums[seen], sums[seen]))


def _kept_unlike(actual: Side, expected: Side) -> float:
    return unless(same(actual.arguments["kept"], expected.arguments["kept"]))


def _queries_unlike(actual: Side, expected: Side) -> float:
    pairs = zip(*(side.arguments["queries"] for side in (actual, expected)), strict=True)
    return unless(all(same(*pair) for pair in pairs))


def _found_unlike(actual: Side, expected: Side) -> float:
    return unless(same(actual.arguments["output"], expected.arguments["output"]))


def _window_error(actual: Side, expected: Side) -> float:
    ours, theirs = (side.arguments["windows"].compressed for side in (actual, expected))
    written = ~theirs.isnan()
    in_place = (~ours.isnan()).equal(written)
    return error(ours[written], theirs[written]) if in_place else WRONG


SELECT = Op(
    "select blocks", "select_blocks", _missed_blocks, 1.0 - SAME_BLOCKS,
    least=lambda at: bounds.select_blocks_bytes(
        at.shape, at.cell.batch, at.cell.context, at.cell.blocks.kernel_stride,
        at.cell.blocks.top_k,
    ),
)  # fmt: skip
ATTEND = Op(
    "attend frames", "attend_frames", output_error, writes=("output",),
    least=lambda at: bounds.attend_bytes(
        at.shape, at.cell.batch, at.cell.blocks.top_k * at.cell.blocks.block_size
    ),
)  # fmt: skip
PART = Op("attend part", "attend_part", _part_error)
# Again the same tokens, now with the windows that they complete.
WINDOWS = Op("complete windows", "write_tokens", _window_error, writes=("windows",))
RECORD = Op("record queries", "record_queries", _kept_unlike, 0.0, ("kept",))
KEEP = Op("keep queries", "write_tokens", _queries_unlike, 0.0, ("queries",))
RECALL = Op("recall queries", "recall_queries", _found_unlike, 0.0, ("output",))


def _named(op: Op, suffix: str) -> Op:
    return Op(f"{op.name}, {suffix}", op.kernel, op.compare, op.limit, op.writes)


def check(
    case: PagedCase, device: torch.device, generator: torch.Generator, graphs: bool
) -> Iterator[Found]:
    """Yields the name of each operation, its error, and the largest that it may have."""
    compare = partial(differences, dtype=case.dtype)
    pool = make_pool(case, device, generator)
    for name, arguments in selections(case, pool, generator).items():
        yield from compare([_named(SELECT, name)], arguments)
    yield "resolve", unless(_resolves_alike(case, device, generator)), 0.0
    yield "copy pieces", unless(_copies_alike(case, device, generator)), 0.0
    yield from paged_steps(case, pool, generator, graphs and device.type == "cuda")
    yield from compare([ATTEND], _frames(case, device, generator))
    rows = _host_rows(case, pool, generator)
    yield from compare(
        [Op("attend host rows", ATTEND.kernel, output_error, None, ("output",))], rows
    )
    for name, arguments in _parts(case, device, generator).items():
        yield from compare([_named(PART, name)], arguments)
    tokens = _tokens(case, pool, generator)
    yield "write tokens", unless(_writes_alike(tokens, pool)), 0.0  # late: it changes the pool
    yield from compare([WINDOWS, RECORD], tokens)
    recent = torch.full_like(tokens["query"], torch.nan)
    queries = NewQueries(tokens["kept"], tokens["query"], recent)
    yield from compare([KEEP], {**tokens, "queries": queries})
    yield from compare([RECALL], _queries(case, tokens["query"], generator))


def selections(case: PagedCase, pool: Pool, generator: torch.Generator) -> dict[str, Arguments]:
    """Arguments of a selection by a Forecast, and by a softmax of queries."""
    found = {}
    for name, ranking, heads in (
        ("Forecast", Ranking(False), case.kv_heads),
        ("softmax", Ranking(True, case.dim**-0.5, lag=1), case.heads),
    ):
        found[name] = {
            "compressed": pool.compressed,
            "vectors": noise(case, case.rows, heads + 1, case.dim, generator=generator)[:, :heads],
            "block_table": pool.table, "positions": pool.positions, "ranking": ranking,
            "blocks": case.blocks, "dense_len": 2 * case.blocks.block_size,
        }  # fmt: skip
    return found


def _resolves_alike(case: PagedCase, device: torch.device, generator: torch.Generator) -> bool:
    """Whether tables and lists are the same after each of some steps, and blocks had to leave."""
    pieces, size = case.num_blocks * case.kv_heads, case.wanted
    frames = size + size // 8
    places = (device, torch.device("cpu"))
    tables = [empty_table(pieces, frames, at) for at in places]
    steps = [torch.zeros(1, dtype=torch.int64, device=at) for at in places]
    counters = [torch.zeros(3, dtype=torch.int64, device=at) for at in places]

    def random() -> Tensor:  # -1 is nothing; the same piece may be wanted several times
        return torch.randint(-1, pieces, (size,), generator=generator, device=device).int()

    wanted, missed = random(), 0
    for _ in range(STEPS):
        new = torch.rand(size, generator=generator, device=device) < 0.3
        wanted = torch.where(new, random(), wanted.flip(0))
        found = []
        for side, at, table, step, counted in zip(
            (triton, reference), places, tables, steps, counters, strict=True
        ):
            step += 1
            asked = wanted.view(case.rows, case.kv_heads, -1).to(at)
            found.append(side("resolve")(table, asked, step, counted))
        actual, expected = found
        count = int(expected.misses)
        missed += count
        pairs = [
            *zip(*tables, strict=True),
            (actual.frames, expected.frames),
            (actual.missing[:count], expected.missing[:count]),
            (actual.targets[:count], expected.targets[:count]),
            (actual.misses, expected.misses),
            counters,
        ]
        if not all(a.cpu().equal(b) for a, b in pairs):
            return False
    return missed > frames


def _copies_alike(case: PagedCase, device: torch.device, generator: torch.Generator) -> bool:
    """Whether no, some and all pieces of a list arrive where they should, and nothing else does."""
    size, most = case.blocks.block_size, case.wanted
    host = noise(case, 2 * most, size, 2 * case.dim, generator=generator).cpu()
    source = pinned(host, device)[1]
    shuffled = torch.randperm(2 * most, generator=generator, device=device).int()
    for count in (0, 1, most - 1, most):
        index = torch.full((2, most), 1 << 30, dtype=torch.int32, device=device)
        index[0, :count], index[1, :count] = shuffled[:count], shuffled[-most:][:count]
        amount = torch.tensor([count], dtype=torch.int32, device=device)
        empty = torch.full_like(host, torch.nan)
        target = empty.to(device, copy=True)
        triton("copy_pieces")(target, index[0], source, index[1], amount)
        reference("copy_pieces")(empty, index[0].cpu(), host, index[1].cpu(), amount.cpu())
        if not same(target.cpu(), empty):
            return False
    return True


def _frames(case: PagedCase, device: torch.device, generator: torch.Generator) -> Arguments:
    """Attention over frames, of which rows read from none to all, the last one in part."""
    size, count, total = case.blocks.block_size, case.blocks.top_k, case.wanted
    slab = noise(case, total + 9, size, 2 * case.dim, generator=generator)
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
    query = noise(case, case.rows, case.heads + 2, case.dim, generator=generator)
    query = query[:, : case.heads]  # a slice of a fused row, as the engine has it
    return attention_arguments(slab, query, frames, lengths.int())


def attention_arguments(slab: Tensor, query: Tensor, frames: Tensor, lengths: Tensor) -> Arguments:
    """Arguments of an attention over frames; the output is poisoned."""
    return {
        "slab": slab, "query": query,
        "output": torch.full(query.shape, torch.nan, dtype=query.dtype, device=query.device),
        "frames": frames, "lengths": lengths, "scale": query.shape[-1] ** -0.5,
    }  # fmt: skip


def _host_rows(case: PagedCase, pool: Pool, generator: torch.Generator) -> Arguments:
    """Rows without frames beside rows that have nothing to read."""
    lengths = (pool.positions + 1).int()
    lengths[2::3] = 0
    query = noise(case, case.rows, case.heads, case.dim, generator=generator)
    slab = torch.full_like(pool.pieces[:1], torch.nan, device=query.device)
    frames = torch.full((case.rows, case.kv_heads, 1), -1, dtype=torch.int32, device=query.device)
    arguments = attention_arguments(slab, query, frames, torch.zeros_like(lengths))
    return {**arguments, "unframed": Unframed(pool.seen, pool.table, lengths)}


def _parts(
    case: PagedCase, device: torch.device, generator: torch.Generator
) -> dict[str, Arguments]:
    """A chunk of a prompt against itself, and against chosen blocks of what came before."""
    size, tokens, scale = case.blocks.block_size, case.tokens, case.dim**-0.5
    group = case.heads // case.kv_heads
    query = noise(case, tokens, case.heads, case.dim, generator=generator)
    query = query.view(tokens, case.kv_heads, group, case.dim).permute(1, 2, 0, 3)

    def rows(count: int) -> Arguments:
        found = noise(case, case.kv_heads, count, 2 * case.dim, generator=generator)
        keys, values = found.split(case.dim, -1)
        return {"query": query, "keys": keys, "values": values, "scale": scale}

    first, blocks = 2 * size, 2 + -(-4 * tokens // size)  # keys from the third block on
    keys = blocks * size - first - 5
    shape = (case.kv_heads, tokens, blocks)
    chosen = torch.rand(shape, generator=generator, device=device) < 0.3
    chosen[:, tokens // 3] = False  # sees nothing
    past = {"chosen": chosen, "first_position": first, "block_size": size}
    return {
        "causal": {**rows(tokens), "chosen": None, "first_position": 37, "past_from": 37},
        "chosen": {**rows(keys), **past},
        "chosen, past": {**rows(keys), **past, "past_from": first + keys // 2},
    }


def _tokens(case: PagedCase, pool: Pool, generator: torch.Generator) -> Arguments:
    """A step's tokens to store, their queries, and the windows that they complete."""
    size, stride, device = case.blocks.block_size, case.blocks.kernel_stride, pool.table.device
    # Half of the rows complete a window; one of them in its block's first slot.
    positions = pool.positions.clone()
    ends = (positions[::2] + 1) // stride * stride - 1
    positions[::2] = torch.where(positions[::2] < 0, -1, ends)
    positions[0] = positions[0] // size * size + stride - 1
    at = positions.clamp(min=0)
    block = pool.table.long().gather(1, at[:, None] // size)[:, 0]
    fused = noise(case, case.rows, 2 * case.kv_heads + 3, case.dim, generator=generator)
    frame_of = torch.full((case.num_blocks * case.kv_heads,), -1, dtype=torch.int32, device=device)
    held = (block[:, None] * case.kv_heads + torch.arange(case.kv_heads, device=device)).flatten()
    held = held[::3]  # the others have no frame
    frame_of[held] = torch.randperm(len(held), generator=generator, device=device).int()
    query = noise(case, case.rows, case.heads, case.dim, generator=generator)
    empty = partial(torch.full, fill_value=torch.nan, dtype=case.dtype, device=device)
    return {
        "slab": empty((len(held) + 1, size, 2 * case.dim)), "frame_of": frame_of,
        "slots": torch.where(positions < 0, -1, block * size + at % size),
        "key": fused[:, 1 : 1 + case.kv_heads], "value": fused[:, -case.kv_heads :],
        "kept": empty((case.num_blocks, case.heads, case.dim)), "query": query,
        "last": torch.arange(case.rows, device=device), "block_size": size,
        "windows": NewWindows(
            torch.full_like(pool.compressed, torch.nan), positions, pool.table, stride
        ), "host": pool.seen,
    }  # fmt: skip


def _queries(case: PagedCase, query: Tensor, generator: torch.Generator) -> Arguments:
    """Queries that two layers have kept, of which every second row's are on the device, too."""
    rows, layers = torch.arange(case.rows, device=query.device), 2
    kept = noise(case, layers * case.num_blocks, *query.shape[1:], generator=generator)
    recent = noise(case, layers * case.rows, *query.shape[1:], generator=generator)
    recent = recent.unflatten(0, (layers, -1))
    return {
        "kept": pinned(kept.cpu().unflatten(0, (layers, -1)), query.device)[1], "recent": recent,
        "places": torch.where(rows % 2 == 0, rows.flip(0), -1), "blocks": rows + 1,
        "output": torch.full_like(recent, torch.nan),
    }  # fmt: skip


def _writes_alike(tokens: Arguments, pool: Pool) -> bool:
    """Whether tokens arrive in frames and in the host pool, also as the host itself sees it."""
    names = ("frame_of", "slots", "key", "value")
    written = []
    for side, host in ((reference, pool.seen.clone()), (triton, pool.seen)):
        slab = tokens["slab"].clone()
        side("write_tokens")(host, slab, *(tokens[name] for name in names))
        written.append((host, slab))
    equal = all(same(*pair) for pair in zip(*written, strict=True))
    return equal and same(pool.seen.cpu(), pool.host)
