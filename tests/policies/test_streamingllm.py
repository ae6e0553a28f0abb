# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""STREAMINGLLM: what is read lies in blocks that were not freed, at every length."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.policies import make_policy

from vllm_sparse.policies.streamingllm import StreamingLLM, StreamingLLMSettings


def tokens_read(policy: StreamingLLM, n: int, held: int) -> list[int]:
    width = min(policy.top_k, held)
    query = torch.zeros(1, 3, 2, 16)
    chosen = policy.select(query, None, torch.tensor([n]), 1, width)
    assert chosen.shape == (1, 3, width)
    return chosen[0, 0, : min(width, n)].tolist()


@given(
    prompt_len=st.integers(65, 1500), made=st.integers(0, 400), sinks=st.integers(1, 15),
    block_size=st.sampled_from([16, 64]), budget=st.sampled_from([16, 64, 100]),
)  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_freed_blocks_are_not_read_and_others_are(prompt_len, made, block_size, budget, sinks):
    policy = make_policy(
        StreamingLLM, token_budget=budget, sinks=sinks, block_size=block_size, max_model_len=2048
    )
    if not policy.retention(prompt_len).sparse:
        assert policy.freed_blocks(prompt_len, prompt_len + made) == (0, 0)
        return
    first, last = policy.freed_blocks(prompt_len, prompt_len + made)
    for n in (
        prompt_len + made + 1,
        prompt_len + made + 50,
    ):  # the next step's rows, and later ones
        read = tokens_read(policy, n, 4096)
        assert read == [*range(sinks), *range(n - budget + sinks, n)]
        assert not any(first <= token // block_size < last for token in read)
    # No block between is kept for nothing.
    oldest = prompt_len + made + 1 - budget + sinks
    assert last == oldest // block_size
    assert first == -(-sinks // block_size)


def test_short_rows_read_everything():
    policy = make_policy(StreamingLLM, token_budget=32)
    assert tokens_read(policy, 20, 64) == list(range(20))
    assert tokens_read(policy, 20, 16) == [0, 1, 2, 3, *range(8, 20)]
    assert policy.retention(70).sparse
    assert policy.retention(64).reason == "short_prompt"
    assert policy.retention(65).sparse
    larger = make_policy(StreamingLLM, token_budget=80)
    assert larger.retention(80).reason == "fits_budget"
    assert larger.retention(81).sparse


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="sinks=16"):
        StreamingLLMSettings(sinks=16, token_budget=16)
