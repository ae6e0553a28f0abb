# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Requests that ask to be dense beside others that do not, in whole engines on a CPU.

Dense ones are compared with stock vLLM; the others with ``sparse_run``, which is compared with
Hugging Face in ``test_policy_cpu``. Of each pair of prompts that begin alike, one is dense.
"""

from __future__ import annotations

import pytest
from support.engine import BLOCK_SIZE, NEW_TOKENS, SETTINGS, run_engine
from support.masked import assert_tokens_of_hugging_face, policy_of

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

DENSE = {"vllm_sparse.sparse": False}


def expected(asked, sparse_run, stock_run, new_tokens=NEW_TOKENS):
    """Tokens of a wave."""
    runs = [stock_run if extra else sparse_run for extra in asked]
    return [run["tokens"][0][i][:new_tokens] for i, run in enumerate(runs)]


def test_both_kinds_share_batches_and_prefixes(llama, prompts, sparse_run, stock_run):
    """In chunks; what was dense in the first wave is sparse in the second, and the reverse."""
    first, second = [None, DENSE] * 3, [DENSE, None] * 3
    run = run_engine(
        llama, prompts, settings=SETTINGS, block_size=BLOCK_SIZE, max_num_batched_tokens=100,
        waves=2, asked=[*first, *second],
    )  # fmt: skip
    assert run["tokens"] == [expected(asked, sparse_run, stock_run) for asked in (first, second)]
    policy = policy_of()
    dropped = [policy.retention(len(prompt)).dropped_blocks for prompt in prompts]
    shared = 384 // BLOCK_SIZE  # of the other one of the pair, all of whose blocks are published
    hits = [n if i % 2 else max(n, shared) for i, n in enumerate(dropped)]
    assert run["cached"][1] == [BLOCK_SIZE * n for n in hits]

    counters = run["counters"]
    assert counters["blocks_evicted"] == sum(dropped)  # each prompt was sparse once
    assert counters["prompts_compacted"] == counters["dense_fallbacks/requested"] == len(prompts)
    assert counters["decode_rows"] == len(prompts) * (NEW_TOKENS - 1)
    assert run["free_blocks"][0] == run["free_blocks"][1]


@pytest.mark.parametrize(("caching", "chunk"), [(True, 2048), (False, 100)])
def test_a_preempted_request_keeps_what_it_asked_for(
    llama, prompts, sparse_run, stock_run, caching, chunk
):
    """Decoding, or in its prompt; without a prefix cache only its name tells the scheduler."""
    asked = [None, DENSE] * 3
    run = run_engine(
        llama, prompts, settings=SETTINGS, block_size=BLOCK_SIZE, num_gpu_blocks_override=60,
        scheduler_reserve_full_isl=False, enable_prefix_caching=caching, asked=asked,
        max_num_batched_tokens=chunk, new_tokens=60,
    )  # fmt: skip
    assert run["tokens"][0] == expected(asked, sparse_run, stock_run, 60)
    assert run["preemptions"] > 0
    if caching:
        assert run["counters"]["dense_fallbacks/requested"] > 3  # a resumed prompt, once more
    assert run["free_blocks"][0] == run["free_blocks"][1]


def test_budgets_share_batches_and_prefixes(llama, prompts, sparse_run, stock_run):
    """More and less than the server's, beside dense requests, in chunks and preempted."""
    more, less = ({"vllm_sparse.token_budget": tokens} for tokens in (128, 32))
    first, second = [None, more, DENSE, less, more, None], [less, None, None, more, None, DENSE]
    run = run_engine(
        llama, prompts, settings={**SETTINGS, "max_token_budget": 128}, block_size=BLOCK_SIZE,
        max_num_batched_tokens=100, num_gpu_blocks_override=70, scheduler_reserve_full_isl=False,
        waves=2, new_tokens=40, asked=[*first, *second],
    )  # fmt: skip
    assert run["preemptions"] > 0
    assert max(run["cached"][1]) > 0
    assert run["free_blocks"][0] == run["free_blocks"][1]
    tokens = [*run["tokens"][0], *run["tokens"][1]]
    requests = list(zip([*first, *second], [*prompts, *prompts], tokens, strict=True))
    for asked, prompt, got in requests:
        i = prompts.index(prompt)
        if asked in (None, DENSE):
            calm = stock_run if asked else sparse_run
            assert got == calm["tokens"][0][i][:40]
        else:
            assert got != sparse_run["tokens"][0][i][:40]
    for extra in (more, less):
        mine = [(prompt, got) for asked, prompt, got in requests if asked == extra]
        budget = extra["vllm_sparse.token_budget"]
        assert_tokens_of_hugging_face(llama, *zip(*mine, strict=True), token_budget=budget)
