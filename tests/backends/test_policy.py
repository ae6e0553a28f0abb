# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Policies in whole engines: QUEST, SNAPKV, STREAMINGLLM, and one from another package.

Each is compared with Hugging Face under the explicit mask once; every other way to run the same
requests must then give the same tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support import policy_cases
from support.engine import BLOCK_SIZE, DENSE, SETTINGS, SPARDA_SETTINGS, run_engine
from support.masked import gaps_to_hugging_face
from support.oracle import speculation
from support.outside import LargeKeys
from support.policy_cases import CASES, Case, assert_tokens_of_hugging_face

from vllm_sparse.policies.quest import Quest

if TYPE_CHECKING:
    from collections.abc import Callable

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

NEW_TOKENS = 60


@pytest.fixture(scope="module")
def outside(tmp_path_factory) -> dict[str, str]:
    """An installed package whose entry point names a policy; the environment that finds it."""
    from support import outside as module

    folder = tmp_path_factory.mktemp("site")
    (folder / "large_keys.py").write_text(Path(module.__file__).read_text())
    info = folder / "large_keys-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: large-keys\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[vllm_sparse.policies]\nLARGEKEYS = large_keys:LargeKeys\n"
    )
    return {"PYTHONPATH": str(folder)}


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def case(request) -> Case:
    return request.param


@pytest.fixture(scope="module")
def run(llama, outside, case) -> Callable[..., dict[str, Any]]:
    def start(prompts, settings=case.settings, env=None, **changes):
        return run_engine(
            llama, prompts, backend=case.name, settings=settings, block_size=BLOCK_SIZE,
            env={**outside, **(env or {})}, **{"new_tokens": NEW_TOKENS, **changes},
        )  # fmt: skip

    return start


@pytest.fixture(scope="module")
def whole(run, prompts) -> dict[str, Any]:
    """All requests at once, each prompt in one step."""
    return run(prompts)


@pytest.fixture(scope="module")
def short(llama, prompts) -> tuple[list[int], list[int]]:
    """A prompt that every policy would serve sparsely, and stock vLLM's tokens."""
    prompt = prompts[3][:140]
    stock = run_engine(llama, [prompt], block_size=BLOCK_SIZE, new_tokens=16)
    return prompt, stock["tokens"][0][0]


def test_tokens_are_those_of_hugging_face_under_the_mask(llama, case, prompts, whole, stock_run):
    assert_tokens_of_hugging_face(case, llama, prompts, whole["tokens"][0])
    for got, dense in zip(whole["tokens"][0], stock_run["tokens"][0], strict=True):
        assert sum(a == b for a, b in zip(got, dense, strict=False)) < NEW_TOKENS // 2


def test_chunks_prefix_hits_and_preemption_change_nothing(case, run, prompts, whole):
    """33 tokens a step, two waves of the same prompts, and too few blocks for all of them."""
    blocks = 80 if case.kind is Quest else 35  # nothing leaves, or most of a prompt does
    again = run(
        prompts, waves=2, max_num_batched_tokens=33, scheduler_reserve_full_isl=False,
        num_gpu_blocks_override=blocks,
    )  # fmt: skip
    assert again["tokens"] == whole["tokens"] * 2
    assert again["preemptions"] > 0
    assert again["free_blocks"][0] == again["free_blocks"][1]
    assert max(again["cached"][1]) > 0


def test_dense_requests_beside_sparse_ones_equal_stock(case, run, prompts, whole, stock_run):
    """In chunks, preempted, and with hits on what requests of the other kind have published."""
    asked = [[None, DENSE] * 2, [DENSE, None] * 2]
    again = run(
        prompts[:4], waves=2, max_num_batched_tokens=100, scheduler_reserve_full_isl=False,
        num_gpu_blocks_override=50, asked=[*asked[0], *asked[1]],
    )  # fmt: skip
    for wave, tokens in zip(asked, again["tokens"], strict=True):
        runs = [stock_run if extra else whole for extra in wave]
        assert tokens == [run["tokens"][0][i][:NEW_TOKENS] for i, run in enumerate(runs)]
    assert again["preemptions"] > 0
    assert max(again["cached"][1]) > 0
    assert again["counters"]["dense_fallbacks/requested"] >= 4
    assert again["free_blocks"][0] == again["free_blocks"][1]


def test_drafts_change_nothing(case, run, prompts, whole):
    """Rows of one to six tokens, some rejected, beside chunks, prefix hits and preemption."""
    blocks = 80 if case.kind is Quest else 35
    again = run(
        prompts, waves=2, max_num_batched_tokens=100, scheduler_reserve_full_isl=False,
        num_gpu_blocks_override=blocks, **speculation(prompts, whole["tokens"][0]),
    )  # fmt: skip
    assert again["tokens"] == whole["tokens"] * 2
    assert again["preemptions"] > 0
    assert 100 < again["accepted"] < again["drafted"] - 100
    assert again["free_blocks"][0] == again["free_blocks"][1]
    assert max(again["cached"][1]) > 0


