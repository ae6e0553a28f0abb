# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""SNAPKV: what stays, and where its window's queries wait."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from reference import rocketkv_bruteforce as brute
from support.policies import make_policy

from vllm_sparse.policies.snapkv import SnapKV, SnapKVSettings


@pytest.mark.parametrize("count", [20, 40, 99])
def test_votes_are_those_of_brute_force(count):
    generator = torch.Generator().manual_seed(count)
    policy = make_policy(SnapKV, window=8)
    keys = torch.randn(2, 120, 16, generator=generator)
    query = torch.randn(4, 8, 16, generator=generator)
    kept = policy.keep(query, keys, count)
    assert torch.equal(kept, torch.as_tensor(brute.select_prompt_tokens(query, keys, count, 7)))


@given(
    st.integers(1, 9000), st.sampled_from([32, 64, 128]), st.sampled_from([1, 2, 7]),
    st.sampled_from([64, 512]),
)  # fmt: skip
@example(1000, 32, 1, 64)
@example(33 * 32, 32, 7, 64)
@settings(max_examples=300, deadline=None)
def test_the_budget_stays_and_the_window_has_room(prompt_len, block_size, group, budget):
    policy = make_policy(
        SnapKV, block_size=block_size, group_size=group, token_budget=budget, window=32,
        min_context=1000,
    )  # fmt: skip
    retention, whole = policy.retention(prompt_len), prompt_len // block_size
    fits = "fits_budget" if whole <= -(-budget // block_size) else ""
    short = prompt_len <= 1000 or whole < policy.room_for_window()
    assert retention.reason == ("short_prompt" if short else fits)
    assert retention.sparse == (not retention.reason)
    if not retention.sparse:
        assert retention.dropped_blocks == 0
        return
    kept = prompt_len - retention.dropped_blocks * block_size
    assert budget <= kept < budget + 2 * block_size
    per_block = 2 * (block_size // 8) // group
    shared = policy.shared_blocks(prompt_len, retention.dropped_blocks)
    assert 0 <= shared <= retention.dropped_blocks
    # Whole blocks behind the shared ones, before the first of the window's tokens.
    assert ((prompt_len - 32) // block_size - shared) * per_block >= 32
    # None of them for nothing, but one where the window begins within a block.
    spare = (prompt_len - 32) // block_size - shared - 2
    assert shared == retention.dropped_blocks or spare * per_block < 32
    assert policy.publishable_tokens(prompt_len) == shared * block_size


@pytest.mark.parametrize("wrong", [{"pool_kernel": 4}, {"token_budget": 32}, {"skip_layers": 1}])
def test_settings_that_cannot_work_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SnapKVSettings(**wrong)
