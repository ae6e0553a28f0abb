# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Whole vLLM engines with SPARDA: against stock vLLM, against Hugging Face with the block mask,
against each other.

Memory that must not be read is NaN throughout (``poison``), and the slab is as small as start-up
allows, so that blocks really leave and come back.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference import hf_sparda, lora, random_models
from safetensors.torch import load_file
from support.engine import BLOCK_SIZE, DENSE, NEW_TOKENS, SPARDA_SELECTION
from support.masked import gaps_of
from support.masked_sparda import assert_tokens_of_hugging_face, hf_model, run_sparda

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm


def test_lookahead_query_equals_hugging_face(llama, prompts, sparda_run):
    assert len(sparda_run["tokens"][0][0]) == NEW_TOKENS
    assert_tokens_of_hugging_face(llama, prompts, sparda_run["tokens"][0])


def test_the_selection_changes_the_tokens(sparda_run, stock_run):
    """Otherwise the comparison above would prove nothing."""
    for sparse, dense in zip(sparda_run["tokens"][0], stock_run["tokens"][0], strict=True):
        assert sparse[0] == dense[0]  # the first token comes from the dense prompt pass
        assert sum(a == b for a, b in zip(sparse, dense, strict=True)) < NEW_TOKENS // 2


def test_blocks_leave_the_slab_and_come_back(sparda_run):
    counters = sparda_run["counters"]
    cold = 6 * 2 * 6 * 3  # requests x heads x blocks x layers
    assert counters["frame_misses"] > 2 * cold
    piece = BLOCK_SIZE * 2 * 32 * 4
    assert counters["host_to_device_bytes"] == counters["frame_misses"] * piece
    assert counters["prefetch_issued"] > counters["frame_misses"] / 2
    assert counters["prefetch_wasted"] == 0
    assert counters["selected_blocks"] < counters["visible_blocks"] / 2
    assert sparda_run["free_blocks"][0] == sparda_run["free_blocks"][1]


def test_threads_end_with_the_engine(sparda_run):
    assert sparda_run["copy_threads"] == 0


def test_the_start_warns_of_nothing_that_is_not_so(sparda_run):
    assert "will be attended densely" not in sparda_run["log"]
    assert "not on a GPU" not in sparda_run["log"]


@pytest.mark.parametrize("selector", ["query", "previous", "forecast"])
def test_selectors_equal_hugging_face(qwen2, prompts, tmp_path, selector):
    changes: dict[str, Any] = {"selector": selector}
    if selector == "forecast":
        changes["forecast"] = str(tmp_path / "forecast.safetensors")
        random_models.save_random_forecast(changes["forecast"], qwen2, bias=True)
    run = run_sparda(qwen2, prompts, **changes)
    assert_tokens_of_hugging_face(qwen2, prompts, run["tokens"][0], **changes)


def test_a_forecast_in_a_training_checkpoint_is_served_unchanged(qwen2, prompts, tmp_path):
    """As the official training and sglang's pull requests 38302 and 38397 have it."""
    ours = tmp_path / "forecast.safetensors"
    random_models.save_random_forecast(ours, qwen2)
    weights = {f"module.{name}": weight for name, weight in load_file(ours).items()}
    extra = {"module.model.layers.1.self_attn.q_curr_proj.weight": torch.ones(64, 128)}
    theirs = str(tmp_path / "ckpt-500.pt")
    torch.save({"step": 500, "model_state_dict": {**weights, **extra}}, theirs)
    changes: dict[str, Any] = {"selector": "forecast", "forecast": theirs}
    run = run_sparda(qwen2, prompts[:3], **changes)
    changes["forecast"] = str(ours)
    assert_tokens_of_hugging_face(qwen2, prompts[:3], run["tokens"][0], **changes)
    assert "layers.1.self_attn.q_curr_proj.weight" in run["log"]


