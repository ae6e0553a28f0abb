# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Policy functions against the independent brute force, and their properties."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import rocketkv_bruteforce as brute
from support.policies import make_policy

from vllm_sparse.config import load_settings
from vllm_sparse.policies import rocketkv


@given(
    prompt_len=st.integers(1, 200_000),
    new_tokens=st.integers(0, 4096),
    budget=st.sampled_from([16, 64, 100, 256, 512, 1024, 4096]),
    dim=st.sampled_from([64, 80, 96, 128, 256]),
    sizes=st.sampled_from([None, (1,), (2,), (4,), (1, 2, 4), (2, 8)]),
)
@settings(max_examples=300, deadline=None)
def test_plan_equals_brute_force(prompt_len, new_tokens, budget, dim, sizes):
    ours = rocketkv.plan(prompt_len, new_tokens, budget, dim, page_sizes=sizes)
    assert ours._asdict() == brute.plan(prompt_len, new_tokens, budget, dim, page_sizes=sizes)
    assert 1 <= ours.top_r <= dim
    assert ours.prompt_budget <= prompt_len


def test_plan_reproduces_the_papers_example():
    # 32,128 tokens at t = 512: the split, page and channel count of the paper's worked rows.
    assert rocketkv.plan(32000, 128, 512, 128) == (3186, 3058, 3, 61, 256, False)


def test_the_preset_paper_plans_as_the_paper_does():
    """But that its pages of three tokens are of four, with as many bytes read."""
    own = load_settings({"vllm_sparse": {"config": "paper"}}, "rocketkv")
    assert (own.window, own.pool_kernel) == (32, 63)
    found = set()
    for prompt_len in range(own.min_context + 1, 130_000, 611):
        rest = (prompt_len, own.generation_reserve, own.token_budget, 128)
        ours = rocketkv.plan(*rest, page_sizes=own.page_sizes)
        paper = brute.plan(*rest)
        found.add((paper["page_size"], ours.page_size))
        if paper["page_size"] == 3:
            assert ours.top_r / 4 == pytest.approx(paper["top_r"] / 3, rel=0.02)
        else:
            assert ours._asdict() == paper
    assert found == {(1, 1), (2, 2), (3, 4)}


# -- retention -------------------------------------------------------------------------------------


@given(st.integers(1, 32768), st.sampled_from([16, 32, 128]), st.sampled_from([64, 256, 1024]))
@settings(max_examples=300, deadline=None)
def test_the_tail_holds_the_papers_capacity(prompt_len, block_size, budget):
    policy = make_policy(block_size=block_size, token_budget=budget, max_model_len=32768)
    retention = policy.retention(prompt_len)
    reserve = min(32, 32768 - prompt_len)
    capacity = rocketkv.plan(prompt_len, reserve, budget, 16, 8, (4,)).capacity
    kept = prompt_len - retention.dropped_blocks * block_size
    if not retention.sparse:
        assert retention.dropped_blocks == 0
        assert retention.reason in ("short_prompt", "fits_budget")
        return
    assert retention.dropped_blocks >= 1
    assert kept >= min(capacity, prompt_len)
    # Full tail blocks beyond the capacity would be memory kept for nothing.
    smallest = max(-(-capacity // block_size), policy.room_for_window())
    assert prompt_len // block_size - retention.dropped_blocks == smallest


def test_without_stage1_nothing_is_dropped_but_long_prompts_are_sparse():
    retention = make_policy(stage1=False).retention(1000)
    assert retention.sparse
    assert retention.dropped_blocks == 0
    assert make_policy(stage1=False).publishable_tokens(1000) == 0
    # Of 1032 tokens, 16 times the budget, half of it reads 3 of 16 channels of pages of 4.
    assert (retention.page_size, retention.top_r) == (4, 3)
    assert make_policy(stage1=False).window == 1, "the prompt's end shows by a query"


def test_short_and_fitting_prompts_stay_dense_and_shared():
    assert make_policy().retention(64).reason == "short_prompt"
    assert make_policy(token_budget=4096).retention(1000).reason == "fits_budget"
    assert make_policy().publishable_tokens(64) is None
