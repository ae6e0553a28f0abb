# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""ROCKETKV's GPU path in whole engines on a CPU: all of it but the driver.

Triton is interpreted and FlashAttention is PyTorch. ``captured_graphs`` lets layers see the
metadata of the first batch of a size only, as a CUDA graph does. The runs that they are compared
with are compared with Hugging Face and stock vLLM in ``test_policy_cpu``.
"""

from __future__ import annotations

import pytest
from reference import lora, random_models
from support.engine import BLOCK_SIZE, DENSE, EVERYTHING, SETTINGS, run_engine
from support.forked import PRETENDED_GPU, run_forked
from support.gpu_path import NEW_TOKENS, V2, first_tokens, run_gpu_path
from support.gpu_walk import BREAKABLE, PIECES
from support.masked import assert_tokens_of_hugging_face, gaps_to_hugging_face, policy_of

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm


@pytest.mark.parametrize("v2", [True, False], ids=["v2", "v1"])
def test_gpu_path_gives_the_cpu_path_s_tokens(llama, prompts, sparse_run, v2):
    """One prompt after the other arrives in chunks, so that steps are pure and mixed."""
    further = ("profiled_graphs", "no_read_backs") if v2 else ()
    run = run_gpu_path(llama, prompts[:2], v2=v2, max_num_batched_tokens=320, further=further)
    assert run["tokens"][0] == first_tokens(sparse_run, range(2))
    counters, lengths = run["counters"], sorted(map(len, prompts[:2]))
    assert counters["prompts_compacted"] == 2
    # A device's counts are read every fourth step, so that the last ones may be missing.
    rows = counters["decode_rows"]
    assert 0 < rows <= 2 * (NEW_TOKENS - 1)
    assert counters["selected_tokens"] == rows * SETTINGS["token_budget"] // 2
    assert rows * lengths[0] < counters["visible_tokens"] < rows * (lengths[1] + NEW_TOKENS)
    assert "ROCKETKV has been tested on GPUs' code path with interpreted kernels" in run["log"]
    assert run["free_blocks"][0] == run["free_blocks"][1]


NARROW = {**SETTINGS, "window": 8}


@pytest.fixture(scope="module")
def narrow_run(llama, prompts):
    """The first prompt with a window that leaves room for a tail, on the CPU's path."""
    return run_engine(llama, prompts[:1], settings=NARROW, block_size=BLOCK_SIZE, new_tokens=4)


@pytest.mark.parametrize("v2", [True, False], ids=["v2", "v1"])
def test_tails_are_copied_for_the_prefix_cache(llama, prompts, narrow_run, v2):
    """The second wave hits its tail, which the runner has copied out and copies in."""
    policy = policy_of(window=8)
    run = run_gpu_path(llama, prompts[:1], v2=v2, waves=2, settings=NARROW, new_tokens=4)
    assert run["tokens"] == narrow_run["tokens"] * 2
    hits, tail = policy.hittable_blocks(len(prompts[0])), policy.tail_blocks(len(prompts[0]))
    assert run["cached"][1] == [hits * BLOCK_SIZE]
    assert run["counters"]["prefix_blocks_copied_out"] == len(tail)
    assert run["counters"]["prefix_blocks_copied_in"] == hits - tail.start > 0
    assert run["free_blocks"][0] == run["free_blocks"][1]


def test_a_last_prompt_token_that_comes_alone(llama, prompts, sparse_run):
    """607 tokens in chunks of 101: the last is a batch of one token, which a graph would run."""
    assert len(prompts[1]) % 101 == 1
    run = run_gpu_path(
        llama, prompts[1:2], max_num_batched_tokens=101, further=("profiled_graphs",)
    )
    assert run["tokens"][0] == first_tokens(sparse_run, [1])
    assert run["counters"]["prompts_compacted"] == 1
    # Three launches a layer. Two builders, of which one measures memory, warm up; each also with a
    # step that may replay tokens and so appends in two launches.
    launches = run["launches"]
    append, select, attend = (
        launches[f"_{name}_kernel"] for name in ("append", "select_slots", "attend")
    )
    assert append - 2 * 3 == select - 2 * 2 == attend - 2 * 2
    steps, layers = launches["_plan_rows_kernel"], 3
    assert attend - 2 * 2 == layers * steps
    assert steps >= NEW_TOKENS


def test_a_window_that_comes_token_by_token(llama, prompts, narrow_run):
    """The cached part of a prompt may end anywhere; here its window is decoded, so to say."""
    options = {"max_num_batched_tokens": 8, "max_num_seqs": 8, "new_tokens": 2}
    run = run_gpu_path(llama, prompts[:1], settings=NARROW, **options)
    assert run["tokens"][0] == first_tokens(narrow_run, [0], 2)


def test_dense_requests_share_the_batch(llama, prompts, sparse_run):
    """One has a short prompt, one asks to be dense: 201 tokens, of which the last comes alone."""
    mixed, asked = [prompts[0], prompts[3][:60], prompts[1][:201]], [None, None, DENSE]
    run = run_gpu_path(llama, mixed, asked=asked, max_num_batched_tokens=100)
    stock = run_engine(llama, mixed[1:], block_size=BLOCK_SIZE, new_tokens=NEW_TOKENS)
    assert run["tokens"][0][0] == first_tokens(sparse_run, [0])[0]
    assert run["tokens"][0][1:] == stock["tokens"][0]
    assert run["counters"]["dense_fallbacks/short_prompt"] == 1
    assert run["counters"]["dense_fallbacks/requested"] == 1
    assert run["counters"]["prompts_compacted"] == 1


