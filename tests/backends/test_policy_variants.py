# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""After ROCKETKV's warm-up no step compiles another kernel, whatever begins with it."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("vllm")
from support.ahead_of_time import compiled, name_only
from support.policies import make_policy
from vllm_sparse.kernels import dispatch
from vllm_sparse.kernels.layout import PageLayout

from vllm_sparse.backends.policy_gpu import PolicyGpuBuilder
from vllm_sparse.backends.policy_warm_up import warm_up
from vllm_sparse.kv.tail.codec import PlainReader
from vllm_sparse.policies.rocketkv import RocketKV
from vllm_sparse.steps.layer import SparseLayer
from vllm_sparse.steps.parked import compact_parked
from vllm_sparse.steps.prompts import PromptEnd

CPU, SERVED = torch.device("cpu"), "requests from here on"
SIZE, DIM, KV_HEADS, GROUP = 64, 128, 8, 4
MOST_ROWS = 19  # no multiple of what aligns a row of numbers


@pytest.mark.slow
@pytest.mark.parametrize("drafts", [False, True])
def test_no_request_compiles_a_kernel(drafts, triton_cache):
    lines = compiled(__file__, int(drafts), triton_cache)
    border = lines.index(SERVED)
    assert len({line.split()[0] for line in lines[:border]}) >= 8, lines
    assert not lines[border + 1 :], lines[border + 1 :]


def serve(layer, drafts: bool) -> None:
    """Batches of all sizes, planned into the buffers of a builder."""
    holder = SimpleNamespace(_table=None, _max_rows=MOST_ROWS, device=CPU, _drafts=drafts)
    layout = layer.stock_layout
    cache = torch.zeros(40, KV_HEADS, SIZE, 2 * DIM + 2 * DIM // layout.page_size).bfloat16()
    for count in (1, 2, 3, MOST_ROWS):
        rows = PolicyGpuBuilder._buffers(holder, 33, count)
        tokens = torch.zeros(count, (GROUP + 2) * KV_HEADS, DIM).bfloat16()
        query, key, value = tokens.split([GROUP * KV_HEADS, KV_HEADS, KV_HEADS], 1)
        layer.decode_rows(cache, query, key, value, rows, torch.empty_like(query))
    kept = layer.policy.retention(20 * SIZE)
    sizes = torch.tensor([20 * SIZE, kept.dropped_blocks]).int()
    end = PromptEnd(
        torch.arange(20).int(), 20 * SIZE, kept.dropped_blocks, 0, kept.page_size, 0, 0,
        layer.policy.window, True, sizes,
    )  # fmt: skip
    for count in (1, 2, 3, 4, 5, 8):
        compact_parked([(layer, cache)], [end] * count)


if __name__ == "__main__":
    name_only()
    dispatch._check_triton = lambda device: None  # nothing runs
    asked_for_drafts = sys.argv[1] == "1"
    shape = {"block_size": SIZE, "head_dim": DIM, "group_size": GROUP}
    policy = make_policy(RocketKV, token_budget=1024, **shape)
    own = PageLayout(SIZE, DIM, policy.page_sizes[0])
    served = SparseLayer(
        policy, {own.page_size: own}, PlainReader(own), dispatch.policy_triton(CPU),
        reads_all=False,
    )  # fmt: skip
    impl = SimpleNamespace(
        sparse=served, num_heads=GROUP * KV_HEADS, num_kv_heads=KV_HEADS, head_size=DIM
    )
    spec = SimpleNamespace(policy=policy, block_size=SIZE, dtype=torch.bfloat16)
    warm_up(impl, spec, torch.bfloat16, CPU, asked_for_drafts)
    print(SERVED, flush=True)
    serve(served, asked_for_drafts)
