# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Drafts on the GPU's path, interpreted on a CPU; compared with runs without drafts.

Those are compared with Hugging Face in ``test_policy_cpu``. What a GPU's host does not know, it
does not know here either: lengths of requests that decode are loosened at random.
"""

from __future__ import annotations

import pytest
from support.engine import BLOCK_SIZE, run_engine
from support.gpu_path import first_tokens, run_gpu_path
from support.oracle import speculation

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

TOKENS = 12


def test_unlike_rows_and_rejections(llama, prompts, sparse_run):
    """V1, whose runner takes the oracle: rows of one to six tokens beside chunks and preemption."""
    run = run_gpu_path(
        llama, prompts[:3], v2=False, further=("loose_lengths",), new_tokens=TOKENS,
        num_gpu_blocks_override=34, max_num_batched_tokens=100, scheduler_reserve_full_isl=False,
        **speculation(prompts, sparse_run["tokens"][0]),
    )  # fmt: skip
    assert run["tokens"][0] == first_tokens(sparse_run, range(3), TOKENS)
    assert run["preemptions"] > 0
    assert 5 < run["accepted"] < run["drafted"] - 5
    assert run["free_blocks"][0] == run["free_blocks"][1]


def test_suffixes(llama, prompts, sparse_run):
    """A prompt in one chunk, whose answer is drafted from what both have said so far."""
    drafter = {"method": "suffix", "suffix_decoding_min_token_prob": 0.0}
    run = run_gpu_path(
        llama, prompts[:1], v2=False, further=("loose_lengths", "suffix_package"),
        new_tokens=TOKENS, speculative_config={**drafter, "num_speculative_tokens": 4},
    )  # fmt: skip
    assert run["tokens"][0] == first_tokens(sparse_run, range(1), TOKENS)
    assert run["drafted"] > run["accepted"]


def test_model_runner_v2_drafts_on_the_device(llama, prompts, sparse_run):
    """607 tokens in chunks of 101: the last comes alone, in a batch that a graph would run."""
    drafter = {"method": "ngram", "prompt_lookup_min": 1, "prompt_lookup_max": 3}
    oracle = speculation(prompts, sparse_run["tokens"][0])
    run = run_gpu_path(
        llama, prompts[1:2], max_num_batched_tokens=101, new_tokens=TOKENS,
        further=("profiled_graphs", "loose_lengths", "no_read_backs", "oracle_on_the_device"),
        additional_config=oracle["additional_config"],
        speculative_config={**drafter, "num_speculative_tokens": 3},
    )  # fmt: skip
    assert run["tokens"][0] == first_tokens(sparse_run, [1], TOKENS)
    assert 2 < run["accepted"] < run["drafted"] - 2
    assert run["counters"]["prompts_compacted"] == 1
    assert run["free_blocks"][0] == run["free_blocks"][1]


def test_where_tokens_stay_in_place(llama, prompts):
    """QUEST, whose index grows with prompts too."""
    settings = {"token_budget": 64, "min_context": 128, "page_size": 8, "skip_layers": 1}
    asked, shared = [prompt[:400] for prompt in prompts[:2]], {"backend": "quest"}
    plain = run_engine(
        llama, asked, settings=settings, block_size=BLOCK_SIZE, new_tokens=18, **shared
    )
    run = run_gpu_path(
        llama, asked, v2=False, settings=settings, further=("loose_lengths",), new_tokens=TOKENS,
        max_num_batched_tokens=202, **shared, **speculation(asked, plain["tokens"][0]),
    )  # fmt: skip
    assert run["tokens"][0] == first_tokens(plain, range(2), TOKENS)
    assert 5 < run["accepted"] < run["drafted"] - 5