def test_what_is_published_is_hit(case, run, prompts, whole):
    """With room for everything, the second wave hits exactly what a request need not compute."""
    again = run(prompts[:3], waves=2)
    assert again["tokens"] == [whole["tokens"][0][:3]] * 2
    for prompt, hit in zip(prompts, again["cached"][1], strict=False):
        assert hit == case.limit(len(prompt))


def test_evicted_prefixes_return_from_the_tier(case, run, prompts, whole):
    if case.kind is LargeKeys:
        pytest.skip("of another package, whose blocks nobody vouches for")
    again = run(prompts, waves=2, num_gpu_blocks_override=48, kv_offloading_size=0.05)
    assert again["tokens"] == whole["tokens"] * 2
    for prompt, hit in zip(prompts, again["cached"][1], strict=True):
        assert hit == case.limit(len(prompt))
    assert again["free_blocks"][0] == again["free_blocks"][1]


def test_what_is_read_and_freed_is_counted(case, prompts, whole):
    policy, counters, steps = case.policy, whole["counters"], NEW_TOKENS - 1
    assert counters["decode_rows"] == steps * len(prompts)
    kept = [len(p) - policy.retention(len(p)).dropped_blocks * BLOCK_SIZE for p in prompts]
    held = [n + 1 + i for n in kept for i in range(steps)]
    read = sum(min(n, policy.top_k or n) for n in held)
    assert counters["selected_tokens"] == read
    freed = 0
    for prompt in prompts:
        first, last = policy.freed_blocks(len(prompt), len(prompt) + steps - 1)
        freed += max(last - first, 0)
    assert abs(counters.get("blocks_evicted", 0) - freed) <= len(prompts)  # the last step's
    assert whole["free_blocks"][0] == whole["free_blocks"][1]


def test_the_gpu_path_gives_the_same_tokens(run, case, prompts, whole, short):
    """Beside a request that asks to be dense.

    Model Runner V2, interpreted kernels, FlashAttention in PyTorch, batches as captured; one of
    the policies starts as on a GPU.
    """
    starts = ("profiled_graphs",) if case.kind is Quest else ()
    settings = {**case.settings, "kernels": "triton"}
    asked = [None, None, DENSE]
    again = run(
        [*prompts[:2], short[0]], settings, max_num_batched_tokens=320, timeout=900, new_tokens=16,
        kv_cache_memory_bytes=6 << 20, env={"VLLM_USE_V2_MODEL_RUNNER": "1"}, asked=asked,
        stand_ins=("flash_attention", "captured_graphs", *starts),
    )  # fmt: skip
    expected = [*whole["tokens"][0][:2], short[1]]
    assert again["tokens"][0] == [tokens[:16] for tokens in expected]
    assert again["counters"]["decode_rows"] > 0


def test_a_budget_of_the_whole_context_equals_stock(case, run, prompts, stock_run):
    if case.kind is not Quest:
        pytest.skip("reads a quarter of its budget, or leaves such requests to stock attention")
    settings = {**case.settings, "token_budget": 2048}
    wide = run(prompts[:3], settings)
    assert wide["tokens"][0] == [tokens[:NEW_TOKENS] for tokens in stock_run["tokens"][0][:3]]
    assert wide["counters"]["decode_rows"] > 0


def test_steps_in_pytorch_take_bfloat16(llama, prompts):
    """QUEST's; tokens are those of Hugging Face in float32, or close."""
    quest = CASES[0]
    run = run_engine(
        llama, prompts[:2], backend=quest.name, settings=quest.settings, block_size=BLOCK_SIZE,
        new_tokens=24, dtype="bfloat16",
    )  # fmt: skip
    gaps = policy_cases.gaps_to_hugging_face(quest, llama, prompts[:2], run["tokens"][0])
    unmasked = gaps_to_hugging_face(llama, prompts[:2], run["tokens"][0], sparse=False)
    assert gaps.mean() < unmasked.mean() / 4, (gaps, unmasked)


@pytest.mark.parametrize(
    ("backend", "changes", "why"),
    [
        ("rocketkv", {"min_context": 2048}, "longer than min_context"),
        ("sparda", {"dense_len": 2048, "slab_gib": None}, "dense_len is 2048"),
    ],
)
def test_the_start_warns_where_nothing_can_be_sparse(llama, prompts, backend, changes, why):
    settings = SETTINGS if backend == "rocketkv" else SPARDA_SETTINGS
    options = {"backend": backend, "new_tokens": 2, "max_num_seqs": 2}
    dense = run_engine(llama, prompts[:1], settings={**settings, **changes}, **options)
    assert why in dense["log"]
