# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""QUEST's page bounds against brute force."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import hf_policies
from support.policies import make_policy

from vllm_sparse.policies.quest import Quest, QuestSettings


def index_of(policy: Quest, keys: torch.Tensor, size: int) -> torch.Tensor:
    """The index of a row's pages, the last of which may be partial."""
    heads, n, dim = keys.shape
    pages = -(-n // size)
    padded = torch.full((heads, pages * size, dim), torch.nan)
    padded[:, :n] = keys
    present = (torch.arange(pages * size) < n).view(pages, size)
    return policy.index(padded.unflatten(1, (pages, size)), present)


@given(
    n=st.integers(1, 90), group=st.sampled_from([1, 2, 7]), size=st.sampled_from([2, 8]),
    top_k=st.sampled_from([16, 17, 40]), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_pages_with_the_largest_bounds_are_read(n, group, size, top_k, seed):
    generator = torch.Generator().manual_seed(seed)
    scale = seed % 2 * 0.05 or None
    policy = make_policy(Quest, page_size=size, token_budget=top_k, group_size=group, scale=scale)
    keys = torch.randn(2, n, 16, generator=generator)
    query = torch.randn(2 * group, 16, generator=generator)
    run = hf_policies.Quest(1, size, top_k, 0)
    run.scaling = scale
    expected = run.visible_tokens(0, query, keys)
    # Pages beyond the row hold anything, as in a block table of unlike rows.
    index = torch.cat((index_of(policy, keys, size), torch.full((2, 3, 32), torch.nan)), 1)
    width = min(top_k, index.shape[1] * size)
    rows = torch.tensor([n])
    chosen = policy.select(query.view(1, 2, group, 16), index[None], rows, size, width)
    for head in range(2):
        assert chosen[0, head, : min(width, n)].tolist() == expected[head].tolist()


def test_scores_bound_what_a_page_can_get():
    """A bound is at least the largest logit of its page; scores rank pages as bounds do."""
    generator = torch.Generator().manual_seed(0)
    policy = make_policy(Quest, page_size=4, group_size=1)
    keys = torch.randn(1, 64, 16, generator=generator)
    query = torch.randn(1, 1, 1, 16, generator=generator)
    low, high = index_of(policy, keys, 4).chunk(2, -1)
    bound = torch.maximum(query[0, 0] * low[0], query[0, 0] * high[0]).sum(-1)
    logits = (keys[0] @ query[0, 0, 0]).view(16, 4).amax(-1)
    assert (bound >= logits - 1e-5).all()
    score = policy.score(query, index_of(policy, keys, 4)[None], torch.tensor([64]), 4)[0, 0]
    assert score.argsort().tolist() == bound.argsort().tolist()
    assert float(score.sum()) == pytest.approx(1)


def test_nothing_leaves_and_prompts_are_shared():
    policy = make_policy(Quest)
    assert policy.freed_blocks(1000, 1500) == (0, 0)
    assert policy.publishable_tokens(1000) == 1000
    assert policy.publishable_tokens(64) is None
    assert policy.retention(64).reason == "short_prompt"


def test_two_pages_and_pages_of_one_token_are_allowed():
    assert QuestSettings(token_budget=32).token_budget == 32
    assert QuestSettings(page_size=1, token_budget=16).page_size == 1


@pytest.mark.parametrize("wrong", [{"page_size": 12}, {"token_budget": 31}])
def test_settings_that_cannot_work_are_refused(wrong):
    with pytest.raises(ValueError, match="page_size"):
        QuestSettings(**wrong)
