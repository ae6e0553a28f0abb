# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Two stages, of one layer and of two: tokens are those of Hugging Face, as without a pipeline."""

from __future__ import annotations

import pytest
from support import masked, masked_sparda
from support.engine import BLOCK_SIZE, DENSE, SETTINGS, run_engine

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

STAGES = {
    "in_process": False,
    "stand_ins": ("forked_workers",),
    "pipeline_parallel_size": 2,
    "new_tokens": 40,
    # The compiler's rehearsal makes room for what a stage receives; what it compiles is left as is.
    "enforce_eager": False,
    "compilation_config": {"mode": 2, "backend": "eager"},
    "env": {
        "VLLM_CPU_CI_ENV": "0",
        "TORCHDYNAMO_DISABLE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "0|1",
        "VLLM_PP_LAYER_PARTITION": "1,2",
    },
}


def test_rocketkv(llama, prompts):
    """In chunks, with prefix hits and preemption, beside a dense request."""
    options = {"block_size": BLOCK_SIZE, **STAGES}
    run = run_engine(
        llama, prompts[:3], settings=SETTINGS, waves=2, max_num_batched_tokens=100,
        num_gpu_blocks_override=40, scheduler_reserve_full_isl=False,
        asked=[None, DENSE, None, None, None, DENSE], **options,
    )  # fmt: skip
    first, second = run["tokens"]
    masked.assert_tokens_of_hugging_face(
        llama, [prompts[row] for row in (0, 2, 0, 1)], [first[0], first[2], second[0], second[1]]
    )
    assert run["preemptions"] > 0
    assert max(run["cached"][1]) > 0
    stock = run_engine(llama, prompts[:3], **options)["tokens"][0]
    assert [first[1], second[2]] == stock[1:]


@pytest.mark.parametrize("selector", ["previous", "query"])
def test_sparda(llama, prompts, selector):
    """In chunks and with prefix hits; the longer stage decides how many blocks there are."""
    run = masked_sparda.run_sparda(
        llama, prompts[:3], selector=selector, waves=2, max_num_batched_tokens=100, **STAGES
    )
    tokens = run["tokens"][0]
    masked_sparda.assert_tokens_of_hugging_face(llama, prompts[:3], tokens, selector=selector)
    assert run["tokens"][1] == tokens
    assert min(run["cached"][1]) > 0
    assert "0.03 GiB per rank, 0.09 GiB in total for 1965 blocks" in run["log"]
