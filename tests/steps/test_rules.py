# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Rules that requests bring with them, for rows of one batch."""

from __future__ import annotations

import pytest
import torch
from support.policies import make_policy
from support.splits import PROMPTS, plan

from vllm_sparse.policies.quest import Quest
from vllm_sparse.policies.rocketkv import RocketKV
from vllm_sparse.steps import rules
from vllm_sparse.steps.split import StepPlanner


@pytest.mark.parametrize("kind", [RocketKV, Quest])
def test_each_row_has_the_budget_that_its_request_brings(kind):
    """As a server plans it that has this budget for all; in a second step the same."""
    planner = StepPlanner(make_policy(kind))
    budgets, lens = [0, 128, 96], (PROMPTS + 9).tolist()
    for step in (0, 1):
        found, _ = plan(planner, [n + step for n in lens], [1, 1, 1], controls=budgets)
        assert sorted(rows.control for rows in found.sparse) == sorted(budgets)
        for rows in found.sparse:
            (row,) = rows.token_index.tolist()
            policy = make_policy(kind, token_budget=rows.control or 64)
            expected, _ = plan(StepPlanner(policy), [n + step for n in lens], [1, 1, 1])
            assert planner.rules.policy_for(rows.control) == policy
            assert rows.lengths[0] == expected.sparse[0].lengths[row]
            assert rows.top_r[0] == expected.sparse[0].top_r[row]
            held = -(-int(rows.lengths[0]) // 16)
            assert torch.equal(
                rows.block_table[0, :held], expected.sparse[0].block_table[row, :held]
            )
    step, _ = plan(planner, PROMPTS.tolist(), [20, 20, 20], controls=budgets)
    expected = [make_policy(kind, token_budget=n or 64).retention(int(p)).dropped_blocks
                for n, p in zip(budgets, PROMPTS, strict=True)]  # fmt: skip
    assert [prompt.dropped_blocks for prompt in step.prompts] == expected * planner.policy.moves


def test_rules_of_old_budgets_are_forgotten(monkeypatch):
    monkeypatch.setattr(rules, "_MOST_BUDGETS", 5)
    planner = StepPlanner(make_policy())
    lens = (PROMPTS + 9).tolist()
    for first in range(64, 128):
        budgets = [first, first + 40, first]
        step, _ = plan(planner, lens, [1, 1, 1], controls=budgets)
        for rows in step.sparse:
            policy = make_policy(token_budget=rows.control)
            for row, length in zip(rows.token_index.tolist(), rows.lengths.tolist(), strict=True):
                dropped = policy.retention(int(PROMPTS[row])).dropped_blocks
                assert length == lens[row] - 16 * dropped
        assert len(planner.rules.reasons) <= 2048 + 2 + 5
