# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""SPARDA's pool in a plan is the one that start-up takes."""

from __future__ import annotations

import json

import pytest
from support.planner import LLAMA

from vllm_sparse import startup
from vllm_sparse.planner import paging
from vllm_sparse.planner.devices import DEVICES
from vllm_sparse.planner.model import Model
from vllm_sparse.planner.plan import Question, answer
from vllm_sparse.policies.sparda import SpardaSettings

GIB = 1 << 30


def asked(host_gib, context=130816, concurrency=4, key="h200"):
    """A Llama of 8 billion parameters on such a machine."""
    device = DEVICES[key]
    model = Model("/nowhere", LLAMA, context + 256)
    return Question(
        model, "llama", context, 256, concurrency, device, int(device.memory_gib * GIB),
        int(host_gib * GIB),
    )  # fmt: skip


@pytest.mark.parametrize("host", [1, 8, 64, 512])
def test_a_pool_that_the_device_holds_is_left_to_start_up(host):
    """Its blocks take no host memory; of 1 GiB, half holds the queries of 2,048 blocks."""
    question = asked(host, concurrency=4 if host > 1 else 1)
    config = question.configuration(question.concurrency)
    total = question.device_bytes
    startup.size_sparda(config, SpardaSettings(), lambda: total, question.host_bytes)
    blocks = config.cache_config.num_gpu_blocks_override
    arm = answer(question, "SPARDA")
    assert arm.refused == []
    assert (arm.pool_blocks, arm.host_bytes) == (blocks, 0)
    assert arm.fits == (blocks - 1) // 2048 >= question.concurrency
    assert "host_gib" not in arm.serve


def test_a_pool_beyond_the_device_is_said():
    """Ten requests of 16 GiB each."""
    arm = answer(asked(512, concurrency=10), "SPARDA")
    assert '"host_gib": 160.01' in arm.serve
    assert arm.host_bytes > 160 * GIB
    assert arm.fits == 10


def test_host_memory_bounds_a_pool_beyond_the_device():
    """Where 80 % of it are less than what the device holds, start-up's own pool is larger."""
    arm = answer(asked(64, concurrency=10), "SPARDA")
    assert "host_gib" not in arm.serve
    assert (arm.fits, arm.host_bytes) == (6, 0)


def test_what_nobody_serves_takes_host_memory_in_every_layer():
    question = asked(1, key="cpu")
    assert answer(question, "SPARDA").refused != []
    each = 8 << 20
    assert paging.hosted_layers_at(question, SpardaSettings(), each, 130816) == 32


def test_a_cpu_says_its_pool():
    arm = answer(asked(512, context=8192, key="cpu"), "SPARDA")
    said = json.loads(arm.serve.split("'")[1])["vllm_sparse"]
    assert said == {"host_gib": pytest.approx((4 * 132 + 1) / 128, abs=0.01)}
