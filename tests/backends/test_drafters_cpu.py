# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Drafters whose layers keep keys and values in our blocks, and are compacted with the model's.

Wrong keys would not show in tokens, which the model verifies, but in what is accepted.
"""

from __future__ import annotations

import pytest
from reference.random_models import save_random_model
from support.drafters import DRAFTS, drafts, save_eagle3, save_knowing_eagle, save_mimo
from support.engine import BLOCK_SIZE, DENSE, EVERYTHING, NEW_TOKENS, SETTINGS, run_engine
from support.fp8 import needs_stock_fp8
from support.masked import assert_tokens_of_hugging_face

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm


@pytest.mark.parametrize(("blocks", "chunk"), [(400, 2048), (78, 2048), (50, 100)])
def test_the_model_itself_as_drafter_is_accepted(llama, prompts, sparse_run, blocks, chunk):
    """In waves, in chunks, and with preemption where blocks lack.

    The step that ends a prompt drafts densely. All that is drafted later must be accepted, but for
    what a request no longer needs.
    """
    run = run_engine(
        llama, prompts, settings=SETTINGS, block_size=BLOCK_SIZE, num_gpu_blocks_override=blocks,
        max_num_batched_tokens=chunk, waves=2, scheduler_reserve_full_isl=False,
        speculative_config=drafts(llama, "draft_model"),
    )  # fmt: skip
    assert run["tokens"] == sparse_run["tokens"] * 2
    ended = len(prompts) * 2 + run["preemptions"]
    assert run["drafted"] - run["accepted"] <= 2 * DRAFTS * ended
    assert run["accepted"] > (DRAFTS - 1) / DRAFTS * 2 * len(prompts) * NEW_TOKENS * 0.9
    assert (run["preemptions"] > 0) == (blocks < 400)
    assert run["free_blocks"][0] == run["free_blocks"][1]
    assert max(run["cached"][1]) > 0


def test_dense_requests_beside_sparse_ones(llama, prompts, sparse_run, stock_run):
    """Both are drafted for by the model itself, in the same steps."""
    run = run_engine(
        llama, prompts, settings=SETTINGS, block_size=BLOCK_SIZE, max_num_batched_tokens=256,
        asked=[None, DENSE] * 3, speculative_config=drafts(llama, "draft_model"),
    )  # fmt: skip
    for row, tokens in enumerate(run["tokens"][0]):
        assert tokens == (stock_run if row % 2 else sparse_run)["tokens"][0][row]
    assert run["drafted"] - run["accepted"] <= 2 * DRAFTS * len(prompts)


@pytest.fixture(scope="module")
def knowing(tmp_path_factory):
    """A Llama of one layer and the EAGLE head that is the same."""
    folder = tmp_path_factory.mktemp("knowing")
    model = save_random_model(folder / "model", layers=1)
    return model, save_knowing_eagle(folder / "eagle", model)


@pytest.mark.parametrize("cache", ["auto", pytest.param("fp8", marks=needs_stock_fp8)])
def test_heads_that_know_the_model_are_accepted(knowing, prompts, cache):
    """As often as with stock attention, where everything is kept and read, but compacted."""
    model, head = knowing
    shared = {
        "block_size": BLOCK_SIZE, "speculative_config": drafts(head, "eagle"),
        "kv_cache_dtype": cache,
    }  # fmt: skip
    stock = run_engine(model, prompts, **shared)
    run = run_engine(model, prompts, settings=EVERYTHING, **shared, max_num_batched_tokens=300)
    assert run["tokens"] == stock["tokens"]
    assert run["counters"]["selected_tokens"] == run["counters"]["visible_tokens"] > 0
    assert 0.9 * stock["drafted"] < stock["accepted"]
    assert abs(run["accepted"] - stock["accepted"]) <= 2 * DRAFTS * len(prompts)


def test_heads_are_accepted_behind_what_returns_from_a_tier(knowing, prompts):
    """Six prompts, three times through a pool that holds two: hits come from host memory.

    A head whose keys and values did not return would draft otherwise, and keep other tokens.
    """
    model, head = knowing
    shared = {
        "settings": SETTINGS, "block_size": BLOCK_SIZE, "num_gpu_blocks_override": 48,
        "waves": 3, "new_tokens": 40, "speculative_config": drafts(head, "eagle"),
    }  # fmt: skip
    without = run_engine(model, prompts, **shared, enable_prefix_caching=False)
    run = run_engine(model, prompts, **shared, kv_offloading_size=0.05)
    assert run["tokens"] == without["tokens"]
    assert min(run["cached"][2]) >= 256
    assert run["drafted"] == without["drafted"]
    assert run["accepted"] == without["accepted"] > 100
    assert run["free_blocks"][0] == run["free_blocks"][1]


def test_a_head_s_tokens_equal_hugging_face(knowing, prompts):
    """What the head keeps is its own choice; hits end a block earlier than without it."""
    model, head = knowing
    run = run_engine(
        model, prompts, settings=SETTINGS, block_size=BLOCK_SIZE, waves=2,
        num_gpu_blocks_override=78, speculative_config=drafts(head, "eagle"),
    )  # fmt: skip
    assert_tokens_of_hugging_face(model, prompts, run["tokens"][0])
    assert run["tokens"][1] == run["tokens"][0]
    assert run["accepted"] > 0
    assert max(run["cached"][1]) > 0
    assert run["free_blocks"][0] == run["free_blocks"][1]


def test_eagle3_changes_nothing(llama, prompts, sparse_run, tmp_path):
    """All of its drafts are rejected, in an engine in a process of its own."""
    head = save_eagle3(tmp_path / "eagle3", llama)
    run = run_engine(
        llama, prompts, settings=SETTINGS, block_size=BLOCK_SIZE, max_num_batched_tokens=100,
        speculative_config=drafts(head, "eagle3"), in_process=False,
        stand_ins=("forked_workers",),
    )  # fmt: skip
    assert run["tokens"] == sparse_run["tokens"]
    assert run["drafted"] > run["accepted"] + 100


def test_layers_that_predict_one_token_more_change_nothing(qwen2, prompts, tmp_path):
    """In chunks, with prefix hits and preemption; and where everything is kept and read."""
    model = save_mimo(tmp_path / "mimo", qwen2)
    shared = {
        "block_size": BLOCK_SIZE, "new_tokens": 40, "speculative_config": drafts(None, "mtp", 1)
    }  # fmt: skip
    run = run_engine(
        model, prompts, settings=SETTINGS, **shared, waves=2, max_num_batched_tokens=100,
        num_gpu_blocks_override=44, scheduler_reserve_full_isl=False,
    )  # fmt: skip
    for tokens in run["tokens"]:
        assert_tokens_of_hugging_face(qwen2, prompts, tokens)
    assert run["drafted"] > run["accepted"] + 50
    assert run["preemptions"] > 0
    assert max(run["cached"][1]) > 0
    assert run["free_blocks"][0] == run["free_blocks"][1]
    stock = run_engine(model, prompts[:3], **shared)
    wide = run_engine(model, prompts[:3], settings=EVERYTHING, **shared)
    assert wide["tokens"] == stock["tokens"]
    assert wide["counters"]["prompts_compacted"] == 3
    assert wide["accepted"] == stock["accepted"]


def test_a_draft_model_of_another_shape_changes_nothing(llama, prompts, sparse_run, tmp_path):
    """One KV head of twice the numbers, in blocks of as many bytes."""
    model = save_random_model(tmp_path / "draft", layers=1, heads=4, kv_heads=1, head_dim=64)
    run = run_engine(
        llama, prompts, settings=SETTINGS, block_size=BLOCK_SIZE, max_num_batched_tokens=200,
        speculative_config=drafts(model, "draft_model"),
    )  # fmt: skip
    assert run["tokens"] == sparse_run["tokens"]
    assert run["drafted"] > run["accepted"]
    assert run["free_blocks"][0] == run["free_blocks"][1]


def test_where_tokens_stay_in_place(llama, prompts):
    """QUEST, whose index grows with prompts, in the drafter's layers too."""
    settings = {"token_budget": 64, "min_context": 128, "page_size": 8, "skip_layers": 1}
    shared = {"settings": settings, "backend": "quest", "block_size": BLOCK_SIZE, "new_tokens": 40}
    plain = run_engine(llama, prompts[:3], **shared)
    run = run_engine(
        llama, prompts[:3], **shared, max_num_batched_tokens=202,
        speculative_config=drafts(llama, "draft_model"),
    )  # fmt: skip
    assert run["tokens"] == plain["tokens"]
    assert run["accepted"] > 0.9 * run["drafted"]