REPLAYED = {
    "env": {**V2, PRETENDED_GPU: "1", BREAKABLE: "1"}, "dtype": "float16",
    "enforce_eager": False, "compilation_config": PIECES["compilation_config"],
    "cudagraph_capture_sizes": [2, 64], "new_tokens": NEW_TOKENS, "max_num_seqs": 2,
    "max_num_batched_tokens": 320,
}  # fmt: skip


def test_steps_that_are_scheduled_before_the_last_one_ends(llama, prompts):
    """As vLLM does on GPUs, and on CPUs never: blocks leave while a step may still read them.

    In float16, so that a token may be another one than Hugging Face's that is nearly as good.
    """
    run = run_engine(
        llama, prompts[:2], settings=SETTINGS, block_size=BLOCK_SIZE,
        async_scheduling=True, **REPLAYED,
    )  # fmt: skip
    assert run["asynchronous"]
    assert run["counters"]["blocks_evicted"] > 0
    assert run["free_blocks"][0] == run["free_blocks"][1]
    tokens = run["tokens"][0]
    gaps = gaps_to_hugging_face(llama, prompts[:2], tokens)
    unmasked = gaps_to_hugging_face(llama, prompts[:2], tokens, sparse=False)
    assert gaps.mean() < unmasked.mean() / 4, (gaps, unmasked)


def test_a_dense_request_beside_a_sparse_one_in_replayed_graphs(llama, prompts):
    """Which of the rows are dense is read where a graph finds it: its Python ran for others.

    The last 31 tokens of a prompt come beside a row that decodes: graphs of the pieces between
    layers' attention, as vLLM captures them where it compiles, and padding up to 64.
    """
    both = [prompts[0][:150], prompts[1][:201]]
    stock = run_engine(llama, both, **REPLAYED)
    run = run_engine(llama, both, settings=EVERYTHING, asked=[None, DENSE], **REPLAYED)
    assert run["tokens"] == stock["tokens"]
    assert run["counters"]["dense_fallbacks/requested"] == 1
    assert run["counters"]["decode_rows"] > 0
    assert run["replays"] == NEW_TOKENS - 1 + (3 + 1)  # of three layers


def test_sliding_window_layers_stay_stock(windowed, prompts):
    run = run_gpu_path(windowed, prompts[:1])
    reference = run_engine(
        windowed, prompts[:1], settings=SETTINGS, block_size=BLOCK_SIZE, new_tokens=NEW_TOKENS
    )
    assert run["tokens"] == reference["tokens"]
    assert run["counters"]["prompts_compacted"] == 1


def test_experts(tmp_path, prompts):
    model = random_models.save_random_model(tmp_path / "moe", "qwen3_moe", layers=2)
    run = run_gpu_path(model, prompts[:1])
    assert_tokens_of_hugging_face(model, prompts[:1], run["tokens"][0])
    assert run["counters"]["prompts_compacted"] == 1


def test_lora_equals_merged_weights(llama, prompts, sparse_run, tmp_path):
    """Beside a request without it, in chunks."""
    adapter, merged = lora.save_adapter(llama, tmp_path)
    run = run_gpu_path(
        llama, prompts[:2], v2=False, adapter=adapter, adapted=[True, False], max_loras=2,
        max_num_batched_tokens=320,
    )  # fmt: skip
    assert_tokens_of_hugging_face(merged, prompts[:1], run["tokens"][0][:1])
    assert run["tokens"][0][1:] == first_tokens(sparse_run, [1])
    assert run["tokens"][0][0] != first_tokens(sparse_run, [0])[0]


def test_tensor_parallelism(llama, prompts, sparse_run):
    """Each rank has one KV head, and its own kernels, counters and buffers."""
    run = run_gpu_path(
        llama, prompts[:1], v2=False, tensor_parallel_size=2, in_process=False,
        further=("forked_workers",),
    )  # fmt: skip
    assert "decode kernel: triton" in run["log"]
    assert run["tokens"][0] == first_tokens(sparse_run, [0])


def test_a_budget_of_the_whole_context_equals_stock(llama, prompts, stock_run):
    run = run_gpu_path(llama, prompts[:2], settings=EVERYTHING)
    assert run["tokens"][0] == first_tokens(stock_run, range(2))


def test_preempted_and_cached_requests(llama, prompts, sparse_run):
    run = run_gpu_path(
        llama, prompts[:3], num_gpu_blocks_override=34, max_num_batched_tokens=100,
        scheduler_reserve_full_isl=False, waves=2,
    )  # fmt: skip
    assert run["preemptions"] > 0
    assert max(run["cached"][1]) > 0
    expected = first_tokens(sparse_run, range(3))
    assert run["tokens"] == [expected, expected]


def test_the_start_line_and_what_a_cpu_lacks(llama, prompts):
    with pytest.raises(RuntimeError, match=r"leave vllm_sparse\.kernels at auto"):
        run_engine(
            llama, prompts[:1], settings={**SETTINGS, "kernels": "triton"}, block_size=BLOCK_SIZE
        )


def test_the_class_follows_the_platform():
    printed = run_forked(
        "support.code",
        "import vllm_sparse.backends as b\n"
        "from vllm.platforms import current_platform\n"
        "print(b.ROCKETKV.__base__.__name__, b.ROCKETKV.get_name())\n"
        "type(current_platform).is_cpu = lambda self: False\n"
        "print(b.ROCKETKV.__base__.__name__, b.QUEST.get_name())\n",
        {}, 900,
    )  # fmt: skip
    named = ["PolicyCpuBackend", "ROCKETKV", "PolicyGpuBackend", "QUEST"]
    assert printed.split()[-4:] == named, printed
