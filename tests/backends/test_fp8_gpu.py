# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""fp8 KV caches on the GPU path, in whole engines on a CPU: all of it but the driver.

Numbers are rounded to the nearest here. FlashAttention over a prompt takes queries of fp8;
ROCKETKV's kernels and votes do not.
"""

from __future__ import annotations

import pytest
from support import policy_cases
from support.engine import BLOCK_SIZE, SETTINGS, run_engine
from support.fp8 import nearest, stored_on_gpus
from support.masked import assert_tokens_of_hugging_face
from support.policy_cases import CASES
from support.stand_ins import QUERY_SCALE

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

SPARSE = {**SETTINGS, "window": 8}
SLOTS = 4
OPTIONS = {
    "block_size": BLOCK_SIZE, "kv_cache_dtype": "fp8", "new_tokens": 8, "timeout": 900,
    "kv_cache_memory_bytes": 2 << 20, "env": {"VLLM_USE_V2_MODEL_RUNNER": "1"},
    "stand_ins": ("flash_attention", "captured_graphs", "kv_scales"),
}  # fmt: skip
ROUNDED = {"stored": stored_on_gpus, "asked": lambda query: nearest(query, QUERY_SCALE)}


@pytest.mark.parametrize("chunk", [320, 101])
def test_tokens_are_those_of_hugging_face_on_rounded_numbers(llama, prompts, chunk):
    """607 tokens in chunks of 101: the last comes alone, and its query waits unrounded."""
    run = run_engine(
        llama, prompts[1:2], settings={**SPARSE, "kernels": "triton"},
        max_num_batched_tokens=chunk, **OPTIONS,
    )  # fmt: skip
    assert run["counters"]["prompts_compacted"] == 1
    assert_tokens_of_hugging_face(
        llama, prompts[1:2], run["tokens"][0], query_slots=SLOTS, window=8, **ROUNDED
    )


def test_quest_chooses_by_rounded_numbers(llama, prompts):
    """It leaves tokens in place and selects in PyTorch."""
    case = CASES[0]
    run = run_engine(
        llama, prompts[1:2], backend=case.name, settings={**case.settings, "kernels": "triton"},
        **OPTIONS,
    )  # fmt: skip
    assert run["counters"]["decode_rows"] > 0
    policy_cases.assert_tokens_of_hugging_face(
        case, llama, prompts[1:2], run["tokens"][0], query_slots=SLOTS, **ROUNDED
    )
