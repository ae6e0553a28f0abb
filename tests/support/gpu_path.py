# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Engines on the GPU's path of policies, on a CPU: see :mod:`.stand_ins`."""

from __future__ import annotations

from support.engine import BLOCK_SIZE, SETTINGS, run_engine

V2 = {"VLLM_USE_V2_MODEL_RUNNER": "1"}
NEW_TOKENS = 8


def run_gpu_path(model, prompts, *, v2=True, settings=SETTINGS, further=(), **options):
    return run_engine(
        model,
        prompts,
        settings={**settings, "kernels": "triton"},
        stand_ins=("flash_attention", "captured_graphs", *further),
        env=V2 if v2 else {},
        **{
            "block_size": BLOCK_SIZE,
            "new_tokens": NEW_TOKENS,
            # The interpreter copies every tensor that a kernel gets.
            "kv_cache_memory_bytes": 6 << 20,
            "timeout": 900,
            **options,
        },
    )


def first_tokens(run, requests, count=NEW_TOKENS):
    return [run["tokens"][0][i][:count] for i in requests]
