# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What vLLM allocates, and how much of a request others may share and find."""

from __future__ import annotations

import pytest
import torch
from support.policies import make_policy

from vllm_sparse.control import AS_SET, DENSE
from vllm_sparse.policies.quest import Quest
from vllm_sparse.policies.rocketkv import RocketKV
from vllm_sparse.policies.sparda import SpardaSettings

pytest.importorskip("vllm")

from vllm.v1.kv_cache_interface import FullAttentionSpec

from vllm_sparse.kv import spec as of_spec
from vllm_sparse.kv.spec import PolicySpec, SpardaSpec


def stock(block_size: int = 16, dtype: torch.dtype = torch.float32) -> FullAttentionSpec:
    return FullAttentionSpec(block_size=block_size, num_kv_heads=2, head_size=16, dtype=dtype)


@pytest.mark.parametrize("kind", [RocketKV, Quest])
def test_a_block_of_fp8_takes_half_of_bfloat16_s_bytes(kind):
    """Its index included; vLLM's dtype of fp8 is bytes."""
    wide, narrow = stock(dtype=torch.bfloat16), stock(dtype=torch.uint8)
    full, half = (PolicySpec.wrap(spec, make_policy(kind)) for spec in (wide, narrow))
    assert 2 * half.page_size_bytes == full.page_size_bytes > wide.page_size_bytes


@pytest.mark.parametrize(
    ("prefill", "short", "long", "dense"),
    [
        (False, 500, 900, None),  # outputs differ from prompts, whose tokens read everything
        (True, None, None, 500),  # all alike, but what somebody has read densely
        (8, None, None, 500),
        (9, 500, 900, 500),
    ],
)
def test_what_of_a_sparda_request_others_may_share(prefill, short, long, dense):
    settings = SpardaSettings(
        selector="query", local_blocks=2, top_k=8, dense_len=500, sparse_prefill=prefill
    )
    spec = SpardaSpec.wrap(stock(64), settings)
    for tokens in (spec.publishable_tokens, spec.hittable_tokens):
        assert (tokens(100, AS_SET), tokens(900, AS_SET)) == (short, long)
        assert (tokens(100, DENSE), tokens(900, DENSE)) == (dense, dense)
    assert spec.page_size_bytes == 2 * 4 * 16 * 4, "four windows' mean keys of two heads"


@pytest.mark.parametrize("copies", [1, 3, 100])
def test_what_a_request_may_find_is_what_is_shared_and_what_a_step_may_copy(monkeypatch, copies):
    policy = make_policy()
    spec = PolicySpec.wrap(stock(), policy)
    assert spec.page_size_bytes == 2 * 16 * (2 * 16 + 2 * 16 // 4) * 4
    monkeypatch.setattr(of_spec, "MOST_COPIED_BYTES", copies * spec.page_size_bytes)
    assert spec.most_copies == copies
    for length in (300, 401, 700):
        shared, most = policy.publishable_tokens(length), 16 * policy.hittable_blocks(length)
        assert spec.publishable_tokens(length, AS_SET) == shared
        assert spec.hittable_tokens(length, AS_SET) == min(most, shared + 16 * copies)
        assert spec.tail_blocks(length, AS_SET) == range(shared // 16, length // 16)
        assert spec.hittable_tokens(length, DENSE) is None
        assert spec.publishable_tokens(length, DENSE) is None
        assert not spec.tail_blocks(length, DENSE)
        larger = make_policy(token_budget=96).publishable_tokens(length)
        assert spec.publishable_tokens(length, 96) == larger < shared
    monkeypatch.setattr(of_spec, "MOST_COPIED_BYTES", 1)
    assert spec.most_copies == 1


def test_beside_other_layers_nothing_is_copied():
    spec, policy = PolicySpec.wrap(stock(), make_policy(), beside_others=True), make_policy()
    assert not spec.tail_blocks(400, AS_SET)
    assert spec.hittable_tokens(400, AS_SET) == policy.publishable_tokens(400)


def test_tokens_that_stay_in_place_are_shared_up_to_the_prompt_s_end():
    spec = PolicySpec.wrap(stock(), make_policy(Quest))
    assert spec.publishable_tokens(400, AS_SET) == spec.hittable_tokens(400, AS_SET) == 400


def test_layers_that_share_a_block_table_share_what_we_add():
    policy = make_policy()
    spec = PolicySpec.wrap(stock(), policy, "ROCKETKV", "instance", beside_others=True)
    merged = PolicySpec.merge([spec, spec])
    assert merged == spec
    assert (merged.policy, merged.backend, merged.instance) == (policy, "ROCKETKV", "instance")
    assert merged.beside_others
