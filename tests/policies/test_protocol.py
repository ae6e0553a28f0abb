# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What policies share."""

from __future__ import annotations

import pytest
from support.policies import make_policy

from vllm_sparse.policies.protocol import PolicySettings
from vllm_sparse.policies.quest import Quest
from vllm_sparse.policies.snapkv import SnapKV


class Unwatched(SnapKV):
    """Moves tokens without asking a query, and has no index in which any could wait."""

    window = index_width = 0


def test_parked_queries_fit_into_blocks_that_exist_before_the_prompt_ends():
    for block_size in (16, 32, 128):
        for group in (1, 2, 4, 7):
            policy = make_policy(block_size=block_size, group_size=group, window=32)
            room = 2 * (block_size // 4) // group
            for prompt_len in range(65, 2000, 7):
                retention = policy.retention(prompt_len)
                if retention.sparse:
                    first_query = prompt_len - 32
                    whole = first_query // block_size - retention.dropped_blocks
                    assert whole * room >= 32


def test_without_a_window_no_block_is_set_apart_for_it():
    policy = make_policy(Unwatched, window=8)
    assert policy.room_for_window() == policy.places_in_parts(8) == 0
    for prompt_len in range(200, 300):
        dropped, whole = policy.retention(prompt_len).dropped_blocks, prompt_len // 16
        assert dropped == whole - 4
        assert policy.publishable_tokens(prompt_len) == 16 * dropped
        assert policy.tail_blocks(prompt_len) == range(dropped, whole)
        # The last token is computed in any case: its output is the first answer.
        assert policy.hittable_blocks(prompt_len) == (prompt_len - 1) // 16


def test_blocks_in_parts_hold_as_many_window_queries_as_their_parts_do():
    """A part of 8 tokens has pages of 8, whose index of 32 numbers holds one query of two heads."""
    policy = make_policy(SnapKV, window=9)
    assert policy.room_for_window() == -(-9 // 2) + 1
    assert [policy.hittable_blocks(n) for n in (300, 100, 95, 9)] == [12, 0, 0, 0]
    assert policy.places_in_parts(16) == policy.places_in_parts(8) == 10
    wide = make_policy(SnapKV, window=9, group_size=1, block_size=32)
    assert wide.places_in_parts(8) == 2 * 4 * 2


def test_only_what_is_moved_is_copied_for_others():
    policy = make_policy(SnapKV)
    moved = range(policy.publishable_tokens(300) // 16, 300 // 16)
    assert policy.tail_blocks(300) == moved
    assert len(moved) > 4
    for other, prompt_len in (
        (policy, 60), (make_policy(SnapKV, keep_prefixes=False), 300), (make_policy(Quest), 300),
    ):  # fmt: skip
        assert other.tail_blocks(prompt_len) == range(0)


def test_the_largest_budget_of_a_request_is_no_less_than_the_server_s():
    assert PolicySettings(token_budget=64).most_tokens == 64
    assert PolicySettings(token_budget=64, max_token_budget=64).most_tokens == 64
    with pytest.raises(ValueError, match="max_token_budget=63 is less"):
        PolicySettings(token_budget=64, max_token_budget=63)
