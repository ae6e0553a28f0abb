# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""ROCKETKV with a stage 1 that is not the paper's, and what an engine then has to answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from reference import hf_rocketkv
from reference import rocketkv_bruteforce as brute
from transformers import AutoModelForCausalLM

from support import engine
from support.policies import make_policy

if TYPE_CHECKING:
    from pathlib import Path

_CHANGES = {"window": 16, "sinks": 4, "diverse_share": 0.25}
SETTINGS = {**engine.SETTINGS, **_CHANGES}


def check(folder: Path, prompts: list[list[int]], tokens: list[list[int]]) -> None:
    """The tokens are masked Hugging Face's, and not those of the paper's votes."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    policy = make_policy(
        head_dim=32, group_size=4, block_size=engine.BLOCK_SIZE, max_model_len=1024, **SETTINGS
    )

    def keep(query: torch.Tensor, keys: torch.Tensor, count: int) -> torch.Tensor:
        kernel = policy.settings.pool_kernel
        return brute.keep_with_unusual_keys(query, keys, count, kernel, 4, 0.25)

    for prompt, got in zip(prompts, tokens, strict=True):
        retention = policy.retention(len(prompt))
        shared = {
            "dropped_blocks": retention.dropped_blocks, "block_size": engine.BLOCK_SIZE,
            "page_size": retention.page_size, "top_r": retention.top_r, "top_k": policy.top_k,
            "window": policy.window,
        }  # fmt: skip
        assert got == hf_rocketkv.generate(model, prompt, len(got), keep=keep, **shared)
        assert got != hf_rocketkv.generate(model, prompt, len(got), **shared)
