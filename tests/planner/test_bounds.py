# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The fewest bytes of kernels and steps."""

from __future__ import annotations

import pytest

from benchmarks.gpu.shapes import LLAMA, MINICPM
from benchmarks.ops.rocketkv import split_of
from vllm_sparse.planner import bounds


def speedup(batch: int, context: int, split: bounds.Split) -> float:
    """The most that a decode step can gain at equal batch."""
    dense, sparse = (bounds.step_bytes(LLAMA, batch, context, each) for each in (None, split))
    return dense / sparse


@pytest.mark.parametrize(
    ("context", "budget", "expected"),
    [(16384, 256, 1.14), (32768, 256, 1.28), (32768, 1024, 1.27), (131072, 256, 2.14)],
)
def test_bounds_at_batch_one_follow_from_bytes(context, budget, expected):
    """A plan of the paper's arithmetic, in which the budget is what a step reads."""
    page, held = 4, 4 * budget
    split = bounds.Split(held, page, LLAMA.head_dim * budget * page // held, budget // 2)
    assert speedup(1, context, split) == pytest.approx(expected, abs=0.02)


def test_bytes_of_each_kernel():
    split = bounds.Split(held=4096, page_size=4, top_r=64, top_k=512)
    queries = 2 * 32 * 128
    assert bounds.score_bytes(LLAMA, 3, split) == 3 * (8 * 64 * 1024 * 2 + queries)
    assert bounds.attend_bytes(LLAMA, 3, 512) == 3 * (8 * 512 * 2 * 128 * 2 + 2 * queries)
    dense = bounds.layer_bytes(LLAMA, 1, 4096, None)
    assert dense * 32 == pytest.approx(4096 * LLAMA.kv_bytes_per_token, rel=1e-2)
    stage1_only = bounds.layer_bytes(LLAMA, 1, 32768, split._replace(stage2=False))
    assert stage1_only == dense


def test_bytes_of_each_sparda_kernel():
    keys = 2 * 3 * 2 * 128 * (32768 // 16 + 1)
    assert bounds.select_blocks_bytes(MINICPM, 3, 32768, 16, 96) == keys + 8 * 3 * 2 * 96


def test_splits_follow_the_rule_of_the_engine():
    split = split_of(LLAMA, 32768, {"token_budget": 1024})
    assert 5000 < split.held < 7000
    assert split.stage2
    all_kept = split_of(LLAMA, 32768, {"token_budget": 1024, "stage1": False})
    assert all_kept.held == 32768
    assert not split_of(LLAMA, 32768, {"token_budget": 1024, "stage2": False}).stage2


@pytest.mark.parametrize(
    ("context", "budget", "batch", "expected"),
    [(32768, 1024, 27, 7.0), (32768, 256, 27, 8.2), (131072, 256, 1, 2.14), (32768, 1024, 1, 1.27)],
)
def test_bounds_of_the_real_split(context, budget, batch, expected):
    split = split_of(LLAMA, context, {"token_budget": budget}, block_size=64)
    assert speedup(batch, context, split) == pytest.approx(expected, abs=0.05)


def test_batches_that_fit():
    assert bounds.most_rows(1000, 100) == 10
    assert bounds.most_rows(1000, 100, once=150) == 8
    assert bounds.most_rows(10, 100, once=50) == 0
    step = bounds.PagedStep(3.0, 4.0)
    assert (step.blocking_ms, step.prefetched_ms) == (7.0, 4.0)
