# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Learned attention sinks: the softmax, and what policies choose by it."""

from __future__ import annotations

import pytest
import torch
from reference import hf_policies
from reference import rocketkv_bruteforce as brute
from support.policies import make_policy

from vllm_sparse.policies import rocketkv, sinks
from vllm_sparse.policies.quest import Quest
from vllm_sparse.policies.rocketkv import RocketKV
from vllm_sparse.policies.snapkv import SnapKV

# Of a group of three heads, one mostly reads its sink, one sometimes and one never.
SINKS = torch.tensor([9.0, 2.0, -4.0, -4.0, 9.0, 2.0])


def test_a_sink_is_one_more_entry_of_a_softmax():
    logits = torch.randn(2, 3, 50)
    logits[1, 2, 30:] = -torch.inf
    own = torch.tensor([[0.0, 5.0, -5.0], [200.0, -200.0, 3.0]])
    expected = torch.cat((logits, own.unsqueeze(-1)), -1).softmax(-1)[..., :-1]
    torch.testing.assert_close(sinks.softmax(logits, own), expected)
    assert torch.equal(sinks.softmax(logits, None), logits.softmax(-1))
    assert not sinks.softmax(torch.full((2, 5), -torch.inf), torch.zeros(2)).any()


@pytest.mark.parametrize(("kind", "pool"), [(RocketKV, 5), (SnapKV, 7)])
def test_votes_are_those_of_brute_force(kind, pool):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(6, 8, 16, generator=generator) * 2
    keys = torch.randn(2, 140, 16, generator=generator)
    policy = make_policy(kind, window=8, group_size=3, learned_sinks=SINKS, pool_kernel=pool)
    kept = policy.keep(query, keys, 40)
    assert torch.equal(kept, brute.select_prompt_tokens(query, keys, 40, pool, sinks=SINKS))
    assert not torch.equal(kept, brute.select_prompt_tokens(query, keys, 40, pool))


def test_pages_are_those_of_brute_force():
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(6, 16, generator=generator) * 2
    keys = torch.randn(2, 140, 16, generator=generator)
    bounds, chosen = rocketkv.page_extrema(keys, 4), []
    for own in (SINKS, None):
        ours = rocketkv.select_decode_tokens(query, *bounds, 140, 4, 9, 30, sinks=own)
        assert ours.tolist() == brute.select_decode_tokens(query, *bounds, 140, 4, 9, 30, sinks=own)
        chosen.append(ours)
    assert not torch.equal(*chosen)


def test_quest_s_pages_are_those_of_hugging_face_s_run():
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(6, 16, generator=generator) * 2
    keys = torch.randn(2, 136, 16, generator=generator)
    chosen = []
    for own in (4 * SINKS, None):  # bounds are larger than logits
        policy = make_policy(Quest, page_size=4, token_budget=40, group_size=3, learned_sinks=own)
        index = policy.index(keys.unflatten(1, (34, 4)), torch.ones(4, dtype=torch.bool))
        run = hf_policies.Quest(1, 4, 40, 0)
        run.learned_sinks = own
        ours = policy.select(query.view(1, 2, 3, 16), index[None], torch.tensor([136]), 4, 40)[0]
        assert torch.equal(ours, torch.stack(run.visible_tokens(0, query, keys)))
        chosen.append(ours)
    assert not torch.equal(*chosen)
