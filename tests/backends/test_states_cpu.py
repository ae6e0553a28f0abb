# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""ROCKETKV beside layers with recurrent states: Mamba-2 (Granite 4 H), delta nets (Qwen3-Next)."""

from __future__ import annotations

import re

import pytest
from support.engine import DENSE, EVERYTHING, SETTINGS, run_engine
from support.masked import assert_tokens_of_hugging_face, gaps_to_hugging_face, policy_of

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

# With prefix caching vLLM 0.32 itself fails on Mamba-2 layers on a CPU.
MAMBA = {"enable_prefix_caching": False, "new_tokens": 60}


def block_size_of(run) -> int:
    return int(re.search(r"ROCKETKV: .* block size (\d+)", run["log"])[1])


@pytest.fixture(scope="module")
def stock(hybrid, prompts):
    return run_engine(hybrid, prompts, **MAMBA)


@pytest.fixture(scope="module")
def run(hybrid, prompts):
    return run_engine(hybrid, prompts, settings=SETTINGS, **MAMBA)


def test_recurrent_states_equal_hugging_face(hybrid, prompts, run, stock):
    size = block_size_of(run)
    assert_tokens_of_hugging_face(hybrid, prompts, run["tokens"][0], block_size=size)
    assert "decoding requests" not in run["log"]
    for sparse, other in zip(run["tokens"][0], stock["tokens"][0], strict=True):
        assert sum(a == b for a, b in zip(sparse, other, strict=True)) < 50
    policy = policy_of(block_size=size)
    dropped = sum(policy.retention(len(prompt)).dropped_blocks for prompt in prompts)
    assert run["counters"]["blocks_evicted"] == dropped > 0
    assert run["free_blocks"][0] == run["free_blocks"][1]


def test_a_budget_of_the_whole_context_equals_stock(hybrid, prompts, stock):
    """Every token goes through compaction and the sparse kernel."""
    wide = run_engine(hybrid, prompts, settings=EVERYTHING, **MAMBA)
    assert wide["tokens"] == stock["tokens"]
    assert wide["counters"]["selected_tokens"] == wide["counters"]["visible_tokens"] > 0


def test_chunks_preemption_and_dense_requests_change_nothing(hybrid, prompts, run, stock):
    """A pool of half of what six requests hold."""
    asked = [[None, DENSE] * 3, [DENSE, None] * 3]
    again = run_engine(
        hybrid, prompts, settings=SETTINGS, waves=2, max_num_batched_tokens=100,
        num_gpu_blocks_override=24, scheduler_reserve_full_isl=False,
        asked=[*asked[0], *asked[1]], **MAMBA,
    )  # fmt: skip
    for wave, tokens in zip(asked, again["tokens"], strict=True):
        runs = [stock if extra else run for extra in wave]
        assert tokens == [one["tokens"][0][i] for i, one in enumerate(runs)]
    assert again["preemptions"] > 0
    assert again["free_blocks"][0] == again["free_blocks"][1]


def test_model_runner_v2_changes_nothing(hybrid, prompts, run, stock):
    again = run_engine(
        hybrid, prompts[:3], settings=SETTINGS, max_num_batched_tokens=200,
        asked=[None, DENSE, None], **{**MAMBA, "new_tokens": 20},
        env={"VLLM_USE_V2_MODEL_RUNNER": "1", "TRITON_INTERPRET": "1"},
    )  # fmt: skip
    for row, tokens in enumerate(again["tokens"][0]):
        assert tokens == (stock if row == 1 else run)["tokens"][0][row][:20]


def test_gated_delta_nets_equal_hugging_face(delta_net, prompts):
    """In chunks and as a batch; in the second wave with prefix hits, at states that were kept.

    The delta nets themselves are Hugging Face's, in float32; everything around them is vLLM's.
    """
    asked = [prompts[i] + prompts[i + 1][:300] for i in (0, 3)]
    run = run_engine(
        delta_net, asked, settings=SETTINGS, waves=2, max_num_batched_tokens=100, new_tokens=24,
        stand_ins=("float32_delta_nets",),
    )  # fmt: skip
    for tokens in run["tokens"]:
        assert_tokens_of_hugging_face(
            delta_net, asked, tokens, block_size=block_size_of(run), head_dim=64
        )
    assert min(run["cached"][1]) > 0
    assert run["counters"]["blocks_evicted"] > 0
    assert run["free_blocks"][0] == run["free_blocks"][1]


