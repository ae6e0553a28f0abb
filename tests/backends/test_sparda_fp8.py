# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""fp8 host pools of SPARDA in whole engines on a CPU, float32 models: only the cache is rounded.

Against stock vLLM with the same option where the blocks cover the context, and against Hugging
Face under the mask, which then reads, and chooses blocks by, keys and values as the cache rounds
them.
"""

from __future__ import annotations

import pytest
from support.engine import BLOCK_SIZE, run_engine
from support.fp8 import needs_stock_fp8, stored_on_cpus, stored_on_gpus
from support.masked_sparda import assert_tokens_of_hugging_face, run_sparda

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

FP8 = {"kv_cache_dtype": "fp8", "stand_ins": ("kv_scales",), "new_tokens": 60}
# A quarter of float32's.
SLAB_GIB = 1.7 / 4096


@pytest.fixture(scope="module")
def looking_ahead(llama, prompts):
    """Half of the prompts with the look-ahead, in a slab as small as start-up allows."""
    return run_sparda(llama, prompts[:3], slab_gib=SLAB_GIB, **FP8)


@needs_stock_fp8
def test_as_many_blocks_as_there_are_equal_stock(llama, prompts, stock_run):
    stock = run_engine(llama, prompts[:3], block_size=BLOCK_SIZE, **FP8)
    run = run_sparda(llama, prompts[:3], top_k=64, slab_gib=0.01, **FP8)
    assert run["tokens"] == stock["tokens"]
    assert stock["tokens"][0] != [tokens[:60] for tokens in stock_run["tokens"][0][:3]]


def test_tokens_are_those_of_hugging_face_on_rounded_numbers(llama, prompts, looking_ahead):
    tokens = looking_ahead["tokens"][0]
    assert_tokens_of_hugging_face(llama, prompts[:3], tokens, stored=stored_on_cpus)


def test_every_byte_that_moves_is_one_number(looking_ahead):
    counters = looking_ahead["counters"]
    assert counters["frame_misses"] > 0
    piece = BLOCK_SIZE * 2 * 32
    assert counters["host_to_device_bytes"] == counters["frame_misses"] * piece
    assert "0.06 GiB in fp8 for 5241 blocks" in looking_ahead["log"], "four times float32's 1,310"


def test_chunks_prefix_hits_and_preemption_change_nothing(llama, prompts, looking_ahead):
    run = run_sparda(
        llama, prompts[:3], slab_gib=SLAB_GIB, waves=2, max_num_batched_tokens=33, max_num_seqs=6,
        num_gpu_blocks_override=48, scheduler_reserve_full_isl=False, **FP8,
    )  # fmt: skip
    assert run["tokens"] == looking_ahead["tokens"] * 2
    assert run["preemptions"] > 0
    assert max(run["cached"][1]) > 0


def test_sparse_prompts_and_kept_queries(llama, prompts):
    """A selector whose queries are kept in the model's dtype; prompts that choose blocks."""
    for changes in ({"selector": "previous"}, {"sparse_prefill": 9, "dense_len": 150}):
        run = run_sparda(llama, prompts[:1], max_num_batched_tokens=100, **changes, **FP8)
        tokens = run["tokens"][0]
        assert_tokens_of_hugging_face(llama, prompts[:1], tokens, stored=stored_on_cpus, **changes)


def test_the_gpu_path_rounds_to_the_nearest(llama, prompts):
    """A first chunk, which FlashAttention serves, and another one, which is streamed."""
    prompts = [prompts[1][:301]]
    run = run_sparda(
        llama, prompts, selector="previous", kernels="triton", kv_cache_dtype="fp8",
        new_tokens=16, max_num_batched_tokens=200, timeout=900,
        env={"VLLM_USE_V2_MODEL_RUNNER": "1"},
        stand_ins=("flash_attention", "captured_graphs", "kv_scales"),
    )  # fmt: skip
    changes = {"selector": "previous", "stored": stored_on_gpus}
    assert_tokens_of_hugging_face(llama, prompts, run["tokens"][0], **changes)
    assert run["counters"]["frame_misses"] > 0
