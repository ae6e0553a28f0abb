# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Which prompt tokens stay by the votes of the window, against the independent brute force."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import rocketkv_bruteforce as brute
from support.policies import tensors

from vllm_sparse.policies import rocketkv
from vllm_sparse.policies.votes import top_indices


@pytest.mark.parametrize("scale", [None, 0.05])
@pytest.mark.parametrize("group", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("tokens", [40, 97, 200])
def test_prompt_selection_equals_brute_force(group, tokens, scale):
    query, keys = tensors(group * tokens, (2 * group, 8, 16), (2, tokens, 16))
    for budget in (8, 9, 30, tokens - 1, tokens, tokens + 5):
        expected = brute.select_prompt_tokens(query, keys, budget, 5, scale=scale)
        ours = rocketkv.select_prompt_tokens(query, keys, budget, 5, scale)
        assert torch.equal(ours, expected)


def test_prompt_selection_with_the_papers_kernel():
    query, keys = tensors(1, (4, 32, 16), (2, 333, 16))
    expected = brute.select_prompt_tokens(query, keys, 100)
    assert torch.equal(rocketkv.select_prompt_tokens(query, keys, 100), expected)


def test_prompt_selection_breaks_ties_to_the_lowest_position():
    query, keys = torch.zeros(2, 4, 8), torch.zeros(1, 20, 8)  # every score is equal
    kept = rocketkv.select_prompt_tokens(query, keys, 9, 3)
    assert kept.tolist() == [[0, 1, 2, 3, 4, 16, 17, 18, 19]]


def test_prompt_selection_refuses_a_budget_below_the_window():
    query, keys = tensors(0, (2, 8, 16), (1, 40, 16))
    with pytest.raises(ValueError, match="smaller than the window"):
        rocketkv.select_prompt_tokens(query, keys, 7)
    with pytest.raises(ValueError, match="must be odd"):
        rocketkv.select_prompt_tokens(query, keys, 9, 4)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.data())
@settings(max_examples=200, deadline=None)
def test_top_indices_with_ties(values, data):
    count = data.draw(st.integers(0, len(values)))
    chosen = top_indices(torch.tensor(values, dtype=torch.float32), count)
    expected = sorted(sorted(range(len(values)), key=lambda i: (-values[i], i))[:count])
    assert chosen.tolist() == expected
