# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Learned attention sinks on the GPU's path, interpreted; see ``test_policy_gpu``."""

from __future__ import annotations

import pytest
from support.engine import BLOCK_SIZE, SETTINGS, run_engine
from support.gpu_path import run_gpu_path

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

ROCKETKV = {**SETTINGS, "window": 8, "generation_reserve": 20}
QUEST = {"token_budget": 64, "min_context": 128, "page_size": 8, "skip_layers": 1}


@pytest.mark.parametrize(
    ("backend", "settings", "v2"),
    [("rocketkv", ROCKETKV, True), ("rocketkv", ROCKETKV, False), ("quest", QUEST, True)],
    ids=["rocketkv-v2", "rocketkv-v1", "quest-v2"],
)
def test_gpu_path_gives_the_cpu_path_s_tokens(gpt_oss, prompts, backend, settings, v2):
    """A prompt in two chunks; what it is compared with is compared in ``test_sinks_cpu``."""
    prompt, shared = prompts[0][:260], {"backend": backend, "settings": settings, "new_tokens": 4}
    run = run_gpu_path(gpt_oss, [prompt], v2=v2, max_num_batched_tokens=160, **shared)
    expected = run_engine(gpt_oss, [prompt], block_size=BLOCK_SIZE, **shared)
    assert run["tokens"] == expected["tokens"]
    assert run["counters"]["decode_rows"] > 0
    assert run["free_blocks"][0] == run["free_blocks"][1]
