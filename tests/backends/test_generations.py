# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Generations over dozens of block borders: tokens, what is derived from keys, and blocks.

With a budget of the whole context every token has to be stock vLLM's, preempted in between or not.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from support.engine import BLOCK_SIZE, IN_PROCESS, SETTINGS, SPARDA_SETTINGS
from support.forked import run_forked
from support.generations import SAMPLED

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

LENGTHS = (40, 200, 290)
NEW_TOKENS = 600
EVERYTHING = {**SETTINGS, "token_budget": 4096, "min_context": 32, "stage1": False, "window": 16}
FEW_KEPT = {"min_context": 64, "window": 8, "generation_reserve": 20}
ALL_BLOCKS = {**SPARDA_SETTINGS, "top_k": 64, "slab_gib": 0.02}
# Blocks for two thirds of what the requests come to, so that one is preempted late.
CASES: dict[str, tuple[dict[str, Any] | None, int]] = {
    "stock": (None, 200),
    "rocketkv": (EVERYTHING, 60),
    "sparda": (ALL_BLOCKS, 60),
    "rocketkv-evicting": ({**SETTINGS, **FEW_KEPT}, 60),
}


@pytest.fixture(scope="module")
def run(llama, tmp_path_factory):
    generator = torch.Generator().manual_seed(7)
    prompts = [torch.randint(1024, (n,), generator=generator).tolist() for n in LENGTHS]
    done: dict[str, dict[str, Any]] = {}

    def start(case: str) -> dict[str, Any]:
        if case in done:
            return done[case]
        settings, blocks = CASES[case]
        result = tmp_path_factory.mktemp("generations") / "result.json"
        llm = {
            "model": str(llama), "max_model_len": 1024, "max_num_seqs": 4, "block_size": BLOCK_SIZE,
            "max_num_batched_tokens": 96, "kv_cache_memory_bytes": 64 << 20,
            "num_gpu_blocks_override": blocks, "scheduler_reserve_full_isl": False,
        }  # fmt: skip
        if settings is not None:
            llm |= {"attention_backend": case.partition("-")[0].upper()}
            llm |= {"additional_config": {"vllm_sparse": settings}}
        job = {
            "llm": llm, "prompts": prompts, "new_tokens": NEW_TOKENS, "every": 97,
            "result": str(result),
        }  # fmt: skip
        run_forked("support.generations", job, IN_PROCESS, 900)
        done[case] = json.loads(result.read_text())
        return done[case]

    return start


@pytest.mark.parametrize("case", ["rocketkv", "sparda"])
def test_a_budget_of_the_whole_context_equals_stock(run, case):
    stock, found = run("stock"), run(case)
    assert not stock["preempted_at"]
    assert found["preempted_at"]
    assert 200 < max(found["preempted_at"]) < NEW_TOKENS - 100
    assert [len(tokens) for tokens in found["tokens"]] == [NEW_TOKENS] * 3
    assert found["tokens"] == stock["tokens"]


@pytest.mark.parametrize("case", ["rocketkv", "sparda"])
def test_sampled_tokens_of_a_seed_equal_stock(run, case):
    """At temperature 1 a small difference of any logit shows sooner than in the best one."""
    stock, found = run("stock"), run(case)
    assert [len(tokens) for tokens in stock["sampled"]] == [SAMPLED] * 2
    assert all(len(set(tokens)) > SAMPLED // 2 for tokens in stock["sampled"])
    assert found["sampled"] == stock["sampled"]


@pytest.mark.parametrize("case", list(CASES)[1:])
def test_what_is_derived_from_keys_equals_a_rebuild(run, case):
    assert run(case)["compared"] > 100_000


@pytest.mark.parametrize("case", list(CASES)[1:])
def test_stops_and_aborts_give_everything_back(run, case):
    found = run(case)
    assert found["free"] == [found["free"][0]] * 3
    stopped, end = found["stopped"]
    assert stopped == found["tokens"][0][: end + 1]
    assert found["again"] == [tokens[:40] for tokens in found["tokens"]]
