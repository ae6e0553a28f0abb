# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Two stages, of one layer and of two: tokens are those of Hugging Face, as without a pipeline."""

from __future__ import annotations

import pytest
from support import masked, masked_sparda
from support.engine import BLOCK_SIZE, SETTINGS, run_engine

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
    run = run_engine(llama, prompts[:3], settings=SETTINGS, block_size=BLOCK_SIZE, **STAGES)
    masked.assert_tokens_of_hugging_face(llama, prompts[:3], run["tokens"][0])


@pytest.mark.parametrize("selector", ["previous", "query"])
def test_sparda(llama, prompts, selector):
    """The longer stage decides how many blocks there are."""
    run = masked_sparda.run_sparda(llama, prompts[:3], selector=selector, **STAGES)
    tokens = run["tokens"][0]
    masked_sparda.assert_tokens_of_hugging_face(llama, prompts[:3], tokens, selector=selector)
    assert "0.03 GiB per rank, 0.09 GiB in total for 1965 blocks" in run["log"]