@pytest.mark.parametrize(
    ("selector", "prefill"),
    [("lookahead-query", True), ("lookahead-query", 5), ("query", 9), ("forecast", 9)],
)
def test_sparse_prompts_equal_hugging_face(llama, prompts, tmp_path, selector, prefill):
    """In chunks of which some reach into the dense start, with prefix hits, and preempted."""
    changes = {"selector": selector, "sparse_prefill": prefill, "dense_len": 150, "new_tokens": 60}
    if selector == "forecast":
        changes["forecast"] = str(tmp_path / "forecast.safetensors")
        random_models.save_random_forecast(changes["forecast"], llama)
    run = run_sparda(llama, prompts[:3], max_num_batched_tokens=100, waves=2, **changes)
    del changes["new_tokens"]
    assert_tokens_of_hugging_face(llama, prompts[:3], run["tokens"][0], **changes)
    assert run["tokens"][0] == run["tokens"][1]
    assert sum(run["cached"][1]) > 0.8 * sum(map(len, prompts[:3]))
    seen, needed = (run["counters"][f"prompt_blocks_{x}"] for x in ("visible", "needed"))
    assert 0 < needed < seen

    again = run_sparda(llama, prompts[:3], new_tokens=60, num_gpu_blocks_override=48, **changes)
    assert again["preemptions"] > 0
    assert again["tokens"][0] == run["tokens"][0]


@pytest.mark.parametrize("selector", ["forecast", "previous"])
def test_prompts_chosen_by_queries_equal_hugging_face(llama, prompts, tmp_path, selector):
    """A preempted request's output, which is computed again as a prompt, is no prompt's."""
    changes: dict[str, Any] = {
        "selector": selector, "prompt_selector": "query", "sparse_prefill": True, "dense_len": 150,
    }  # fmt: skip
    if selector == "forecast":
        changes["forecast"] = str(tmp_path / "forecast.safetensors")
        random_models.save_random_forecast(changes["forecast"], llama)
    run = run_sparda(llama, prompts[:3], max_num_batched_tokens=100, new_tokens=60, **changes)
    assert_tokens_of_hugging_face(llama, prompts[:3], run["tokens"][0], **changes)
    assert "by query)" in run["log"]

    again = run_sparda(llama, prompts[:3], new_tokens=60, num_gpu_blocks_override=48, **changes)
    assert again["preemptions"] > 0
    assert again["tokens"][0] == run["tokens"][0]


def test_crossing_dense_len_while_decoding_equals_hugging_face(llama, prompts):
    dense_len = len(prompts[0]) + 30
    run = run_sparda(llama, prompts[:2], dense_len=dense_len, slab_gib=0.01)
    assert_tokens_of_hugging_face(llama, prompts[:2], run["tokens"][0], dense_len=dense_len)
    assert run["counters"]["dense_fallbacks/shorter_than_dense_len"] == 2


@pytest.mark.parametrize(
    ("arch", "extra", "changes"),
    [
        ("qwen3", {}, {}),
        ("qwen3_moe", {}, {}),
        # Softmaxes of heads are added up, so that the scale of logits matters.
        ("granite", {}, {"selector": "query"}),
        ("granite", {}, {"selector": "previous", "prompt_selector": "query",
                         "sparse_prefill": True}),
        ("minicpm", {"model_type": "llama"}, {}),
    ],
)  # fmt: skip
def test_other_architectures_equal_hugging_face(tmp_path, prompts, arch, extra, changes):
    model = tmp_path / arch
    if arch == "minicpm":
        random_models.save_random_minicpm(model, **extra)
    else:
        random_models.save_random_model(model, arch, layers=4)
    run = run_sparda(model, prompts[:3], slab_gib=0.01, new_tokens=60, **changes)
    assert_tokens_of_hugging_face(model, prompts[:3], run["tokens"][0], **changes)


