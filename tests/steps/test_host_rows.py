# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Plans of single tokens, made where the tokens are."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.sparda_plans import (
    NUM_BLOCKS,
    Row,
    asked_to_be_dense,
    assert_tokens,
    plan,
    simple,
    what_kernels_choose,
)

from vllm_sparse.steps.host import SpardaPlanner
from vllm_sparse.steps.host_rows import RowPlanner
from vllm_sparse.steps.host_step import SpardaStep, WindowRows

if TYPE_CHECKING:
    from vllm_sparse.policies.sparda import SpardaSettings


def plan_rows(
    options: SpardaSettings, rows: list[Row], captured: bool, planner: RowPlanner | None = None
) -> tuple[SpardaStep | None, Counter]:
    """The step of a batch of single tokens, and what was counted; rows of no tokens are padding."""
    counts: Counter = Counter()

    def count(name: str, amount: float, reason: str = "") -> None:
        counts[name, reason] += amount

    table = torch.zeros(len(rows), 12, dtype=torch.int32)
    for line, row in zip(table, rows, strict=True):
        line[: len(row.blocks)] = torch.tensor(row.blocks)
    ends = torch.tensor([row.end if row.count else 0 for row in rows]).int()
    prompts = torch.tensor([row.prompt_len for row in rows]).int()
    planner = planner or RowPlanner(options, 8, torch.device("cpu"), captured)
    prefilling = any(0 < row.end <= row.prompt_len for row in rows)
    counting = SpardaPlanner(options, NUM_BLOCKS, count)
    dense = asked_to_be_dense(rows)
    return planner.plan(counting, ends, ends, prompts, table, prefilling, dense), counts


