# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""ROCKETKV beside recurrent states on the GPU's path, interpreted on a CPU."""

from __future__ import annotations

import re

import pytest
from support.engine import DENSE, SETTINGS, run_engine
from support.gpu_path import run_gpu_path
from support.masked import assert_tokens_of_hugging_face
from support.oracle import speculation

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm


@pytest.mark.parametrize("v2", [False, True], ids=["v1", "v2"])
def test_blocks_taken_in_parts_equal_hugging_face(hybrid, prompts, v2):
    """Blocks of 96, which hold a state, beside it in one pool; in chunks, then decoding together.

    Without prefix caching, with which vLLM 0.32 fails on Mamba-2 layers on a CPU. Under Model
    Runner V2 one request wants to be dense; that runner's plans read nothing back.
    """
    shared = {"enable_prefix_caching": False, "new_tokens": 4}
    further = ("zeroed_parts", *(("no_read_backs",) if v2 else ()))
    run = run_gpu_path(
        hybrid, prompts[:2], v2=v2, block_size=48, max_num_batched_tokens=200, further=further,
        asked=[None, DENSE if v2 else None], **shared,
    )  # fmt: skip
    size = int(re.search(r"ROCKETKV: .* block size (\d+) in parts of 32", run["log"])[1])
    assert size == 96
    tokens = run["tokens"][0]
    if v2:
        assert tokens.pop() == run_engine(hybrid, prompts[1:2], **shared)["tokens"][0][0]
    assert_tokens_of_hugging_face(hybrid, prompts[: len(tokens)], tokens, block_size=size)
    assert run["counters"]["prompts_compacted"] == len(tokens)
    assert run["counters"]["blocks_evicted"] > 0
    assert run["free_blocks"][0] == run["free_blocks"][1]


def test_drafts_and_prefix_hits(delta_net, prompts):
    """All at once beside gated delta nets, which Hugging Face's functions compute.

    The CPU's path without drafts is compared with Hugging Face in ``test_states_cpu``.
    """
    asked = [prompts[0] + prompts[1][:300]]
    shared = {"new_tokens": 16, "max_num_batched_tokens": 150, "enable_prefix_caching": True}
    plain = run_engine(
        delta_net, asked, settings=SETTINGS, stand_ins=("float32_delta_nets",), block_size=160,
        **shared,
    )  # fmt: skip
    oracle = speculation(asked, plain["tokens"][0])
    drafter = {"method": "ngram", "prompt_lookup_min": 1, "prompt_lookup_max": 3}
    run = run_gpu_path(
        delta_net, asked, waves=2, block_size=160, kv_cache_memory_bytes=24 << 20, **shared,
        further=(
            "loose_lengths", "no_read_backs", "float32_delta_nets", "zeroed_parts",
            "oracle_on_the_device",
        ),
        additional_config=oracle["additional_config"],
        speculative_config={**drafter, "num_speculative_tokens": 3},
    )  # fmt: skip
    assert run["tokens"] == plain["tokens"] * 2
    assert 2 < run["accepted"] < run["drafted"] - 2
    assert run["cached"][1][0] > 0
    assert run["counters"]["blocks_evicted"] > 0
    assert run["free_blocks"][0] == run["free_blocks"][1]