def test_bfloat16_follows_hugging_face(llama, prompts):
    """In float32, from which rounding may part it by a little."""
    run = run_sparda(llama, prompts[:2], new_tokens=24, dtype="bfloat16")
    tokens, gaps = run["tokens"][0], []
    for top_k in (SPARDA_SELECTION["top_k"], 1024 // BLOCK_SIZE):
        selection = {**SPARDA_SELECTION, "top_k": top_k}
        said = [
            hf_sparda.generate(hf_model(llama), prompt, 24, continuation=got, **selection).logits
            for prompt, got in zip(prompts, tokens, strict=False)
        ]
        gaps.append(torch.cat([gaps_of(*both) for both in zip(said, tokens, strict=True)]))
    assert gaps[0].mean() < gaps[1].mean() / 4, gaps


def test_as_many_blocks_as_there_are_equal_stock(llama, prompts, stock_run):
    run = run_sparda(llama, prompts, top_k=64, slab_gib=0.02)
    assert run["tokens"] == stock_run["tokens"]


@pytest.mark.parametrize("selector", ["query", "lookahead-query", "forecast"])
def test_sparse_prompts_of_as_many_blocks_as_there_are_equal_stock(
    llama, prompts, stock_run, tmp_path, selector
):
    changes: dict[str, Any] = {"selector": selector, "sparse_prefill": True, "top_k": 64}
    if selector == "forecast":
        changes["forecast"] = str(tmp_path / "forecast.safetensors")
        random_models.save_random_forecast(changes["forecast"], llama)
    run = run_sparda(
        llama, prompts, slab_gib=0.02, max_num_batched_tokens=100, waves=2, new_tokens=30, **changes
    )
    assert run["tokens"] == [[tokens[:30] for tokens in stock_run["tokens"][0]]] * 2
    counters = run["counters"]
    assert counters["prompt_blocks_needed"] == counters["prompt_blocks_visible"] > 1000


@pytest.mark.parametrize(
    "changes",
    [
        {"resident": True},
        {"resident_first_layer": True, "slab_gib": 0.03},
        {"prefetch": False},
        {"max_num_batched_tokens": 256},
        {"max_num_batched_tokens": 33},
        {"enable_prefix_caching": False},
        {"tensor_parallel_size": 2, "in_process": False, "stand_ins": ("forked_workers",)},
        {"env": {"VLLM_USE_V2_MODEL_RUNNER": "1", "TRITON_INTERPRET": "1"}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_nothing_changes_with(llama, prompts, sparda_run, changes):
    changes = dict(changes)
    if "tensor_parallel_size" in changes:
        changes |= {"env": {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}, "new_tokens": 30}
    if changes.get("max_num_batched_tokens") == 33:
        changes["max_num_seqs"] = 6
    run = run_sparda(llama, prompts, **changes)
    count = changes.get("new_tokens", NEW_TOKENS)
    assert run["tokens"][0] == [tokens[:count] for tokens in sparda_run["tokens"][0]]
    if changes.get("resident"):
        assert run["counters"]["frame_misses"] == run["counters"]["host_to_device_bytes"] == 0
    if changes.get("prefetch") is False:
        assert run["counters"]["prefetch_issued"] == 0


@pytest.mark.parametrize("runner", ["0", "1"])
def test_requests_that_arrive_together_later_share_what_one_of_them_writes(
    llama, prompts, sparda_run, runner
):
    """In the step that writes it, when a step before has already shared blocks so."""
    asked = [prompts[i] for i in (0, 0, 3, 3)]
    env = {"VLLM_USE_V2_MODEL_RUNNER": runner, "TRITON_INTERPRET": runner}
    run = run_sparda(llama, asked, max_num_seqs=2, new_tokens=20, env=env)
    assert run["tokens"][0] == [sparda_run["tokens"][0][i][:20] for i in (0, 0, 3, 3)]
    assert run["cached"][0][1] > 0
    assert run["cached"][0][3] > 0


def test_prefix_caching_changes_nothing(llama, prompts, sparda_run):
    run = run_sparda(llama, prompts, waves=2)
    assert run["tokens"][0] == run["tokens"][1] == sparda_run["tokens"][0]
    assert sum(run["cached"][1]) > 0.8 * sum(map(len, prompts))


@pytest.mark.parametrize(("selector", "chunk"), [("lookahead-query", 2048), ("previous", 100)])
def test_preemption_changes_nothing(llama, prompts, sparda_run, selector, chunk):
    calm = sparda_run
    if selector != "lookahead-query":
        calm = run_sparda(llama, prompts, selector=selector, max_num_batched_tokens=chunk)
    run = run_sparda(
        llama,
        prompts,
        selector=selector,
        num_gpu_blocks_override=90,
        max_num_batched_tokens=chunk,
    )
    assert run["preemptions"] > 0
    assert run["tokens"] == calm["tokens"]
    assert run["free_blocks"] == [89, 89]


def test_dense_requests_beside_sparse_ones_equal_stock(llama, prompts, sparda_run, stock_run):
    """In chunks, preempted, and with hits on what requests of the other kind have published."""
    asked = [[None, DENSE] * 3, [DENSE, None] * 3]
    run = run_sparda(
        llama, prompts, waves=2, max_num_batched_tokens=100, num_gpu_blocks_override=90,
        new_tokens=60, asked=[*asked[0], *asked[1]],
    )  # fmt: skip
    for wave, tokens in zip(asked, run["tokens"], strict=True):
        runs = [stock_run if extra else sparda_run for extra in wave]
        assert tokens == [run["tokens"][0][i][:60] for i, run in enumerate(runs)]
    assert run["preemptions"] > 0
    assert max(run["cached"][1]) > 0
    assert run["counters"]["dense_fallbacks/requested"] >= len(prompts)
    assert run["free_blocks"] == [89, 89]


def test_dense_requests_share_little_with_sparse_prompts(llama, prompts, stock_run):
    """Of a sparse prompt only the dense start is as they would have computed it."""
    run = run_sparda(
        llama, prompts[:2], sparse_prefill=True, dense_len=150, waves=3, new_tokens=20,
        asked=[None, None, DENSE, DENSE, None, None],
    )  # fmt: skip
    dense = [tokens[:20] for tokens in stock_run["tokens"][0][:2]]
    assert run["tokens"][1] == dense
    assert run["tokens"][2] == run["tokens"][0] != dense
    assert run["cached"][1] == [150 // BLOCK_SIZE * BLOCK_SIZE] * 2


@pytest.mark.slow
def test_thousands_of_generated_tokens_equal_hugging_face(tmp_path):
    """Over dozens of block borders and the dense border, with every frame in constant use."""
    model, count = tmp_path / "llama", 4096
    random_models.save_random_model(
        model, "llama", layers=2, heads=2, kv_heads=1, hidden=64, max_position_embeddings=8192
    )
    prompt = torch.randint(1024, (300,), generator=torch.Generator().manual_seed(0)).tolist()
    changes = {"block_size": 64, "local_blocks": 2, "top_k": 8, "dense_len": 1000}
    run = run_sparda(
        model,
        [prompt],
        **changes,
        slab_gib=0.0008,  # 26 frames of 16 KiB a layer; a dense row may need 16
        new_tokens=count,
        max_model_len=6000,
        max_num_seqs=1,
        timeout=1500,
    )
    (tokens,) = run["tokens"][0]
    logits, _, _ = hf_sparda.evaluate(
        hf_model(model), prompt + tokens[:-1], len(prompt), **{**SPARDA_SELECTION, **changes}
    )
    logits = logits[len(prompt) - 1 :]
    chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    assert float((logits.amax(1) - chosen).max()) < 1e-3, "a token is not the best, not even nearly"
    assert run["counters"]["frame_misses"] > count
    assert run["counters"]["dense_fallbacks/shorter_than_dense_len"] == 1


@pytest.mark.parametrize("selector", ["previous", "query"])
def test_lora_equals_merged_weights(llama, prompts, tmp_path, selector):
    """Beside requests without it; chunked, cached and preempted.

    vLLM 0.32 on a CPU gives such requests the last adapter it has room for: there must be none.
    """
    adapter, merged = lora.save_adapter(llama, tmp_path)
    run = run_sparda(
        llama, prompts[:4], selector=selector, adapter=adapter, adapted=[True, False] * 2,
        max_loras=2, waves=2, new_tokens=60, max_num_batched_tokens=100, num_gpu_blocks_override=62,
    )  # fmt: skip
    for first, model in ((0, merged), (1, llama)):
        tokens = run["tokens"][0][first::2]
        assert_tokens_of_hugging_face(model, prompts[first:4:2], tokens, selector=selector)
    assert run["tokens"][1] == run["tokens"][0]
    assert max(run["cached"][1]) > 0
    assert run["preemptions"] > 0
