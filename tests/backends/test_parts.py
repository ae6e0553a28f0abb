# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Models of several parts, of which one reads text: vLLM builds it under a view of its own."""

from __future__ import annotations

import pytest
from reference import random_models
from support.engine import BLOCK_SIZE, SETTINGS, SPARDA_SETTINGS, run_engine

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def listener(qwen2, tmp_path_factory):
    """Asked in text, it says what the Qwen2 in it says."""
    return random_models.save_random_listener(tmp_path_factory.mktemp("models") / "audio", qwen2)


OPTIONS = {
    "rocketkv": {"settings": SETTINGS, "block_size": BLOCK_SIZE},
    "sparda": {"settings": {**SPARDA_SETTINGS, "selector": "query"}, "max_num_seqs": 6},
}


@pytest.mark.parametrize("backend", OPTIONS)
def test_what_is_asked_in_text_is_answered_as_by_the_text_model(listener, qwen2, prompts, backend):
    options = {"backend": backend, "new_tokens": 40, **OPTIONS[backend]}
    alone = run_engine(qwen2, prompts[:3], **options)
    silent = run_engine(listener, prompts[:3], limit_mm_per_prompt={"audio": 0}, **options)
    assert silent["tokens"] == alone["tokens"]
    assert alone["counters"]["requests"] == 3
    for run in (alone, silent):
        run["counters"].pop("exposed_wait_seconds", None)
    assert silent["counters"] == alone["counters"]


def test_its_ranks_agree_on_what_a_block_is(listener, prompts):
    options = {"new_tokens": 40, **OPTIONS["rocketkv"], "limit_mm_per_prompt": {"audio": 0}}
    alone = run_engine(listener, prompts[:2], **options)
    ranks = run_engine(
        listener, prompts[:2], tensor_parallel_size=2, in_process=False, **options,
    )  # fmt: skip
    assert ranks["tokens"] == alone["tokens"]
