# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Prompts are compacted once, before what follows them is read, however their request is cut."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.policies import make_policy

from vllm_sparse.control import DENSE
from vllm_sparse.policies.rocketkv import RocketKV
from vllm_sparse.policies.snapkv import SnapKV
from vllm_sparse.steps.split import StepPlanner

PROMPT, WINDOW = 300, 32


def step(planner, start, end, controls=None):
    """What happens to the prompt of the second of two requests in a step."""
    starts, lens = torch.tensor([0, 1, 1 + end - start]), torch.tensor([340, end])
    prompts, table = torch.tensor([PROMPT, PROMPT]), torch.arange(80, dtype=torch.int32).view(2, 40)
    counted: Counter[str] = Counter()

    def count(name, amount, reason=""):
        counted[name] += amount

    rule = planner.rules.find_on_host(prompts, controls)
    begun = planner.prompts.begun(starts, lens, prompts, controls, table, count)
    ending = planner.prompts.ending(starts, lens, prompts, rule, table, count)
    return begun, ending, counted["prompts_compacted"]


@pytest.mark.parametrize("kind", [RocketKV, SnapKV])
@settings(max_examples=60, deadline=None)
@given(cuts=st.sets(st.integers(1, PROMPT + 20) | st.integers(PROMPT - 40, PROMPT + 2)))
def test_each_window_query_waits_once_and_one_compaction_follows(kind, cuts):
    planner = StepPlanner(make_policy(kind, window=WINDOW))
    waiting, compactions = [], 0
    cuts = sorted({0, PROMPT + 21, *cuts})
    for start, end in pairwise(cuts):
        begun, ending, counted = step(planner, start, end)
        assert counted == len(begun) + sum(prompt.compacts for prompt in ending)
        compactions += counted
        for prompt in begun:
            assert start == PROMPT
            assert prompt.parked == WINDOW == len(waiting)
        for prompt in ending:
            assert prompt.parked == len(waiting)
            assert prompt.compacts == (end > PROMPT)
            assert prompt.blocks.tolist() == list(range(40, 40 + 19))
            tokens = range(prompt.first_token, prompt.last_token)
            waiting += [token - 1 + start for token in tokens]
    assert waiting == list(range(PROMPT - WINDOW, PROMPT))
    assert compactions == 1


def test_who_asks_to_be_dense_and_rows_of_nobody_are_left_alone():
    planner = StepPlanner(make_policy())
    asked = torch.tensor([0, DENSE], dtype=torch.int32)
    assert step(planner, PROMPT, PROMPT + 1, asked) == ((), (), 0)
    empty = torch.zeros(1, dtype=torch.int32)
    table = torch.zeros(1, 40, dtype=torch.int32)
    batch = torch.tensor([0, 1]), empty + 1, empty, None, table
    assert planner.prompts.begun(*batch, lambda *_: None) == ()
