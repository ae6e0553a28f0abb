# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What policies share."""

from __future__ import annotations

from support.policies import make_policy


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
