# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Whole vLLM engines: against stock vLLM, against Hugging Face with the mask, against each other.

``sparse_run`` is compared with Hugging Face once; every other way to run the same requests must
then give the same tokens.
"""

from __future__ import annotations

import json
import shutil

import pytest
from reference import hf_rocketkv, lora, random_models
from support.engine import BLOCK_SIZE, EVERYTHING, NEW_TOKENS, SETTINGS, run_engine
from support.masked import (
    assert_tokens_of_hugging_face,
    gaps_to_hugging_face,
    hf_model,
    policy_of,
)
from support.oracle import speculation

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm


def test_sparse_engine_equals_hugging_face_with_the_mask(llama, prompts, sparse_run):
    assert len(prompts) >= 6
    assert len(sparse_run["tokens"][0][0]) == NEW_TOKENS
    assert_tokens_of_hugging_face(llama, prompts, sparse_run["tokens"][0])


def test_the_mask_changes_the_tokens(sparse_run, stock_run):
    """Otherwise the comparison above would prove nothing."""
    for sparse, dense in zip(sparse_run["tokens"][0], stock_run["tokens"][0], strict=True):
        assert sparse[0] == dense[0]  # the first token comes from the dense prompt pass
        assert sum(a == b for a, b in zip(sparse, dense, strict=True)) < NEW_TOKENS // 2


def test_stock_tokens_are_those_of_hugging_face(llama, prompts, stock_run):
    """vLLM runs with the plugin loaded: what is compared with that run needs a judge outside."""
    gaps = gaps_to_hugging_face(llama, prompts[:2], stock_run["tokens"][0][:2], sparse=False)
    assert gaps.max() < 1e-4


def test_qwen2_equals_hugging_face_with_the_mask(qwen2, prompts):
    run = run_engine(qwen2, prompts[:3], settings=SETTINGS, block_size=BLOCK_SIZE)
    assert_tokens_of_hugging_face(qwen2, prompts[:3], run["tokens"][0])


def test_a_scale_of_the_models_own_equals_hugging_face(granite, prompts):
    run = run_engine(granite, prompts[:3], settings=SETTINGS, block_size=BLOCK_SIZE)
    assert_tokens_of_hugging_face(granite, prompts[:3], run["tokens"][0])


@pytest.mark.parametrize("changes", [{"stage2": False}, {"skip_layers": 1}, {"page_sizes": [1, 2]}])
def test_ablations_equal_hugging_face(llama, prompts, changes):
    run = run_engine(
        llama, prompts[:3], settings={**SETTINGS, **changes}, block_size=BLOCK_SIZE, new_tokens=40
    )
    assert_tokens_of_hugging_face(llama, prompts[:3], run["tokens"][0], **changes)


def test_a_budget_of_the_whole_context_equals_stock(llama, prompts, stock_run):
    """Without eviction every token goes through compaction and the sparse kernel."""
    run = run_engine(llama, prompts, settings=EVERYTHING, block_size=BLOCK_SIZE)
    assert run["tokens"] == stock_run["tokens"]
    assert run["counters"]["selected_tokens"] == run["counters"]["visible_tokens"] > 0
    fits = run_engine(
        llama, prompts, settings={**SETTINGS, "token_budget": 4096}, block_size=BLOCK_SIZE
    )
    assert fits["tokens"] == stock_run["tokens"]
    assert fits["counters"]["dense_fallbacks/fits_budget"] == len(prompts)


@pytest.mark.parametrize("chunk", [256, 33])
def test_chunked_prefill_and_mixed_steps_change_nothing(llama, prompts, sparse_run, chunk):
    """33 tokens a step: windows straddle chunks, decode rows share steps with prompts."""
    run = run_engine(
        llama, prompts, settings=SETTINGS, block_size=BLOCK_SIZE, max_num_batched_tokens=chunk
    )
    assert run["tokens"] == sparse_run["tokens"]


def test_prefix_caching_changes_nothing(llama, prompts, sparse_run):
    run = run_engine(llama, prompts, settings=SETTINGS, block_size=BLOCK_SIZE, waves=2)
    assert run["tokens"] == sparse_run["tokens"] * 2
    policy = policy_of()
    for prompt, hit in zip(prompts, run["cached"][1], strict=True):
        # The second wave hits the dropped blocks: so wide a window needs all others to wait in.
        assert hit == policy.hittable_blocks(len(prompt)) * BLOCK_SIZE
        assert hit == policy.retention(len(prompt)).dropped_blocks * BLOCK_SIZE > 0


def test_another_turn_hits_the_whole_prompt(llama, prompts):
    """Two conversations in turns, of which the second is asked twice at once; then all again."""
    shared = {"settings": {**SETTINGS, "window": 8}, "block_size": BLOCK_SIZE, "new_tokens": 30}
    first = [prompts[1], prompts[3]]
    second = [[*prompt, *range(200 * i, 200 * i + 150)] for i, prompt in enumerate(first)]
    order = [0, 1, 2, 2, 3, 3]
    asked = [[*first, *second][i] for i in order]
    run = run_engine(llama, asked, max_num_seqs=2, waves=2, **shared)
    alone = run_engine(llama, [*first, *second], enable_prefix_caching=False, **shared)
    assert run["tokens"] == [[alone["tokens"][0][i] for i in order]] * 2
    assert_tokens_of_hugging_face(llama, second, alone["tokens"][0][2:], window=8)
    whole = [len(prompt) // BLOCK_SIZE * BLOCK_SIZE for prompt in first]
    assert run["cached"][0] == [0, 0, *[whole[0]] * 2, *[whole[1]] * 2]
    policy = policy_of(window=8)
    limits = [policy.hittable_blocks(len(prompt)) * BLOCK_SIZE for prompt in asked]
    assert run["cached"][1] == limits
    assert min(limits[2:]) > whole[0], "otherwise the same prompt hits no more than another turn"
    assert run["counters"]["prefix_blocks_copied_in"] > 0
    assert run["free_blocks"][0] == run["free_blocks"][1]


def test_without_prefix_caching(llama, prompts, sparse_run):
    """And on small pages."""
    settings = {**SETTINGS, "huge_pages": False}
    run = run_engine(
        llama, prompts, settings=settings, block_size=BLOCK_SIZE, enable_prefix_caching=False
    )
    assert run["tokens"] == sparse_run["tokens"]
    assert not run["huge_pages"]


def test_the_cache_moves_to_huge_pages(sparse_run, stock_run):
    assert sparse_run["huge_pages"] or "stays on small pages" in sparse_run["log"]
    assert not stock_run["huge_pages"]


@pytest.mark.parametrize(
    ("blocks", "chunk", "while_decoding"), [(72, 2048, True), (50, 100, False)]
)
def test_preemption_changes_nothing(llama, prompts, sparse_run, blocks, chunk, while_decoding):
    """72 blocks run out while requests decode, 50 while they are prefilled."""
    run = run_engine(
        llama, prompts, settings=SETTINGS, block_size=BLOCK_SIZE, num_gpu_blocks_override=blocks,
        max_num_batched_tokens=chunk, scheduler_reserve_full_isl=False,
    )  # fmt: skip
    assert run["preemptions"] > 0
    again = run["counters"]["prompts_compacted"] - len(prompts)  # a resumed prompt, once more
    assert (again > 0) == while_decoding
    assert run["tokens"] == sparse_run["tokens"]
    assert run["free_blocks"][0] == run["free_blocks"][1]


@pytest.mark.parametrize(("blocks", "chunk"), [(400, 2048), (72, 2048), (50, 100)])
def test_drafts_change_nothing(llama, prompts, sparse_run, blocks, chunk):
    """Rows of one to six tokens, some rejected, in two waves; with preemption where blocks lack."""
    run = run_engine(
        llama, prompts, settings=SETTINGS, block_size=BLOCK_SIZE, num_gpu_blocks_override=blocks,
        max_num_batched_tokens=chunk, waves=2, scheduler_reserve_full_isl=False,
        **speculation(prompts, sparse_run["tokens"][0]),
    )  # fmt: skip
    assert run["tokens"] == sparse_run["tokens"] * 2
    assert 200 < run["accepted"] < run["drafted"] - 200
    assert (run["preemptions"] > 0) == (blocks < 400)
    assert run["free_blocks"][0] == run["free_blocks"][1]
    assert max(run["cached"][1]) > 0


@pytest.mark.parametrize("method", ["ngram", "suffix"])
def test_drafts_from_the_context_change_nothing(llama, prompts, sparse_run, method):
    """With an engine in a process of its own, as a server has."""
    drafter = {"method": method, "num_speculative_tokens": 4}
    if method == "suffix":
        drafter["suffix_decoding_min_token_prob"] = 0.0
    else:
        drafter.update(prompt_lookup_min=1, prompt_lookup_max=3)
    run = run_engine(
        llama, prompts, settings=SETTINGS, block_size=BLOCK_SIZE, speculative_config=drafter,
        in_process=False, stand_ins=("forked_workers", "suffix_package"),
    )  # fmt: skip
    assert run["tokens"] == sparse_run["tokens"]
    assert run["drafted"] > run["accepted"] + 100


def test_a_prompt_in_the_cache_but_for_its_last_token_is_counted_beside_drafts(llama, prompts):
    """vLLM computes that token together with room for drafts."""
    run = run_engine(
        llama, [prompts[0][: 3 * BLOCK_SIZE + 1]], settings=SETTINGS, block_size=BLOCK_SIZE,
        waves=2, new_tokens=4,
        speculative_config={"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3},
    )  # fmt: skip
    assert run["cached"][1] == [3 * BLOCK_SIZE]
    assert run["counters"]["dense_fallbacks/short_prompt"] == 2


def test_drafts_equal_stock_s_where_everything_is_read(llama, prompts, stock_run):
    """Stock vLLM drafts, too; some of the oracle's drafts are rejected."""
    shared = {
        "block_size": BLOCK_SIZE, "max_num_batched_tokens": 256,
        **speculation(prompts, stock_run["tokens"][0]),
    }  # fmt: skip
    stock = run_engine(llama, prompts, **shared)
    run = run_engine(llama, prompts, settings=EVERYTHING, **shared)
    assert run["tokens"] == stock["tokens"] == stock_run["tokens"]
    assert run["drafted"] == stock["drafted"]
    assert run["accepted"] == stock["accepted"] < run["drafted"] - 100


