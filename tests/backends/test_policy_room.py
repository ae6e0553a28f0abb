# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Memory that a step takes on a GPU, as vLLM is told of it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")
from support.configuration import configuration
from support.policies import make_policy
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm_sparse.kernels.layout import PageLayout

from vllm_sparse.backends import policy_room
from vllm_sparse.backends.policy import Context, PolicyBackend
from vllm_sparse.backends.policy_room import _most_blocks, scoring_parts, step_bytes
from vllm_sparse.device_room import mlp_bytes
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


def test_a_step_may_copy_as_much_as_its_activations_take(monkeypatch):
    config = configuration("SNAPKV")
    config.scheduler_config.max_num_batched_tokens = 8192
    config.compilation_config.static_forward_context = {}
    context = Context(
        "SNAPKV", SnapKV.Settings(), 2, LONGEST, "", DTYPE, None, mlp_bytes(config),
        lambda: config.compilation_config,
    )  # fmt: skip
    monkeypatch.setattr(PolicyBackend, "context", context)
    layer = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=64, dtype=DTYPE)
    spec = PolicyBackend.customize_spec(layer)
    numbers = 32 + 2 * 64  # hidden size, and twice the MLP's width
    assert spec.copied_bytes == 8192 * numbers * config.model_config.dtype.itemsize


def test_blocks_that_a_pool_has():
    pool, layout, layers = 1 << 20, PageLayout(16, 128, 4), 3
    config = SimpleNamespace(cache_config=SimpleNamespace(kv_cache_memory_bytes=pool))
    blocks = _most_blocks(config, layout, KV_HEADS * layers, DTYPE, torch.device("cpu"))
    keys_values_and_extrema = 2 * 16 * 128 + 2 * 16 // 4 * 128
    block = layers * KV_HEADS * keys_values_and_extrema * DTYPE.itemsize
    assert blocks == pool // block > 0


def test_prompts_that_are_compacted_together_are_bounded(monkeypatch):
    """By what the rows may have, by a constant, and not below one prompt of the longest."""
    policy = make_policy(RocketKV, max_model_len=LONGEST)
    shape = policy.shape
    kept = LONGEST - policy.retention(LONGEST).dropped_blocks * shape.block_size
    rows = kept * (4 + 2 * shape.head_dim * DTYPE.itemsize)
    queries = policy.window * shape.group_size * shape.head_dim * 4
    one = KV_HEADS * (2 * 4 * LONGEST + rows + queries)
    assert bytes_of(policy) == 3 * one
    monkeypatch.setattr(policy_room, "MOST_COMPACTED_BYTES", 2 * one)
    assert bytes_of(policy) == 2 * one
    monkeypatch.setattr(policy_room, "MOST_COMPACTED_BYTES", 0)
    assert bytes_of(policy) == one


def test_scores_of_a_pool_that_layers_share(monkeypatch):
    """The more layers, the fewer blocks; with few, all that the rows may hold counts."""
    monkeypatch.setattr(policy_room, "compacted_bytes", lambda *_: 0)  # of prompts
    policy = make_policy(RocketKV, max_model_len=LONGEST)
    assert bytes_of(policy, 1 << 24) > bytes_of(policy, 1 << 24, layers=30)
    assert bytes_of(policy, 1 << 24, layers=30) == bytes_of(policy, 1 << 20) > 0


@pytest.mark.parametrize(
    ("kind", "longest", "rows", "parts"),
    [
        # 4 bytes x 2 heads x 8192 pages x (2 x 64 + 4) numbers: 31 rows in 256 MiB.
        *((Quest, 131072, 62, 2), (Quest, 131072, 63, 3), (Quest, 131072, 256, 9)),
        *((Quest, 4096, 256, 1), (RocketKV, 131072, 256, 1), (SnapKV, 131072, 256, 1)),
        (StreamingLLM, 131072, 256, 1),  # which scores nothing
    ],
)
def test_a_graph_of_many_parts_is_not_captured(kind, longest, rows, parts):
    """Full decode steps are, where a kernel scores or pages are few."""
    from vllm.v1.attention.backend import AttentionCGSupport

    from vllm_sparse.backends.policy_gpu import PolicyGpuBuilder

    policy = make_policy(kind, max_model_len=longest, head_dim=64, group_size=4)
    config = SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=longest), speculative_config=None,
        compilation_config=SimpleNamespace(max_cudagraph_capture_size=rows),
    )  # fmt: skip
    spec = SimpleNamespace(policy=policy, num_kv_heads=KV_HEADS, backend=kind.__name__)
    assert scoring_parts(config, policy, KV_HEADS) == parts
    found = PolicyGpuBuilder.get_cudagraph_support(config, spec)
    assert found == (AttentionCGSupport.NEVER if parts > 8 else AttentionCGSupport.UNIFORM_BATCH)


@pytest.mark.parametrize(
    ("kind", "v2", "whole"),
    [(RocketKV, False, False), (RocketKV, True, True), (Quest, False, True)],
)
def test_no_graph_runs_a_step_of_drafts_that_may_have_to_compact(kind, v2, whole):
    """Model Runner V1 knows such a step by its number of tokens only."""
    from vllm.v1.attention.backend import AttentionCGSupport

    from vllm_sparse.backends.policy_gpu import PolicyGpuBuilder

    config = SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=LONGEST), speculative_config=object(),
        compilation_config=SimpleNamespace(max_cudagraph_capture_size=8), use_v2_model_runner=v2,
    )  # fmt: skip
    policy = make_policy(kind, max_model_len=LONGEST, head_dim=64, group_size=4)
    spec = SimpleNamespace(policy=policy, num_kv_heads=KV_HEADS, backend=kind.__name__)
    found = PolicyGpuBuilder.get_cudagraph_support(config, spec)
    single = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    assert found == (AttentionCGSupport.UNIFORM_BATCH if whole else single)


@pytest.mark.parametrize("layers", [1, 3])
def test_vllm_measures_what_a_step_takes(monkeypatch, layers):
    """While it profiles, without metadata, it sees as much taken as a step may need."""
    from vllm_sparse.backends import policy_gpu

    impl = policy_gpu.PolicyGpuImpl.__new__(policy_gpu.PolicyGpuImpl)
    policy, asked, taken = make_policy(), [], []
    layer, other = SimpleNamespace(impl=impl), SimpleNamespace(impl=object())
    impl._config = SimpleNamespace(
        cache_config=SimpleNamespace(block_size=48),
        compilation_config=SimpleNamespace(
            static_forward_context={"other": other, **{str(i): layer for i in range(layers)}}
        ),
    )
    impl.head_size, impl.num_kv_heads, impl._cache_dtype = 64, KV_HEADS, torch.uint8
    monkeypatch.setattr(
        policy_gpu.PolicyBackend,
        "context",
        SimpleNamespace(policy=lambda *given: asked.append(given) or policy),
    )
    monkeypatch.setattr(policy_gpu, "step_bytes", lambda *given: asked.append(given) or 12345)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: taken.append(a) or empty(*a, **k))
    output = torch.full((2, 4), torch.nan)
    tensors = [torch.zeros(2, 4)] * 4
    assert impl.forward(None, *tensors, None, output) is output
    assert not output.any()
    assert taken == [(12345,)]
    assert asked[0] == (64, 16, torch.uint8)  # the largest power of two in a block
    assert asked[1][1:5] == (policy, KV_HEADS, layers, torch.uint8)
