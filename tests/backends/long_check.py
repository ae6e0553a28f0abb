# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Two generations of 16,000 tokens: ``python -m pytest -n 0 tests/backends/long_check.py``.

The pool holds three quarters of what they come to, so that one of them is preempted in its middle.
Budgets are the whole context. Among so many tokens some have a rival that is as likely, after which
two right texts differ; so stock vLLM reads what was generated, and each token has to be its best.
Too slow for the suite, so pytest collects it only by name; ``LONG_TOKENS`` sets another length.
"""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
import torch
from reference.random_models import save_random_model
from support.engine import BLOCK_SIZE, IN_PROCESS, SETTINGS, SPARDA_SETTINGS
from support.forked import run_forked

NEW_TOKENS = int(os.environ.get("LONG_TOKENS", "16000"))
LENGTHS = (200, 290)
LONGEST = max(LENGTHS) + NEW_TOKENS
# Of the likeliest token's log-probability; float32 sums in another order differ by less.
NEAR = 1e-3
SECONDS = 4 * 3600
CASES: dict[str, dict[str, Any]] = {
    "rocketkv": {
        **SETTINGS, "token_budget": 4 * LONGEST, "min_context": 32, "stage1": False, "window": 16,
    },
    "sparda": {
        **SPARDA_SETTINGS, "top_k": LONGEST // BLOCK_SIZE + 2, "slab_gib": 0.3, "host_gib": 0.3,
    },
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_every_token_is_the_best_of_stock(case, tmp_path):
    model = save_random_model(tmp_path / "model", max_position_embeddings=LONGEST + 2)
    generator = torch.Generator().manual_seed(7)
    prompts = [torch.randint(1024, (n,), generator=generator).tolist() for n in LENGTHS]
    engine = {
        "model": str(model), "max_model_len": LONGEST + 2, "block_size": BLOCK_SIZE,
        "kv_cache_memory_bytes": 256 << 20,
    }  # fmt: skip
    found = done("support.generations", tmp_path / "found.json", {
        "llm": {
            **engine, "max_num_seqs": 2, "max_num_batched_tokens": 512,
            "num_gpu_blocks_override": 3 * LONGEST // 2 // BLOCK_SIZE,
            "attention_backend": case.upper(),
            "additional_config": {"vllm_sparse": CASES[case]},
        },
        "prompts": prompts, "new_tokens": NEW_TOKENS, "every": NEW_TOKENS // 16, "stops": False,
    })  # fmt: skip
    assert [len(tokens) for tokens in found["tokens"]] == [NEW_TOKENS] * 2
    preempted_at, *_ = found["preempted_at"]
    assert NEW_TOKENS // 2 < preempted_at < NEW_TOKENS * 7 // 8
    assert found["compared"] > 100 * NEW_TOKENS
    assert found["free"][0] == found["free"][1]

    gaps = done("support.likelihood", tmp_path / "gaps.json", {
        "llm": {**engine, "max_num_seqs": 1}, "prompts": prompts, "texts": found["tokens"],
    })  # fmt: skip
    for text, own in zip(found["tokens"], gaps, strict=True):
        assert len(own) == NEW_TOKENS
        assert max(own) < NEAR
        print(f"{case}: {len(set(text))} different tokens, preempted at {preempted_at}, "
              f"{found['compared']:,} numbers compared, at most {max(own):.1e} nats from the best, "
              f"{sum(gap > 0 for gap in own)} were not the best")  # fmt: skip


def done(module: str, result: Any, job: dict[str, Any]) -> Any:
    """What a job of a module writes."""
    run_forked(module, {**job, "result": str(result)}, IN_PROCESS, SECONDS)
    return json.loads(result.read_text())