@pytest.mark.parametrize(("caching", "blocks"), [(True, 19), (False, 18)])
def test_a_compacted_request_comes_back_beside_a_dense_one_and_delta_nets(
    delta_net, prompts, caching, blocks
):
    """The last to come loses states and tail when the others grow, and returns when one has ended.

    Its prompt is compacted once more; the dense one decodes before, meanwhile and behind.
    """
    three, asked = [prompts[2], prompts[4], prompts[0][:520]], [None, DENSE, None]
    counts, shared = [45, 100, 60], {
        "stand_ins": ("float32_delta_nets",), "max_num_batched_tokens": 200,
        "enable_prefix_caching": caching,
    }  # fmt: skip
    run = run_engine(
        delta_net, three, settings=SETTINGS, asked=asked, new_tokens=counts,
        num_gpu_blocks_override=blocks, scheduler_reserve_full_isl=False, **shared,
    )  # fmt: skip
    first, dense, last = run["tokens"][0]
    shape = {"block_size": block_size_of(run), "head_dim": 64}
    assert_tokens_of_hugging_face(delta_net, [three[0], three[2]], [first, last], **shape)
    stock = run_engine(delta_net, three[1:2], new_tokens=counts[1], **shared)
    assert dense == stock["tokens"][0][0]
    counters = run["counters"]
    assert run["preemptions"] > 0
    assert counters["prompts_compacted"] == 3
    assert counters["requests"] == 2  # who comes back was counted before
    assert counters["dense_fallbacks/requested"] == 1
    assert run["free_blocks"][0] == run["free_blocks"][1]


def test_delta_nets_of_vllm_follow_hugging_face(delta_net, prompts):
    """vLLM's own kernels take bfloat16 only, so that tokens are those of Hugging Face or close.

    Without stage 2, whose near-ties rounding decides.
    """
    settings, asked = {**SETTINGS, "stage2": False}, [prompts[0] + prompts[1][:300]]
    run = run_engine(
        delta_net, asked, settings=settings, max_num_batched_tokens=100, new_tokens=24,
        dtype="bfloat16",
    )  # fmt: skip
    shape = {"block_size": block_size_of(run), "head_dim": 64, "stage2": False}
    gaps = gaps_to_hugging_face(delta_net, asked, run["tokens"][0], **shape)
    unmasked = gaps_to_hugging_face(delta_net, asked, run["tokens"][0], sparse=False, **shape)
    assert gaps.max() < 0.1 < unmasked.max()
    assert gaps.mean() < unmasked.mean() / 4


def test_why_prefix_caching_is_refused_beside_mamba2(hybrid, prompts):
    """Stock vLLM 0.32 on a CPU: its engine dies of the first request.

    Once this fails, the refusal has lost its reason.
    """
    with pytest.raises(RuntimeError) as died:
        run_engine(hybrid, prompts[:1], **{**MAMBA, "enable_prefix_caching": True})
    assert "mamba_mixer2.py" in str(died.value)
    assert "IndexError" in str(died.value)


@pytest.mark.parametrize("kind", ["hybrid", "delta_net"])
def test_why_drafts_are_refused_beside_states(kind, request, prompts):
    """Stock vLLM 0.32 on a CPU: other tokens once drafts are configured, though none is made.

    Once this fails, the refusal has lost its reason.
    """
    model, asked = request.getfixturevalue(kind), [prompt[:200] for prompt in prompts[:2]]
    options = {"enable_prefix_caching": False, "new_tokens": 12}
    if kind == "delta_net":
        options["dtype"] = "bfloat16"
    never = {"method": "ngram", "prompt_lookup_min": 50, "prompt_lookup_max": 60}
    plain = run_engine(model, asked, **options)
    drafting = run_engine(
        model, asked, **options, speculative_config={**never, "num_speculative_tokens": 4}
    )
    assert drafting["drafted"] == 0
    for one, other in zip(plain["tokens"][0], drafting["tokens"][0], strict=True):
        assert sum(a == b for a, b in zip(one, other, strict=True)) < len(one) - 4
