# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Memory that a step takes on a GPU, as vLLM is told of it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")
from support.policies import make_policy
from vllm_sparse.kernels.layout import PageLayout

from vllm_sparse.backends.policy_room import _most_blocks, step_bytes
from vllm_sparse.kv.tail.compaction import compaction_bytes
from vllm_sparse.policies.quest import Quest
from vllm_sparse.policies.rocketkv import RocketKV
from vllm_sparse.policies.snapkv import SnapKV
from vllm_sparse.policies.streamingllm import StreamingLLM
from vllm_sparse.steps.select import MOST_INDEX_BYTES

LONGEST, KV_HEADS, DTYPE = 5000, 2, torch.bfloat16


def bytes_of(policy, pool_bytes=1 << 20, layers=3):
    config = SimpleNamespace(
        cache_config=SimpleNamespace(kv_cache_memory_bytes=pool_bytes),
        model_config=SimpleNamespace(max_model_len=LONGEST, dtype=DTYPE),
        scheduler_config=SimpleNamespace(max_num_seqs=3), num_speculative_tokens=0,
        compilation_config=SimpleNamespace(max_cudagraph_capture_size=0),
    )  # fmt: skip
    return step_bytes(config, policy, KV_HEADS, layers, DTYPE, torch.device("cpu"))


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.mark.parametrize("kind", [SnapKV, StreamingLLM, Quest])
def test_a_compaction_in_pytorch_is_of_the_longest_request(kind):
    """Even if decode selects nothing."""
    policy = make_policy(kind, max_model_len=LONGEST)
    size = policy.shape.block_size
    layout = PageLayout(size, policy.shape.head_dim, policy.page_sizes[0], policy.index_width)
    moved = compaction_bytes(LONGEST, layout, policy, KV_HEADS, DTYPE)
    assert bytes_of(policy) >= moved or not policy.moves
    assert bytes_of(policy) > MOST_INDEX_BYTES or policy.top_k is None  # scores without a kernel


def test_blocks_that_a_pool_has():
    pool, layout, layers = 1 << 20, PageLayout(16, 128, 4), 3
    config = SimpleNamespace(cache_config=SimpleNamespace(kv_cache_memory_bytes=pool))
    blocks = _most_blocks(config, layout, KV_HEADS * layers, DTYPE, torch.device("cpu"))
    keys_values_and_extrema = 2 * 16 * 128 + 2 * 16 // 4 * 128
    block = layers * KV_HEADS * keys_values_and_extrema * DTYPE.itemsize
    assert blocks == pool // block > 0


def test_scores_of_a_pool_that_layers_share():
    """The more layers, the fewer blocks; with few, all that the rows may hold counts."""
    policy = make_policy(RocketKV, max_model_len=LONGEST)
    assert bytes_of(policy, 1 << 24) > bytes_of(policy, 1 << 24, layers=30)
    assert bytes_of(policy, 1 << 24, layers=30) == bytes_of(policy, 1 << 20) > 0
