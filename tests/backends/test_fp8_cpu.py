# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""fp8 KV caches in whole engines on a CPU, float32 models, so that only the cache is rounded.

Against stock vLLM with the same option where the budget covers the context, and against Hugging
Face under the mask, whose attention then reads keys and values as the cache rounds them.
"""

from __future__ import annotations

import re

import pytest
from support import policy_cases
from support.engine import BLOCK_SIZE, DENSE, EVERYTHING, SETTINGS, run_engine
from support.fp8 import needs_stock_fp8, stored_on_cpus
from support.masked import assert_tokens_of_hugging_face, policy_of
from support.policy_cases import CASES

from vllm_sparse.policies.snapkv import SnapKV

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, needs_stock_fp8]

FP8 = {"kv_cache_dtype": "fp8", "block_size": BLOCK_SIZE}
SCALED = {**FP8, "stand_ins": ("kv_scales",)}
# Queries of float32 that wait take four slots a number, so that a block has room for one of them.
SPARSE = {**SETTINGS, "window": 8}
SLOTS = 4


@pytest.fixture(scope="module")
def sparse_fp8(llama, prompts):
    return run_engine(llama, prompts, settings=SPARSE, new_tokens=60, **SCALED)


@pytest.fixture(scope="module")
def stock_fp8(llama, prompts):
    return run_engine(llama, prompts, **SCALED)


def test_a_budget_of_the_whole_context_equals_stock(llama, prompts, stock_fp8, stock_run):
    run = run_engine(llama, prompts, settings=EVERYTHING, **SCALED)
    assert run["tokens"] == stock_fp8["tokens"] != stock_run["tokens"]
    assert run["counters"]["selected_tokens"] == run["counters"]["visible_tokens"] > 0


def test_sparse_engine_equals_hugging_face_on_rounded_keys_and_values(llama, prompts, sparse_fp8):
    assert_tokens_of_hugging_face(
        llama, prompts, sparse_fp8["tokens"][0], stored=stored_on_cpus, query_slots=SLOTS, window=8
    )


def test_chunks_prefix_hits_and_preemption_change_nothing(llama, prompts, sparse_fp8):
    """Windows straddle chunks of 33 tokens: their queries wait unrounded."""
    run = run_engine(
        llama, prompts, settings=SPARSE, new_tokens=60, waves=2, max_num_batched_tokens=33,
        num_gpu_blocks_override=60, scheduler_reserve_full_isl=False, **SCALED,
    )  # fmt: skip
    assert run["tokens"] == sparse_fp8["tokens"] * 2
    assert run["preemptions"] > 0
    assert run["free_blocks"][0] == run["free_blocks"][1]
    policy = policy_of(query_slots=SLOTS, window=8)
    assert policy.room_for_window() == 8 + 1
    assert max(run["cached"][1]) > 0


def test_drafts_and_a_tier_of_host_memory_beside_it_change_nothing(llama, prompts, sparse_fp8):
    """All at once: six prompts of 19 blocks twice through a pool of 47, drafts mostly wrong."""
    drafter = {
        "method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 1,
        "prompt_lookup_max": 3,
    }  # fmt: skip
    run = run_engine(
        llama, prompts, settings=SPARSE, new_tokens=60, waves=2, num_gpu_blocks_override=48,
        kv_offloading_size=0.05, speculative_config=drafter, **SCALED,
    )  # fmt: skip
    assert run["tokens"] == sparse_fp8["tokens"] * 2
    assert run["drafted"] > run["accepted"] + 100
    assert min(run["cached"][1]) > 0, "the pool alone would have lost the first ones"
    assert run["free_blocks"][0] == run["free_blocks"][1]


@pytest.mark.parametrize("case", CASES[:3], ids=lambda case: case.name)
def test_other_policies(llama, prompts, stock_fp8, case):
    """In chunks, twice, beside a request that asks to be dense."""
    # Twice the slots, so that SNAPKV's queries have room.
    shape = {"block_size": BLOCK_SIZE * (2 if case.kind is SnapKV else 1), "query_slots": SLOTS}
    asked = [None, None, DENSE]
    run = run_engine(
        llama, prompts[:3], backend=case.name, settings=case.settings, asked=asked, waves=2,
        new_tokens=40, max_num_batched_tokens=100, scheduler_reserve_full_isl=False,
        **{**SCALED, "block_size": shape["block_size"]},
        num_gpu_blocks_override=1 + 40 * BLOCK_SIZE // shape["block_size"],
    )  # fmt: skip
    sparse, dense = run["tokens"][0][:2], [tokens[:40] for tokens in stock_fp8["tokens"][0][:3]]
    policy_cases.assert_tokens_of_hugging_face(
        case, llama, prompts[:2], sparse, stored=stored_on_cpus, **shape
    )
    assert run["tokens"] == [[*sparse, dense[2]]] * 2
    assert sparse != dense[:2]
    assert run["counters"]["decode_rows"] > 0
    if case.kind is not SnapKV:  # whose prompts give too much back to be preempted here
        assert run["preemptions"] > 0
        assert max(run["cached"][1]) > 0


def test_pages_of_the_whole_context_equal_stock(llama, prompts, stock_fp8):
    """QUEST's; what the others would keep is all, so that they leave such requests to stock."""
    settings = {**CASES[0].settings, "token_budget": 2048}
    run = run_engine(
        llama, prompts[:3], backend="quest", settings=settings, new_tokens=40, **SCALED
    )
    assert run["tokens"][0] == [tokens[:40] for tokens in stock_fp8["tokens"][0][:3]]
    assert run["counters"]["decode_rows"] > 0


def test_a_token_takes_a_quarter_of_float32_s_bytes(llama, prompts):
    """One block of each token's bytes: vLLM finds four times as many in the same memory."""

    def blocks(**options):
        log = run_engine(llama, prompts[:1], settings=SPARSE, new_tokens=1, **options)["log"]
        return int(re.search(r"ROCKETKV: (\d+) KV blocks", log)[1])

    plain = blocks(block_size=BLOCK_SIZE)
    assert blocks(**FP8) == pytest.approx(4 * plain, abs=4)
