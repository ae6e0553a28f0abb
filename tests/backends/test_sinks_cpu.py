# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Learned attention sinks in whole engines: a random gpt-oss, whose other layers have windows."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
from reference import hf_policies, hf_rocketkv
from support.engine import BLOCK_SIZE, DENSE, EVERYTHING, SETTINGS, run_engine
from support.fp8 import needs_stock_fp8, stored_on_cpus
from support.masked import assert_tokens_of_hugging_face, hf_model
from support.oracle import speculation
from support.policies import make_policy

from vllm_sparse.policies.snapkv import SnapKV

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

NEW_TOKENS = 40
BLOCKS = 40  # too few for all at once
SNAPKV = {"token_budget": 96, "min_context": 128, "window": 8}


class Case(NamedTuple):
    """Another policy, its settings, and the run that Hugging Face's mask comes from."""

    name: str
    settings: dict[str, Any]
    run: Any


def snapkv(length: int) -> Any:
    policy = make_policy(SnapKV, group_size=4, head_dim=64, block_size=BLOCK_SIZE, **SNAPKV)
    kept = length - policy.retention(length).dropped_blocks * BLOCK_SIZE
    further = {"window": 8, "kernel_size": 7, "sparse": True, "stage2": False}
    return hf_rocketkv._Run(length, kept, further)


CASES = [
    Case(
        "quest",
        {"token_budget": 64, "min_context": 128, "page_size": 8, "skip_layers": 1},
        lambda length: hf_policies.Quest(length, 8, 64, 1),
    ),
    Case("snapkv", SNAPKV, snapkv),
    Case(
        "streamingllm",
        {"token_budget": 96, "min_context": 128, "sinks": 4},
        lambda length: hf_policies.StreamingLLM(length, 4, 96),
    ),
]


@pytest.fixture(scope="module")
def stock(gpt_oss, prompts):
    return run_engine(gpt_oss, prompts[:3], block_size=BLOCK_SIZE, new_tokens=NEW_TOKENS)


@pytest.fixture(scope="module")
def run(gpt_oss, prompts):
    return run_engine(
        gpt_oss, prompts[:3], settings=SETTINGS, block_size=BLOCK_SIZE, new_tokens=NEW_TOKENS
    )


def test_tokens_are_those_of_hugging_face_under_the_mask(gpt_oss, prompts, run, stock):
    assert_tokens_of_hugging_face(gpt_oss, prompts[:3], run["tokens"][0], head_dim=64)
    for ours, dense in zip(run["tokens"][0], stock["tokens"][0], strict=True):
        assert sum(a == b for a, b in zip(ours, dense, strict=True)) < NEW_TOKENS // 2
    assert "2 of 4 attention layers, the others have sliding windows" in run["log"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_other_policies_equal_hugging_face(gpt_oss, prompts, case):
    got = run_engine(
        gpt_oss, prompts[:2], backend=case.name, settings=case.settings, block_size=BLOCK_SIZE,
        new_tokens=NEW_TOKENS,
    )["tokens"][0]  # fmt: skip
    for prompt, tokens in zip(prompts, got, strict=False):
        expected = hf_rocketkv.run_greedily(
            hf_model(gpt_oss), prompt, NEW_TOKENS, case.run(len(prompt))
        )
        assert tokens == expected


def test_a_budget_of_the_whole_context_equals_stock(gpt_oss, prompts, stock):
    """Every token goes through compaction and the sparse kernel."""
    shared = {"block_size": BLOCK_SIZE, "new_tokens": NEW_TOKENS}
    wide = run_engine(gpt_oss, prompts[:3], settings=EVERYTHING, **shared)
    assert wide["tokens"] == stock["tokens"]
    assert wide["counters"]["selected_tokens"] == wide["counters"]["visible_tokens"] > 0


def test_chunks_prefix_hits_and_preemption_change_nothing(gpt_oss, prompts, run):
    again = run_engine(
        gpt_oss, prompts[:3], settings=SETTINGS, block_size=BLOCK_SIZE, new_tokens=NEW_TOKENS,
        waves=2, max_num_batched_tokens=33, scheduler_reserve_full_isl=False,
        num_gpu_blocks_override=BLOCKS,
    )  # fmt: skip
    assert again["tokens"] == run["tokens"] * 2
    assert again["preemptions"] > 0
    assert max(again["cached"][1]) > 0
    assert again["free_blocks"][0] == again["free_blocks"][1]


def test_drafts_beside_a_dense_request_change_nothing(gpt_oss, prompts, run, stock):
    """Rows of one to six tokens, some rejected, in chunks; a dense row's sinks are stock's."""
    expected = [run["tokens"][0][0], stock["tokens"][0][1], run["tokens"][0][2]]
    drafting = run_engine(
        gpt_oss, prompts[:3], settings=SETTINGS, block_size=BLOCK_SIZE, new_tokens=NEW_TOKENS,
        max_num_batched_tokens=100, asked=[None, DENSE, None],
        **speculation(prompts[:3], expected),
    )  # fmt: skip
    assert drafting["tokens"][0] == expected
    assert 20 < drafting["accepted"] < drafting["drafted"] - 20


def test_ranks_change_nothing(gpt_oss, prompts, run):
    """Each has the sinks of its own heads."""
    two = run_engine(
        gpt_oss, prompts[:2], settings=SETTINGS, block_size=BLOCK_SIZE, new_tokens=NEW_TOKENS,
        tensor_parallel_size=2, in_process=False, stand_ins=("forked_workers",),
        env={"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
    )  # fmt: skip
    assert two["tokens"][0] == run["tokens"][0][:2]


@needs_stock_fp8
def test_fp8_caches(gpt_oss, prompts):
    """As stock vLLM's where all is read; else as Hugging Face's on what the cache holds."""
    shared = {
        "block_size": BLOCK_SIZE, "new_tokens": 24, "kv_cache_dtype": "fp8",
        "stand_ins": ("kv_scales",),
    }  # fmt: skip
    narrow = run_engine(gpt_oss, prompts[:1], settings={**SETTINGS, "window": 8}, **shared)
    assert_tokens_of_hugging_face(
        gpt_oss, prompts[:1], narrow["tokens"][0], stored=stored_on_cpus, query_slots=4, window=8,
        head_dim=64,
    )  # fmt: skip
    dense = run_engine(gpt_oss, prompts[:1], **shared)
    wide = run_engine(gpt_oss, prompts[:1], settings=EVERYTHING, **shared)
    assert wide["tokens"] == dense["tokens"] != narrow["tokens"]