@st.composite
def single_tokens(draw) -> tuple[SpardaSettings, list[Row]]:
    """Decode rows, also of requests that ask to be dense, and prompts' last tokens."""
    options = simple(
        dense_len=draw(st.sampled_from([0, 16, 33])), sparse_prefill=draw(st.booleans())
    )
    unused = iter(draw(st.permutations(range(1, NUM_BLOCKS))))
    rows = []
    for _ in range(draw(st.integers(1, 5))):
        start = draw(st.integers(0, 60))
        prompt_len = draw(st.sampled_from([start + 1, start, start // 2 + 1]))
        blocks = [next(unused) for _ in range(start // 8 + 1)]
        dense = not options.sparse_prefill and draw(st.booleans())
        rows.append(Row(start, 1, max(prompt_len, 1), blocks, dense))
    return options, rows


@given(single_tokens(), st.booleans())
@settings(max_examples=150, deadline=None)
def test_single_tokens_are_planned_as_others_are(batch, captured) -> None:
    options, rows = batch
    step, counts = plan_rows(options, rows, captured)
    expected, expected_counts = plan(options, rows)
    assert step.num_tokens == len(rows)
    assert not step.prompts
    assert step.slots.equal(expected.slots)
    assert step.last_in_block.tolist() == [*range(len(rows))]
    assert isinstance(step.windows, WindowRows)
    assert step.windows.positions.tolist() == [row.start for row in rows]
    found = step.decode
    assert found.whole
    tokens = [(r, row.start) for r, row in enumerate(rows)]
    assert_tokens(found.tokens, tokens, tokens, rows, 8)
    alone = [
        row.dense or (row.start < row.prompt_len and not options.sparse_prefill) for row in rows
    ]
    assert (found.framed < 0).tolist() == alone
    whole = torch.zeros(len(rows)).int() if found.unframed is None else found.unframed
    assert whole.tolist() == [
        row.end if apart else 0 for row, apart in zip(rows, alone, strict=True)
    ]
    for row, line in zip(rows, found.table.tolist(), strict=True):
        assert line[: len(row.blocks)] == row.blocks
    selected = what_kernels_choose(step, options)
    if expected.decode is not None:
        indices = expected.decode.tokens.index.tolist()
        lengths = what_kernels_choose(expected, options).lengths
        theirs = dict(zip(indices, lengths, strict=True))
        for index, length in theirs.items():
            assert selected.lengths[index] == length
    if not any(row.start < row.prompt_len for row in rows) or not options.sparse_prefill:
        assert counts == expected_counts


def test_rows_find_the_row_that_they_were_in_the_step_before() -> None:
    """By the block that they have written to, whatever their order; new and idle ones find none."""
    options = simple(selector="previous")
    planner = RowPlanner(options, 8, torch.device("cpu"), captured=True)

    def follows(*rows: Row) -> list[int]:
        step, _ = plan_rows(options, list(rows), True, planner)
        return step.decode.tokens.previous_rows.tolist()

    first, second, padding = [4, 7, 9], [2, 5, 6], Row(0, 0, 0, [])
    assert follows(Row(20, 1, 5, first), Row(15, 1, 5, second[:2])) == [-1, -1]
    assert follows(Row(16, 1, 5, second), Row(21, 1, 5, first), padding) == [1, 0, -1]
    assert follows(padding, Row(8, 1, 5, [1, 3]), Row(22, 1, 5, first)) == [-1, -1, 1]
    assert follows(Row(17, 1, 5, second), Row(9, 1, 5, [1, 3])) == [-1, 1]
    assert follows(Row(23, 1, 5, first)) == [-1]  # it was in the step before that
    planner.forget()  # after a batch with a prompt
    assert follows(Row(18, 1, 5, second), Row(10, 1, 5, [1, 3])) == [-1, -1]


def test_padding_rows_read_and_write_nothing() -> None:
    step, counts = plan_rows(simple(), [Row(20, 1, 5, [4, 7, 9]), Row(0, 0, 0, [])], True)
    assert step.slots.tolist() == [9 * 8 + 4, -1]
    assert step.decode.framed.tolist() == step.windows.positions.tolist() == [20, -1]
    assert step.decode.unframed.tolist() == [0, 0]
    assert counts["decode_rows", ""] == 1


@pytest.mark.parametrize("captured", [False, True])
def test_dense_requests_beside_sparse_prompts_are_streamed(captured) -> None:
    """As frames are set aside for the chosen blocks only; a graph would have to wait for them."""
    rows = [Row(40, 1, 5, [1, 2, 3, 4, 5, 6], True), Row(20, 1, 5, [7, 8, 9])]
    assert plan_rows(simple(sparse_prefill=True), rows, captured)[0] is None
    step, counts = plan(simple(sparse_prefill=True), rows)
    (streamed,) = step.prompts
    assert (streamed.start, streamed.sparse_from) == (40, 1)
    assert step.decode.tokens.positions.tolist() == [20]
    assert counts["decode_rows", ""] == 1


def test_a_lone_token_of_a_prompt_with_its_own_number_of_blocks_is_left_to_the_other_planner():
    rows = [Row(40, 1, 41, [1, 2, 3, 4, 5, 6]), Row(20, 1, 5, [7, 8, 9])]
    for number, single in ((4, True), (True, True), (5, False)):
        step, _ = plan_rows(simple(sparse_prefill=number), rows, False)
        assert (step is not None) == single
    step, _ = plan_rows(simple(sparse_prefill=5), rows[1:], False)
    assert step is not None


@pytest.mark.parametrize("captured", [False, True])
def test_a_prompt_that_ends_with_a_lone_token_starts_to_decode_densely(captured) -> None:
    rows = [Row(4, 1, 5, [1]), Row(0, 0, 0, [])]
    _, counts = plan_rows(simple(dense_len=16), rows, captured)
    assert counts["dense_fallbacks", "shorter_than_dense_len"] == 1


def test_a_captured_step_never_moves() -> None:
    """What a graph reads is where it was, whatever the lengths."""
    planner = RowPlanner(simple(), 8, torch.device("cpu"), captured=True)
    short, _ = plan_rows(simple(), [Row(3, 1, 2, [4])], True, planner)
    before = short.decode.table.data_ptr(), short.slots.data_ptr(), short.decode.framed.data_ptr()
    long, _ = plan_rows(simple(), [Row(60, 1, 2, [*range(10, 18)])], True, planner)
    assert before == (
        long.decode.table.data_ptr(), long.slots.data_ptr(), long.decode.framed.data_ptr()
    )  # fmt: skip
    assert short.decode.table.shape == long.decode.table.shape
    assert short.decode.scored
    assert short.slots.equal(long.slots)


def test_who_borrows_from_this_step_is_planned_on_the_host() -> None:
    """The writer completes block 2, which the reader has already."""
    rows = [Row(15, 1, 3, [1, 2]), Row(16, 1, 10, [1, 2, 9])]
    assert plan_rows(simple(), rows, captured=False)[0] is None
    assert plan_rows(simple(), rows, captured=True)[0] is not None
