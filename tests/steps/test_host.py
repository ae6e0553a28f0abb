# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Plans of SPARDA steps against a token-by-token definition."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.sparda_plans import (
    NUM_BLOCKS,
    Row,
    assert_tokens,
    plan,
    simple,
    what_kernels_choose,
)

from vllm_sparse.policies.sparda import SpardaSettings, num_windows
from vllm_sparse.steps.host import SpardaPlanner


@st.composite
def batches(draw) -> tuple[SpardaSettings, list[Row], list[int]]:
    """Rows that may share the full blocks of others, also ones that those write in this step."""
    options = simple(
        kernel_stride=draw(st.sampled_from([1, 2, 4])),
        top_k=draw(st.integers(3, 6)),
        dense_len=draw(st.sampled_from([0, 7, 16, 33])),
        staging_blocks=draw(st.integers(1, 4)),
        sparse_prefill=draw(st.sampled_from([False, True, 3, 6])),
    )
    size, unused = 8, iter(draw(st.permutations(range(1, NUM_BLOCKS))))
    rows: list[Row] = []
    for _ in range(draw(st.integers(1, 5))):
        start, count = draw(st.integers(0, 60)), draw(st.sampled_from([0, 1, 1, 1, 2, 5, 8, 30]))
        prompt_len = draw(st.sampled_from([start, start // 2 + 1, start + 1, start + count, 12]))
        shared: list[int] = []
        if rows and draw(st.booleans()):
            other = rows[draw(st.integers(0, len(rows) - 1))]
            shared = other.blocks[: min(start, other.end) // size]
        own = -(-(start + count) // size) - len(shared)
        rows.append(
            Row(start, count, max(prompt_len, 1), shared + [next(unused) for _ in range(own)])
        )
    if not any(row.count for row in rows):
        rows.append(Row(0, 3, 3, [next(unused)]))
    rows = draw(st.permutations(rows))
    used = sorted({block for row in rows for block in row.blocks})
    return options, rows, draw(st.lists(st.sampled_from(used), min_size=1, max_size=7))


@given(batches())
@settings(max_examples=250, deadline=None)
def test_a_plan_is_what_its_tokens_say(batch) -> None:
    options, rows, garbage = batch
    step, counts = plan(options, rows, garbage)
    size, stride = options.block_size, options.kernel_stride

    tokens = [(r, p) for r, row in enumerate(rows) for p in range(row.start, row.end)]
    slot = {(r, p): row.blocks[p // size] * size + p % size for r, row in enumerate(rows)
            for p in range(row.end)}  # fmt: skip
    assert step.num_tokens == len(tokens)
    assert step.slots.tolist() == [slot[token] for token in tokens]

    written_by: dict[int, set[int]] = {}
    for r, p in tokens:
        written_by.setdefault(rows[r].blocks[p // size], set()).add(r)
    last = {rows[r].blocks[p // size]: index for index, (r, p) in enumerate(tokens)}
    assert step.last_in_block.tolist() == sorted(last.values())

    windows = {}
    for r, p in tokens:
        if p + 1 >= 2 * stride and (p + 1) % stride == 0:  # the last token of a window
            number = (p + 1) // stride - 2
            place = rows[r].blocks[p // size] * (size // stride) + (number + 1) % (size // stride)
            windows[place] = [slot[r, q] for q in range(p + 1 - 2 * stride, p + 1)]
    read = slots_of_windows(step).tolist()
    assert dict(zip(step.windows.slots.tolist(), read, strict=True)) == windows
    assert len(step.windows.slots) == len(windows)

    tiles, prompts, decodes = [], [], []
    for r, row in enumerate(rows):
        borrowed = [
            bool(written_by.get(block, set()) - {r}) and (b + 1) * size <= row.start
            for b, block in enumerate(row.blocks)
        ]
        if row.count == 1 and row.start >= row.prompt_len and not any(borrowed):
            decodes.append(r)
        elif row.count:
            prompts.append(r)
            needed = [b for b in range(len(row.blocks)) if b * size < row.start]
            for at in range(0, len(needed), options.staging_blocks):
                part = needed[at : at + options.staging_blocks]
                covered = sum(
                    b * size <= p < (b + 1) * size for b in part for p in range(row.start)
                )
                late = any(borrowed[b] for b in part)
                tiles.append((r, [row.blocks[b] for b in part], part[0], covered, late))
    assert [(t.blocks.tolist(), t.first_block, t.tokens, t.late) for t in step.tiles] == [
        tile[1:] for tile in tiles
    ]

    begins = list(itertools.accumulate((row.count for row in rows), initial=0))
    assert len(step.prompts) == len(prompts)
    mixed = 0
    for prompt, r in zip(step.prompts, prompts, strict=True):
        row = rows[r]
        assert (prompt.begin, prompt.end, prompt.start) == (begins[r], begins[r + 1], row.start)
        assert prompt.blocks.tolist() == row.blocks[: -(-row.end // size)]
        assert [tiles[i][0] for i in range(*prompt.tiles)] == [r] * sum(t[0] == r for t in tiles)
        sees_all = [
            p + 1 <= options.dense_len or (not options.sparse_prefill and p < row.prompt_len)
            for p in range(row.start, row.end)
        ]
        assert sees_all == sorted(sees_all, reverse=True)
        assert prompt.sparse_from == sum(sees_all)
        mixed += row.start > 0 and len({*sees_all}) == 2
        assert prompt.output_from == sum(p < row.prompt_len for p in range(row.start, row.end))
        assert_tokens(prompt.tokens, [t for t in tokens if t[0] == r], tokens, rows, size)

    if step.decode is None:
        assert not decodes
    else:
        check_decode(step, options, decodes, tokens, rows)
    blocks = [-(-rows[r].end // size) for r in decodes]
    reads = [b if rows[r].end <= options.dense_len else min(b, options.blocks_read)
             for b, r in zip(blocks, decodes, strict=True)]  # fmt: skip
    ended = [row for row in rows if row.start < row.prompt_len == row.end]
    expected = {
        ("decode_rows", ""): len(decodes),
        ("visible_blocks", ""): sum(blocks),
        ("selected_blocks", ""): sum(reads),
        ("dense_fallbacks", "shorter_than_dense_len"): sum(
            row.prompt_len < options.dense_len for row in ended
        ),
        ("prompt_chunks_streamed_whole", ""): mixed,
        ("requests", ""): sum(row.prompt_len >= options.dense_len for row in ended),
    }
    assert counts == Counter({key: value for key, value in expected.items() if value})


def slots_of_windows(step) -> torch.Tensor:
    return torch.cat((step.slots, step.windows.older))[step.windows.tokens]


def check_decode(step, options, decodes, tokens, rows) -> None:
    size, found = options.block_size, step.decode
    assert_tokens(found.tokens, [(r, rows[r].start) for r in decodes], tokens, rows, size)
    assert found.framed.equal(found.tokens.positions)
    assert found.unframed is None
    assert not found.whole
    selected = what_kernels_choose(step, options)
    for at, r in enumerate(decodes):
        own = rows[r].start // size
        assert found.table[at, : own + 1].tolist() == rows[r].blocks
        everything = rows[r].end <= options.dense_len or own + 1 <= options.blocks_read
        count = own + 1 if everything else options.blocks_read
        # Any blocks may be chosen, but the last one is always the token's own.
        chosen = [*range(count - 1), own]
        visible = [p for b in chosen for p in range(b * size, (b + 1) * size) if p < rows[r].end]
        assert int(selected.lengths[at]) == len(visible)
        assert (selected.blocks[at] >= 0).sum(-1).eq(count).all()
        if everything:
            assert selected.blocks[at, 0, :count].tolist() == [*range(count)]
        else:
            assert found.scored
    assert selected.lengths.dtype == found.table.dtype == torch.int32
    assert found.scored == any(
        rows[r].end > options.dense_len and rows[r].start // size + 1 > options.blocks_read
        for r in decodes
    )


@pytest.mark.parametrize(("size", "stride"), [(64, 16), (64, 32), (32, 16), (16, 2)])
def test_windows_lie_with_their_last_token_for_any_chunks(size: int, stride: int) -> None:
    options = simple(block_size=size, kernel_stride=stride)
    blocks = list(range(20, 60))
    total = 5 * size + 3
    expected = {}
    for j in range(num_windows(total, 2 * stride, stride)):
        last = stride * j + 2 * stride - 1
        place = blocks[last // size] * (size // stride) + last % size // stride
        assert place not in expected
        expected[place] = [blocks[p // size] * size + p % size for p in range(stride * j, last + 1)]
    for chunk in (1, 7, stride, size - 1, size, size + 1, total):
        found = {}
        for start in range(0, total, chunk):
            step, _ = plan(options, [Row(start, min(chunk, total - start), total, blocks)])
            for place, tokens in zip(step.windows.slots, slots_of_windows(step), strict=True):
                assert int(place) not in found, "a window is completed once"
                found[int(place)] = tokens.tolist()
        assert found == expected, chunk
    # Block m of 4 windows holds windows 4m - 1 to 4m + 2.
    if (size, stride) == (64, 16):
        assert list(expected).index(blocks[1] * 4) == 3


def test_which_tokens_of_a_prompt_row_are_sparse() -> None:
    for dense_len, sparse_prefill, prompt_len, start, count in itertools.product(
        (0, 10, 16, 20, 40), (False, True), (1, 12, 16, 18, 40), (0, 9, 16, 17), (2, 8)
    ):
        options = simple(dense_len=dense_len, sparse_prefill=sparse_prefill)
        step, counts = plan(options, [Row(start, count, prompt_len, list(range(1, 8)))])
        dense = [
            p < dense_len or (p < prompt_len and not sparse_prefill)
            for p in range(start, start + count)
        ]
        (prompt,) = step.prompts
        whole = start > 0 and 0 < sum(dense) < count
        assert counts["prompt_chunks_streamed_whole", ""] == whole
        assert prompt.sparse_from == sum(dense)


@pytest.mark.parametrize("first_writes", [True, False])
def test_a_decode_that_borrows_from_this_step_goes_the_prompt_way(first_writes: bool) -> None:
    """A preempted request comes back to blocks that another one is about to compute."""
    start = 8 if first_writes else 16
    writer = Row(start, 9, 30, [1, 2, 3, 4])
    reader = Row(16, 1, 10, [1, 2, 9])
    for rows in ([writer, reader], [reader, writer]):
        step, _ = plan(simple(staging_blocks=1), rows)
        if first_writes:
            assert step.decode is None
            assert len(step.prompts) == 2
            late = [tile.late for tile in step.tiles if tile.blocks.tolist() in ([1], [2])]
            # The writer streams block 1; the reader blocks 1 and 2, of which 2 is being written.
            assert sorted(late) == [False, False, True]
            assert [prompt.tokens.positions.tolist() for prompt in step.prompts] == (
                [[*range(8, 17)], [16]] if rows[0] is writer else [[16], [*range(8, 17)]]
            )
            # The queries of the token before are not kept yet: those of the writer's are its own.
            tokens = step.prompts[rows.index(reader)].tokens
            assert tokens.previous_index.tolist() == [7 if rows[0] is writer else 8]
        else:
            assert step.decode.tokens.positions.tolist() == [16]
            assert not any(tile.late for tile in step.tiles)


def test_a_dense_request_is_counted_when_its_prompt_ends() -> None:
    rows = [Row(4, 2, 6, [1], True), Row(4, 2, 6, [2]), Row(4, 1, 6, [3], True)]
    _, counts = plan(simple(dense_len=16), rows)
    assert counts["dense_fallbacks", "requested"] == 1
    assert counts["dense_fallbacks", "shorter_than_dense_len"] == 1


def test_a_preempted_request_is_not_counted_again() -> None:
    """Its replay goes on past the prompt's end, or a chunk of it happens to end there."""
    blocks, total = [1, 2, 3], Counter()
    for start, count, back in (
        (0, 7, 0), (7, 4, 0), (11, 1, 0), (0, 7, 1), (7, 6, 1), (0, 11, 1), (11, 2, 1),
    ):  # fmt: skip
        _, counts = plan(simple(), [Row(start, count, 11, blocks)], replayed=[bool(back)])
        total += counts
    assert total["requests", ""] == 1


def test_fresh_rows_are_set_apart_only_for_who_serves_them() -> None:
    rows = [Row(0, 2, 9, [4]), Row(8, 3, 20, [2, 3]), Row(0, 5, 5, [1])]
    together, _ = plan(simple(), rows)
    assert len(together.prompts) == 3
    assert together.fresh is None
    apart, _ = plan(simple(), rows, split_fresh=True)
    assert [prompt.begin for prompt in apart.prompts] == [2]
    assert apart.fresh.index.tolist() == [0, 1, 5, 6, 7, 8, 9]
    assert apart.fresh.starts.tolist() == [0, 2, 7]
    assert apart.fresh.longest == 5


def test_counting_rows_does_not_go_through_them_one_by_one(monkeypatch):
    """There may be a thousand in each step."""
    counts = Counter()
    planner = SpardaPlanner(
        simple(dense_len=24, top_k=3), 64, lambda name, amount: counts.update({name: amount})
    )
    lens, read = [0, 1, 24, 25, 64], planner._settings.blocks_read
    monkeypatch.setattr(torch.Tensor, "tolist", lambda _: pytest.fail("makes a list of rows"))
    assert planner.count_rows(torch.tensor(lens).int())
    reads = [0, 1, 3, min(4, read), min(8, read)]
    assert counts == {"decode_rows": 4, "visible_blocks": 16, "selected_blocks": sum(reads)}
    assert not planner.count_rows(torch.tensor(lens[:3]).int())
