# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What a start compiles, so that no request waits for it."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from support import adversary
from support.kernels import DEVICE
from support.policies import make_policy

pytest.importorskip("triton")
pytest.importorskip("vllm")

from vllm_sparse.kernels.dispatch import policy_triton
from vllm_sparse.kernels.layout import PageLayout
from vllm_sparse.kernels.triton import launch

from vllm_sparse.backends.policy_warm_up import warm_up
from vllm_sparse.kv.tail.codec import PlainReader
from vllm_sparse.policies.rocketkv import RocketKV
from vllm_sparse.steps.layer import SparseLayer

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="counts in the interpreter")

DIM, KV_HEADS, GROUP = 16, 2, 2


@pytest.mark.parametrize("size", [16, 128])
def test_all_kernels_of_a_long_prompt_s_end_run_once(size, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(adversary, "_THOROUGH", 0)
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 132)
    policy = make_policy(RocketKV, token_budget=64, block_size=size)
    layout = PageLayout(size, DIM, policy.page_sizes[0])
    layer = SparseLayer(
        policy, {layout.page_size: layout}, PlainReader(layout),
        policy_triton(torch.device("cpu")), reads_all=False,
    )  # fmt: skip
    impl = SimpleNamespace(
        sparse=layer, num_heads=GROUP * KV_HEADS, num_kv_heads=KV_HEADS, head_size=DIM
    )
    spec = SimpleNamespace(policy=policy, block_size=size, dtype=torch.float32)
    before = Counter(adversary.LAUNCHES)
    warm_up(impl, spec, torch.float32, torch.device("cpu"), False)
    launched = adversary.LAUNCHES - before
    assert len(launched) == 10, launched  # without the plan of a step's rows
    assert launched["_merge_kernel"] == 1
