# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The plan of a step: rows that only grow are planned from what the step before found."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from support.policies import make_policy

from vllm_sparse.policies.quest import Quest
from vllm_sparse.policies.rocketkv import RocketKV
from vllm_sparse.steps.split import StepPlanner

PROMPTS = torch.tensor([300, 520, 411])


def plan(planner: StepPlanner, seq_lens, query_lens, prompts=PROMPTS, table=None):
    start = torch.cat((torch.zeros(1, dtype=torch.int64), torch.tensor(query_lens).cumsum(0)))
    counted: Counter[str] = Counter()

    def count(name, amount, reason=""):
        counted[name] += amount

    if table is None:
        table = torch.arange(1, 1 + 3 * 40, dtype=torch.int32).view(3, 40)
    slots = torch.arange(int(start[-1]))
    step = planner.split(
        start, torch.tensor(seq_lens), prompts, table, slots, lambda *part: part, count
    )
    return step, counted


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
