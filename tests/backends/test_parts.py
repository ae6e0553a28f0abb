# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Models of several parts, of which one reads text: vLLM builds it under a view of its own."""

from __future__ import annotations

from functools import cache

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
SILENT = {"limit_mm_per_prompt": {"audio": 0}, "new_tokens": 40}


@pytest.fixture(scope="module")
def asked_in_text(listener, prompts):
    """The run of three prompts with a backend, once."""
    return cache(
        lambda backend: run_engine(
            listener, prompts[:3], backend=backend, **OPTIONS[backend], **SILENT
        )
    )


@pytest.mark.parametrize("backend", OPTIONS)
def test_what_is_asked_in_text_is_answered_as_by_the_text_model(
    qwen2, prompts, asked_in_text, backend
):
    alone = run_engine(qwen2, prompts[:3], backend=backend, new_tokens=40, **OPTIONS[backend])
    silent = asked_in_text(backend)
    assert silent["tokens"] == alone["tokens"]
    assert alone["counters"]["requests"] == 3
    counted = [
        {name: count for name, count in run["counters"].items() if name != "exposed_wait_seconds"}
        for run in (alone, silent)
    ]
    assert counted[0] == counted[1]


def test_its_ranks_agree_on_what_a_block_is(listener, prompts, asked_in_text):
    ranks = run_engine(
        listener, prompts[:2], tensor_parallel_size=2, in_process=False, **OPTIONS["rocketkv"],
        **SILENT,
    )  # fmt: skip
    assert ranks["tokens"][0] == asked_in_text("rocketkv")["tokens"][0][:2]
