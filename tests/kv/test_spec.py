# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What vLLM allocates, and how much of a request others may share and find."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from support.configuration import configuration
from support.policies import make_policy

from vllm_sparse.control import AS_SET, DENSE
from vllm_sparse.device_room import mlp_bytes
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


def test_what_a_request_may_find_is_what_is_shared_and_what_is_copied():
    policy = make_policy()
    spec = PolicySpec.wrap(stock(), policy)
    for length in (300, 401, 700):
        shared, most = policy.publishable_tokens(length), 16 * policy.hittable_blocks(length)
        assert spec.publishable_tokens(length, AS_SET) == shared
        assert spec.hittable_tokens(length, AS_SET) == most > shared
        assert spec.tail_blocks(length, AS_SET) == range(shared // 16, length // 16)
        assert spec.hittable_tokens(length, DENSE) is None
        assert spec.publishable_tokens(length, DENSE) is None
        assert not spec.tail_blocks(length, DENSE)
        larger = make_policy(token_budget=96).publishable_tokens(length)
        assert spec.publishable_tokens(length, 96) == larger < shared


@pytest.mark.parametrize(("copied", "most"), [(0, 3), (2, 3), (100, 100)])
def test_what_a_step_may_copy(monkeypatch, copied, most):
    page = 2 * 16 * (2 * 16 + 2 * 16 // 4) * 4
    monkeypatch.setattr(of_spec, "LEAST_COPIED_BYTES", 3 * page)
    spec = PolicySpec.wrap(stock(), make_policy(), copied_bytes=copied * page)
    assert (spec.page_size_bytes, spec.most_copies) == (page, most)
    monkeypatch.setattr(of_spec, "LEAST_COPIED_BYTES", 1)
    assert PolicySpec.wrap(stock(), make_policy()).most_copies == 1


# Hidden size, width of the MLP, KV heads of: Llama 2 7B, Llama 3.1 8B.
@pytest.mark.parametrize(
    ("hidden", "width", "kv_heads", "batched", "turns"),
    [
        (4096, 11008, 32, 2048, 1), (4096, 11008, 32, 8192, 5),
        (4096, 14336, 8, 2048, 4), (4096, 14336, 8, 8192, 8),
    ],
)  # fmt: skip
@pytest.mark.parametrize("ranks", [1, 4])
def test_another_turn_of_8k_finds_all_but_its_window(
    hidden, width, kv_heads, batched, turns, ranks
):
    """And several do in one step, whose activations take as much memory as their copies."""
    config = configuration("ROCKETKV", parallel_config__tensor_parallel_size=ranks)
    config.model_config.hf_text_config = SimpleNamespace(
        hidden_size=hidden, intermediate_size=width
    )
    config.scheduler_config.max_num_batched_tokens = batched
    layer = FullAttentionSpec(
        block_size=64, num_kv_heads=kv_heads // ranks, head_size=128, dtype=torch.bfloat16
    )
    policy = make_policy(
        head_dim=128, block_size=64, max_model_len=1 << 15, token_budget=1024, window=32,
        generation_reserve=256,
    )  # fmt: skip
    spec = PolicySpec.wrap(layer, policy, copied_bytes=mlp_bytes(config))
    hits = spec.hittable_tokens(8704, AS_SET) // 64
    assert 8704 // 64 - hits <= 3, "blocks that hold the window's tokens, or its queries"
    assert turns * (hits - spec.tail_blocks(8704, AS_SET).start) <= spec.most_copies


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
