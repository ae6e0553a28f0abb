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
from vllm_sparse.policies.quest import Quest
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
            assert prompt.compacts
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


def test_where_tokens_stay_in_place_nothing_is_compacted():
    planner = StepPlanner(make_policy(Quest))
    starts, prompts = torch.tensor([0, 1, 10]), torch.tensor([PROMPT, PROMPT])
    table = torch.zeros(2, 40, dtype=torch.int32)
    for lens in ([PROMPT + 1, 340], [340, PROMPT + 2]):  # begins behind its prompt, or before
        batch = starts, torch.tensor(lens), prompts, None
        assert planner.prompts.begun(*batch, table, lambda *_: None) == ()
        assert not planner.prompts.straddled(*batch)


def test_a_replay_whose_chunk_ends_with_the_prompt_is_not_counted_again():
    planner, counted = StepPlanner(make_policy()), Counter()
    starts, lens = torch.tensor([0, 10, 12, 22]), torch.tensor([PROMPT, PROMPT, 30])
    prompts = torch.tensor([PROMPT, PROMPT, 30])
    planner.prompts.count(
        starts, lens, prompts, planner.rules.find(prompts, None),
        lambda name, amount, reason="": counted.update({name: amount}),
        torch.tensor([False, True, True]),
    )  # fmt: skip
    assert counted == {"requests": 1}


@pytest.mark.parametrize(("replayed", "counted"), [(False, 1), (True, 0), (None, 0)])
def test_a_prompt_whose_last_token_comes_with_drafts_is_counted(replayed, counted):
    """Nobody else computes tokens of both, but who computes them again."""
    planner, found = StepPlanner(make_policy()), Counter()
    starts, prompts = torch.tensor([0, 4]), torch.tensor([49])
    planner.prompts.count(
        starts, torch.tensor([52]), prompts, planner.rules.find(prompts, None),
        lambda name, amount, reason: found.update({name: amount}),
        None if replayed is None else torch.tensor([replayed]),
    )  # fmt: skip
    assert found["dense_fallbacks"] == counted


@pytest.mark.parametrize("budget", [0, DENSE, 96])
def test_a_step_that_ends_a_prompt_and_goes_on_straddles_it(budget):
    planner, asked = StepPlanner(make_policy()), torch.tensor([0, budget], dtype=torch.int32)
    prompts = torch.tensor([PROMPT, PROMPT])
    for start, end in ((280, 299), (280, 300), (280, 301), (299, 301), (300, 301), (301, 303)):
        batch = torch.tensor([0, 1, 1 + end - start]), torch.tensor([340, end]), prompts
        expected = start < PROMPT < end
        assert planner.prompts.straddled(*batch, asked) == (expected and budget != DENSE)
        assert planner.prompts.straddled(*batch, None) == expected
