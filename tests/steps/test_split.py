# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The plan of a step: rows that only grow are planned from what the step before found."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from support.policies import make_policy
from support.splits import PROMPTS, plan

from vllm_sparse.control import DENSE
from vllm_sparse.policies.quest import Quest
from vllm_sparse.policies.rocketkv import RocketKV
from vllm_sparse.steps import rules
from vllm_sparse.steps.drafts import Drafts
from vllm_sparse.steps.split import StepPlanner

PER_REQUEST = {"requests", "dense_fallbacks"}


def same(one, other) -> bool:
    (one_step, one_count), (other_step, other_count) = one, other
    assert len(one_step.sparse) == len(other_step.sparse) == 1
    for a, b in zip(vars(one_step.sparse[0]).values(), vars(other_step.sparse[0]).values(),
                    strict=True):  # fmt: skip
        if not (torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b):
            return False
    return one_count == other_count and one_step.dense is other_step.dense is None


@pytest.mark.parametrize("kind", [RocketKV, Quest])
def test_rows_that_grow_are_planned_as_if_they_were_new(kind):
    planner = StepPlanner(make_policy(kind))
    for step in range(1, 70):
        lens = (PROMPTS + step).tolist()
        fresh = plan(StepPlanner(planner.policy), lens, [1, 1, 1])
        assert same(plan(planner, lens, [1, 1, 1]), fresh)


def test_a_last_prompt_token_that_comes_alone_is_no_decode_row():
    """The batch looks like the one before, but one row is still inside its prompt."""
    planner = StepPlanner(make_policy())
    plan(planner, (PROMPTS + 9).tolist(), [1, 1, 1])
    step, counted = plan(planner, [309, 520, 420], [1, 1, 1])
    assert step.dense is not None
    assert step.dense_index.tolist() == [1]
    assert [prompt.prompt_len for prompt in step.prompts] == [520]
    assert counted["decode_rows"] == 2


def test_other_rows_are_planned_anew():
    planner = StepPlanner(make_policy())
    plan(planner, (PROMPTS + 9).tolist(), [1, 1, 1])
    swapped = PROMPTS.flip(0)
    lens = (swapped + 5).tolist()
    again = plan(planner, lens, [1, 1, 1], swapped)
    assert same(again, plan(StepPlanner(planner.policy), lens, [1, 1, 1], swapped))


def test_a_row_that_comes_back_with_all_its_tokens_is_no_decode_row():
    """Preempted and resumed beside rows that go on: the batch is of the same requests."""
    planner = StepPlanner(make_policy())
    plan(planner, (PROMPTS + 9).tolist(), [1, 1, 1])
    back = (PROMPTS + 10).tolist(), [1, 530, 1]
    step, counted = plan(planner, *back)
    expected, expected_counts = plan(StepPlanner(planner.policy), *back)
    assert counted == expected_counts
    assert step.num_tokens == 532
    assert torch.equal(step.dense_index, expected.dense_index)
    assert [prompt.compacts for prompt in step.prompts] == [True]
    (rows,) = step.sparse
    assert rows.lengths.tolist() == expected.sparse[0].lengths.tolist()
    assert len(rows.lengths) == 12


def test_rows_whose_budgets_have_been_forgotten_are_planned_anew(monkeypatch):
    """The numbers of their rules are then those of others."""
    monkeypatch.setattr(rules, "_MOST_BUDGETS", 3)
    planner, lens = StepPlanner(make_policy()), (PROMPTS + 9).tolist()
    for budget in (96, 128, 96):
        for more in (0, 1):
            batch = [n + more for n in lens], [1, 1, 1]
            found = plan(planner, *batch, controls=[budget] * 3)
            assert same(found, plan(StepPlanner(planner.policy), *batch, controls=[budget] * 3))


@pytest.mark.parametrize("controls", [None, [DENSE, 0, DENSE]])
def test_a_preempted_request_is_not_counted_again(controls):
    """Its replay goes on past the prompt's end, whichever chunk it comes in."""
    planner, total = StepPlanner(make_policy()), Counter()
    for past, new in ((-9, 200), (0, 9), (1, 1), (-9, 200), (6, 15)):
        total += plan(planner, (PROMPTS + past).tolist(), [new] * 3, controls=controls)[1]
    dense = {} if controls is None else {"dense_fallbacks/requested": 2}
    counted = {name: n for name, n in total.items() if name.split("/")[0] in PER_REQUEST}
    assert counted == {"requests": 3 - sum(dense.values()), **dense}


