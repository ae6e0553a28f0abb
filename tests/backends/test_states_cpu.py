# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""ROCKETKV beside layers with recurrent states: Mamba-2 (Granite 4 H), delta nets (Qwen3-Next)."""

from __future__ import annotations

import re

import pytest
from support.engine import SETTINGS, run_engine
from support.masked import assert_tokens_of_hugging_face, gaps_to_hugging_face

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm


def block_size_of(run) -> int:
    return int(re.search(r"ROCKETKV: .* block size (\d+)", run["log"])[1])


def test_recurrent_states_equal_hugging_face(hybrid, prompts):
    """Prefix caching is off: with it, vLLM 0.32 itself fails on Mamba-2 layers on a CPU."""
    options = {"enable_prefix_caching": False, "new_tokens": 60}
    run = run_engine(hybrid, prompts, settings=SETTINGS, **options)
    size = block_size_of(run)
    assert_tokens_of_hugging_face(hybrid, prompts, run["tokens"][0], block_size=size)
    assert "decoding requests" not in run["log"]
    dense = run_engine(hybrid, prompts[:2], **options)
    for sparse, other in zip(run["tokens"][0], dense["tokens"][0], strict=False):
        assert sum(a == b for a, b in zip(sparse, other, strict=True)) < 50
    again = run_engine(
        hybrid, prompts, settings=SETTINGS, waves=2, max_num_batched_tokens=100,
        **options,
    )  # fmt: skip
    assert again["tokens"] == run["tokens"] * 2
    assert again["free_blocks"][0] == again["free_blocks"][1]


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
