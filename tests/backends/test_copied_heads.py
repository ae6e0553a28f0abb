# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""More tensor-parallel ranks than KV heads: each has a copy of one, and part of its query heads.

A rank chooses by its own query heads. So tokens are those of a model that has a KV head, equal to
others, for every rank; a Forecast, which speaks for a KV head, chooses alike on all copies.
"""

from __future__ import annotations

import json
import re

import pytest
from reference import random_models
from support import masked, masked_sparda
from support.engine import BLOCK_SIZE, DENSE, SETTINGS, SPARDA_SETTINGS, run_engine
from support.planner import plan

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

HEADS, LAYERS, DIM, NEW_TOKENS = 8, 3, 32, 30
RANKS = [(1, 2), (2, 4)]  # KV heads of the model, ranks


def on(ranks: int) -> dict:
    """Options of an engine with so many ranks, whose threads share two cores."""
    return {
        "in_process": False, "stand_ins": ("forked_workers",), "tensor_parallel_size": ranks,
        "new_tokens": NEW_TOKENS,
        "env": {"VLLM_CPU_OMP_THREADS_BIND": "|".join("01" * (ranks // 2))},
    }  # fmt: skip


@pytest.fixture(scope="module", params=RANKS, ids=lambda pair: f"{pair[0]} on {pair[1]}")
def models(request, tmp_path_factory):
    """A model, one with a KV head for every rank, and how many ranks there are."""
    kv_heads, ranks = request.param
    folder = tmp_path_factory.mktemp("models")
    model = random_models.save_random_model(folder / "model", kv_heads=kv_heads, heads=HEADS)
    return model, random_models.save_copied_heads(folder / "copied", model, ranks), ranks


def test_rocketkv(models, prompts):
    """In chunks, beside a request that wants to be dense, and again with prefix hits."""
    model, copied, ranks = models
    asked, options = [None, DENSE, None], {"block_size": BLOCK_SIZE, **on(ranks)}
    run = run_engine(
        model, prompts[:3], settings=SETTINGS, waves=2, max_num_batched_tokens=200, asked=asked,
        **options,
    )  # fmt: skip
    first, again = run["tokens"]
    sparse, shape = [prompts[0], prompts[2]], {"group_size": HEADS // ranks}
    masked.assert_tokens_of_hugging_face(copied, sparse, [first[0], first[2]], **shape)
    assert again == first
    assert min(run["cached"][1]) > 0
    assert first[1] == run_engine(model, prompts[1:2], **options)["tokens"][0][0]

    policy, counters = masked.policy_of(**shape), run["counters"]
    dropped = sum(policy.retention(len(prompt)).dropped_blocks for prompt in sparse)
    assert counters["blocks_evicted"] == 2 * dropped > 0
    assert counters["requests"] == counters["prompts_compacted"] == 2 * len(sparse)
    assert counters["dense_fallbacks/requested"] == 2
    assert counters["decode_rows"] == 2 * len(sparse) * (NEW_TOKENS - 1)


@pytest.mark.parametrize(
    ("models", "selector"),
    [(RANKS[0], "lookahead-query"), (RANKS[0], "forecast"), (RANKS[1], "previous")],
    indirect=["models"],
    ids=["lookahead-query", "forecast", "previous"],
)
def test_sparda(models, prompts, tmp_path, capsys, selector):
    """In chunks; host pools of all ranks are what is planned, and what is counted."""
    model, copied, ranks = models
    changes = {"selector": selector}
    if selector == "forecast":
        copied, changes["forecast"] = model, str(tmp_path / "forecast.safetensors")
        random_models.save_random_forecast(changes["forecast"], model)
    slab = SPARDA_SETTINGS["slab_gib"] / 2  # of a KV head, not two
    run = masked_sparda.run_sparda(
        model, prompts[:3], slab_gib=slab, max_num_batched_tokens=200, **changes, **on(ranks)
    )
    masked_sparda.assert_tokens_of_hugging_face(copied, prompts[:3], run["tokens"][0], **changes)

    block = LAYERS * BLOCK_SIZE * 2 * DIM * 4
    counters, blocks = run["counters"], int(SPARDA_SETTINGS["host_gib"] * 2**30 / block)
    assert counters["host_pool_bytes"] == ranks * blocks * block
    total = ranks * blocks * block / 2**30
    assert f"0.06 GiB per rank, {total:.2f} GiB in total for {blocks - 1} blocks" in run["log"]
    # Written: each prompt but for what it shares, all outputs but the last, by every rank.
    tokens = sum(map(len, prompts[:3])) - sum(run["cached"][0]) + 3 * (NEW_TOKENS - 1)
    assert counters["device_to_host_bytes"] == ranks * tokens * block // BLOCK_SIZE
    assert counters["decode_rows"] == 3 * (NEW_TOKENS - 1)  # which all ranks see

    settings = {**SPARDA_SETTINGS, **changes, "slab_gib": slab}
    status, arms = plan(
        capsys, str(model), "--device", "cpu", "--context", "600", "--output", "424",
        "--backend", "SPARDA", "--tensor-parallel-size", str(ranks), "--concurrency", "6",
        "--settings", json.dumps(settings),
    )  # fmt: skip
    assert status == 0
    # Of bfloat16, as plans are, twice as many blocks have the same bytes.
    assert arms["SPARDA"]["pool_blocks"] == 2 * blocks
    assert arms["SPARDA"]["host_bytes"] == counters["host_pool_bytes"]
    frames = re.search(r"(\d+) frames a layer", run["log"])
    assert arms["SPARDA"]["slab_bytes"] == counters["slab_bytes"] // ranks
    assert counters["slab_frames"] == ranks * LAYERS * int(frames[1])