@pytest.mark.parametrize("kind", [RocketKV, Quest])
def test_rows_that_ask_to_be_dense_are(kind):
    """While they decode, and in the step that ends their prompt; then the same rows are sparse."""
    planner = StepPlanner(make_policy(kind))
    lens = (PROMPTS + 9).tolist()
    step, counted = plan(planner, lens, [1, 1, 1], controls=[0, DENSE, 0])
    assert step.dense_index.tolist() == [1]
    assert [rows.token_index.tolist() for rows in step.sparse] == [[0, 2]]
    assert counted["decode_rows"] == 2
    assert "dense_fallbacks/requested" not in counted

    ending, counted = plan(planner, PROMPTS.tolist(), [20, 20, 20], controls=[DENSE, 0, DENSE])
    assert ending.dense_index is None
    assert [prompt.prompt_len for prompt in ending.prompts] == [520] * planner.policy.moves
    assert counted["dense_fallbacks/requested"] == 2

    again = plan(planner, lens, [1, 1, 1])
    assert same(again, plan(StepPlanner(planner.policy), lens, [1, 1, 1]))
    step, _ = plan(planner, [n + 1 for n in lens], [1, 1, 1], controls=[DENSE] * 3)
    assert not step.sparse
    assert step.dense is not None


def test_prompts_that_are_served_densely_fill_the_index_too():
    """Where tokens stay in place: a longer prompt that is sparse may find their blocks."""
    short = torch.tensor([60, 61, 62])
    step, _ = plan(StepPlanner(make_policy(Quest)), short.tolist(), short.tolist(), short)
    assert not step.sparse
    assert step.pages.slots.tolist() == list(range(183))
    ends = [*range(15, 60, 16), 59, *range(75, 121, 16), 120, *range(136, 183, 16), 182]
    assert step.pages.closing.tolist() == ends


@pytest.mark.parametrize("kind", [RocketKV, Quest])
def test_blocks_in_parts_hold_the_same_tokens(kind):
    """Blocks of 16 as two of 8: as many tokens leave, and tables name the same places."""
    whole, parts = StepPlanner(make_policy(kind)), StepPlanner(make_policy(kind), 8)
    table = torch.arange(1, 1 + 3 * 40, dtype=torch.int32).view(3, 40)
    split = torch.stack((2 * table, 2 * table + 1), -1).flatten(1)
    for lens, rows in (((PROMPTS + 9).tolist(), [1, 1, 1]), (PROMPTS.tolist(), [20, 20, 20])):
        one, counted = plan(whole, lens, rows)
        other, again = plan(parts, lens, rows, table=split)
        assert counted == again
        for a, b in zip(one.sparse, other.sparse, strict=True):
            assert torch.equal(a.lengths, b.lengths)
            for row, length in enumerate(a.lengths.tolist()):
                at = torch.arange(length)
                where = a.block_table[row, at // 16] * 16 + at % 16
                assert torch.equal(where, b.block_table[row, at // 8] * 8 + at % 8)
        for a, b in zip(one.prompts, other.prompts, strict=True):
            assert 16 * a.dropped_blocks == 8 * b.dropped_blocks
            assert 16 * a.shared_blocks == 8 * b.shared_blocks
            assert b.sizes.tolist() == [a.prompt_len, 2 * a.dropped_blocks]


@pytest.mark.parametrize("kind", [RocketKV, Quest])
def test_rejected_drafts_that_the_host_still_counts_change_no_plan(kind):
    """Two requests decode several tokens beside a prompt's chunk; one has lost three drafts."""
    planner = StepPlanner(make_policy(kind))
    lens, rows, off = [330, 460, 415], [4, 60, 2], torch.tensor([-3, 0, -1], dtype=torch.int32)
    exact, count = plan(planner, lens, rows)
    counted = torch.zeros(3, dtype=torch.int64)
    told = (torch.tensor(lens) - off).tolist()
    loose, _ = plan(planner, told, rows, drafts=Drafts(off, counted))
    for one, other in zip(exact.sparse, loose.sparse, strict=True):
        for name in ("token_index", "lengths", "final_lengths", "top_r"):
            assert torch.equal(getattr(one, name), getattr(other, name))
        width = one.block_table.shape[1]
        assert torch.equal(one.block_table, other.block_table[:, :width])
    names = ("decode_rows", "visible_tokens", "selected_tokens")
    assert counted.tolist() == [count[name] for name in names]
    assert torch.equal(exact.dense_index, loose.dense_index)
    if kind is Quest:  # vLLM's null block, where nobody reads, stands for what closes no page
        closing = loose.pages.closing
        assert torch.equal(closing[closing > 0], exact.pages.closing[exact.pages.closing > 0])
        assert len(closing) == sum(rows)