def test_freed_blocks_are_free(llama, prompts, sparse_run):
    policy = policy_of()
    dropped = sum(policy.retention(len(prompt)).dropped_blocks for prompt in prompts)
    assert sparse_run["counters"]["blocks_evicted"] == dropped
    assert sparse_run["free_blocks"][0] == sparse_run["free_blocks"][1]


def test_the_start_says_what_requests_keep(sparse_run):
    log, kept = sparse_run["log"], policy_of().held_blocks(1024, 1024)
    assert kept < 1024 // BLOCK_SIZE
    assert f"a prompt of 1024 tokens keeps {kept} of {1024 // BLOCK_SIZE} blocks" in log
    assert f"({kept} blocks each after prefill)" in log
    assert "served densely:" not in log
    assert "not on a GPU" not in log


def test_counters_tell_what_was_read(prompts, sparse_run):
    steps = NEW_TOKENS - 1
    visible = sum(len(p) + 1 + i for p in prompts for i in range(steps))
    assert sparse_run["counters"]["decode_rows"] == steps * len(prompts)
    assert sparse_run["counters"]["visible_tokens"] == visible
    selected = steps * len(prompts) * (SETTINGS["token_budget"] // 2)
    assert sparse_run["counters"]["selected_tokens"] == selected


def test_short_prompts_are_stock_beside_long_ones(llama, prompts, sparse_run, stock_run):
    mixed = [prompts[0], prompts[1][:100], prompts[2], prompts[3][:60]]
    run = run_engine(llama, mixed, settings=SETTINGS, block_size=BLOCK_SIZE,
                     max_num_batched_tokens=200)  # fmt: skip
    stock = run_engine(llama, mixed, block_size=BLOCK_SIZE)
    assert [run["tokens"][0][i] for i in (1, 3)] == [stock["tokens"][0][i] for i in (1, 3)]
    assert [run["tokens"][0][i] for i in (0, 2)] == [sparse_run["tokens"][0][i] for i in (0, 2)]
    assert run["counters"]["dense_fallbacks/short_prompt"] == 2


def test_other_block_sizes_equal_hugging_face(llama, prompts):
    run = run_engine(llama, prompts[:2], settings={**SETTINGS, "window": 16}, block_size=64)
    policy = policy_of(block_size=64, window=16)
    for prompt, got in zip(prompts, run["tokens"][0], strict=False):
        retention = policy.retention(len(prompt))
        expected = hf_rocketkv.generate(
            hf_model(llama), prompt, NEW_TOKENS, dropped_blocks=retention.dropped_blocks,
            block_size=64, page_size=retention.page_size, top_r=retention.top_r, top_k=32,
            window=16,
        )  # fmt: skip
        assert got == expected


def test_tensor_parallelism_changes_nothing(llama, prompts, sparse_run):
    """Engine and workers are spawned, as on CPUs they always are; other tests fork them."""
    run = run_engine(
        llama, prompts, settings=SETTINGS, block_size=BLOCK_SIZE, in_process=False, new_tokens=30,
        tensor_parallel_size=2, env={"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
    )  # fmt: skip
    assert run["tokens"][0] == [tokens[:30] for tokens in sparse_run["tokens"][0]]


def test_model_runner_v2_changes_nothing(llama, prompts, sparse_run):
    run = run_engine(
        llama, prompts, settings=SETTINGS, block_size=BLOCK_SIZE, max_num_batched_tokens=256,
        env={"VLLM_USE_V2_MODEL_RUNNER": "1", "TRITON_INTERPRET": "1"}, timeout=900,
    )  # fmt: skip
    assert run["tokens"] == sparse_run["tokens"]
    assert run["counters"]["decode_rows"] > 0


def test_experts_equal_hugging_face(tmp_path, prompts):
    model = random_models.save_random_model(tmp_path / "moe", "qwen3_moe", layers=3)
    run = run_engine(
        model, prompts[:2], settings=SETTINGS, block_size=BLOCK_SIZE, new_tokens=40
    )  # fmt: skip
    assert_tokens_of_hugging_face(model, prompts[:2], run["tokens"][0])


def test_sliding_window_layers_stay_stock(windowed, prompts):
    """Only the full one is ours, which the start says."""
    model, shared = windowed, {"block_size": BLOCK_SIZE, "new_tokens": 40}
    stock = run_engine(model, prompts[:3], **shared)
    run = run_engine(model, prompts[:3], settings=EVERYTHING, **shared)
    assert run["tokens"] == stock["tokens"]
    assert run["counters"]["decode_rows"] > 0
    assert "1 of 3 attention layers, the others have sliding windows" in run["log"]
    assert "KV blocks hold" not in run["log"], "others share them"
    sparse = run_engine(model, prompts[:3], settings=SETTINGS, waves=2, **shared)
    assert sparse["counters"]["blocks_evicted"] > 0
    assert sparse["tokens"][0] == sparse["tokens"][1] != stock["tokens"][0]
    assert max(sparse["cached"][1]) > 0


def test_rows_that_two_groups_of_full_layers_see_are_counted_once(windowed, prompts, tmp_path):
    """Groups have as many layers as the smallest kind has."""
    model = tmp_path / "model"
    shutil.copytree(windowed, model)
    config = json.loads((model / "config.json").read_text())
    config["layer_types"] = ["full_attention", "sliding_attention", "full_attention"]
    (model / "config.json").write_text(json.dumps(config))
    run = run_engine(
        model, prompts[:2], settings=SETTINGS, block_size=BLOCK_SIZE, new_tokens=11
    )  # fmt: skip
    assert "kv cache group sizes (32, 32, 32)" in run["log"]
    counters = run["counters"]
    assert counters["requests"] == counters["prompts_compacted"] == 2
    assert counters["decode_rows"] == 2 * 10
    assert counters["selected_tokens"] == 2 * 10 * SETTINGS["token_budget"] // 2
    assert counters["blocks_evicted"] > 0 == counters["blocks_saved"]


def test_wrong_settings_stop_the_start_by_name(llama, prompts):
    with pytest.raises(RuntimeError, match=r"vllm_sparse\.token_budgt: unknown setting"):
        run_engine(llama, prompts[:1], settings={"token_budgt": 64})


@pytest.mark.parametrize(
    ("option", "why"),
    [
        ({"disable_hybrid_kv_cache_manager": True}, "one block table"),
        (
            {"attention_config": {"backend_per_kind": {"full_attention": "CPU_ATTN"}}},
            "full_attention to CPU_ATTN",
        ),
    ],
)
def test_options_that_would_keep_layers_from_ours_stop_the_start(windowed, prompts, option, why):
    with pytest.raises(RuntimeError, match=why):
        run_engine(windowed, prompts[:1], settings=SETTINGS, block_size=BLOCK_SIZE, **option)


def test_forgetting_the_plugin_is_harmless(llama, prompts, stock_run):
    """Installed but not selected: stock tokens, nothing counted."""
    assert not stock_run["counters"]
    assert "ROCKETKV: " not in stock_run["log"]


@pytest.mark.parametrize("blocks", [400, 72])
def test_lora_equals_merged_weights(llama, prompts, sparse_run, tmp_path, blocks):
    """Beside requests without it, with prefix hits or, where blocks lack, preemption.

    vLLM 0.32 on a CPU gives such requests the last adapter it has room for: there must be none.
    """
    adapter, merged = lora.save_adapter(llama, tmp_path)
    run = run_engine(
        llama, prompts, settings=SETTINGS, block_size=BLOCK_SIZE, waves=2, adapter=adapter,
        adapted=[True, False] * 3, max_loras=2, num_gpu_blocks_override=blocks,
        scheduler_reserve_full_isl=False,
    )  # fmt: skip
    tokens, without = run["tokens"][0], sparse_run["tokens"][0]
    assert_tokens_of_hugging_face(merged, prompts[::2], tokens[::2])
    assert tokens[1::2] == without[1::2]
    assert run["tokens"][1] == tokens
    assert (max(run["cached"][1]) > 0) == (blocks == 400)
    assert (run["preemptions"] > 0) == (blocks < 400)
    for ours, other in zip(tokens[::2], without[::2], strict=True):
        assert sum(a == b for a, b in zip(ours, other, strict=True)) < NEW_TOKENS // 2


def test_lora_equals_stock_where_everything_is_read(llama, prompts, tmp_path):
    adapter, _ = lora.save_adapter(llama, tmp_path)
    shared = {"block_size": BLOCK_SIZE, "adapter": adapter, "new_tokens": 40}
    stock = run_engine(llama, prompts[:2], **shared)
    run = run_engine(llama, prompts[:2], settings=EVERYTHING, **shared)
    assert run["tokens"] == stock["tokens"]


@pytest.mark.parametrize(("gib", "at_once", "said"), [(0.5, True, 0), (2, True, 1), (65, False, 1)])
def test_a_large_cache_moves_to_huge_pages_while_it_is_used(monkeypatch, gib, at_once, said):
    """At once it would take longer than vLLM waits for its engine."""
    from vllm_sparse.backends import policy_cpu

    lines = []
    monkeypatch.setattr(policy_cpu.logger, "info_once", lines.append)
    assert policy_cpu.moves_at_once(int(gib * 2**30)) == at_once
    assert len(lines) == said
    assert all(("while it is used" in line) == (not at_once) for line in lines)
