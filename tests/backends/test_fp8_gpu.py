# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""fp8 KV caches on the GPU path, in whole engines on a CPU: all of it but the driver.

Numbers are rounded to the nearest here. FlashAttention over a prompt takes queries of fp8;
ROCKETKV's kernels and votes do not.
"""

from __future__ import annotations

import pytest
from support.engine import BLOCK_SIZE, SETTINGS, run_engine
from support.fp8 import nearest, stored_on_gpus
from support.masked import assert_tokens_of_hugging_face
from support.stand_ins import QUERY_SCALE

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

SPARSE = {**SETTINGS, "window": 8}
SLOTS = 4


@pytest.mark.parametrize("chunk", [320, 101])
def test_tokens_are_those_of_hugging_face_on_rounded_numbers(llama, prompts, chunk):
    """607 tokens in chunks of 101: the last comes alone, and its query waits unrounded."""
    run = run_engine(
        llama, prompts[1:2], settings={**SPARSE, "kernels": "triton"}, block_size=BLOCK_SIZE,
        kv_cache_dtype="fp8", new_tokens=8, max_num_batched_tokens=chunk, timeout=900,
        kv_cache_memory_bytes=2 << 20, env={"VLLM_USE_V2_MODEL_RUNNER": "1"},
        stand_ins=("flash_attention", "captured_graphs", "kv_scales"),
    )  # fmt: skip
    assert run["counters"]["prompts_compacted"] == 1
    assert_tokens_of_hugging_face(
        llama, prompts[1:2], run["tokens"][0], stored=stored_on_gpus,
        asked=lambda query: nearest(query, QUERY_SCALE), query_slots=SLOTS, window=8,
    )  # fmt: skip


def test_another_policy_equals_itself_without_the_gpu_path(llama, prompts):
    """QUEST leaves tokens in place and selects in PyTorch; with room for everything, as dense."""
    shared = {
        "backend": "quest", "block_size": BLOCK_SIZE, "kv_cache_dtype": "fp8", "new_tokens": 8,
        "kv_cache_memory_bytes": 2 << 20, "timeout": 900,
        "env": {"VLLM_USE_V2_MODEL_RUNNER": "1"},
        "stand_ins": ("flash_attention", "captured_graphs", "kv_scales"),
    }  # fmt: skip
    settings = {"min_context": 128, "token_budget": 2048, "kernels": "triton", "skip_layers": 0}
    wide = run_engine(llama, prompts[1:2], settings=settings, **shared)
    dense = run_engine(llama, prompts[1:2], settings={**settings, "min_context": 1024}, **shared)
    assert wide["counters"]["decode_rows"] > 0
    assert "decode_rows" not in {k for k, v in dense["counters"].items() if v}
    assert wide["tokens"][0][0][0] == dense["tokens"][0][0][0]
