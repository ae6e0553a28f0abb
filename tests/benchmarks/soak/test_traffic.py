# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Traffic is reproducible, within the server's limits, and as mixed as it says."""

from __future__ import annotations

from benchmarks.soak import serving, traffic
from vllm_sparse.config import load_settings
from vllm_sparse.kv.host.geometry import GIB, plan_frames


def test_plans_are_mixed_and_within_limits():
    asks = [ask for seed in range(10) for ask in traffic.plan(seed, 48, 8192)]
    assert asks[: len(asks) // 10] == traffic.plan(0, 48, 8192)
    for ask in asks:
        assert 0 < len(ask.prompt) < len(ask.prompt) + ask.max_tokens <= 8192
        assert all(0 <= token < traffic.VOCAB for token in ask.prompt)
        assert ask.hang_up_after is None or ask.hang_up_after <= ask.max_tokens
    lengths = sorted(len(ask.prompt) for ask in asks)
    assert lengths[0] < 10
    assert lengths[-1] > 7000
    begun = {prompt[:64] for prompt in {ask.prompt for ask in asks} if len(prompt) > 64}
    assert len(begun) < len({ask.prompt for ask in asks if len(ask.prompt) > 64})
    assert any(ask.hang_up_after == 0 for ask in asks)
    assert any(ask.hang_up_after for ask in asks)
    assert any(ask.samples > 1 for ask in asks)
    assert len({ask.prompt for ask in asks}) < len(asks)


def test_the_slab_has_not_a_frame_to_spare():
    subject = serving.subject("SPARDA", 8192)
    settings = load_settings({"vllm_sparse": subject.settings}, "sparda")
    sizes = {
        "num_layers": 3, "num_pieces": 2 * subject.blocks, "num_kv_heads": 2,
        "piece_bytes": 32 * 2 * 32 * 4, "max_num_seqs": serving.AT_ONCE, "max_model_len": 8192,
    }  # fmt: skip
    frames = plan_frames(settings, **sizes)
    assert frames == (serving.AT_ONCE * 2 * 6,) * 3
    assert frames[0] < 2 * subject.blocks, "blocks have to be fetched"
    assert sum(frames) * sizes["piece_bytes"] == subject.settings["slab_gib"] * GIB


def test_a_crowd_fits_the_pool_until_it_has_written():
    for longest in (2048, 8192):
        crowd = traffic.plan(0, 0, longest)
        pool = serving.subject("ROCKETKV", longest).blocks - 1  # one is the null block
        tokens = serving.BLOCK_TOKENS
        assert sum(-(-len(ask.prompt) // tokens) for ask in crowd) < pool
        assert sum((len(ask.prompt) + ask.max_tokens) // tokens for ask in crowd) > pool
        assert len(crowd) == serving.AT_ONCE
        assert all(
            len(ask.prompt) <= serving.subject("ROCKETKV", longest).dense_tokens for ask in crowd
        )
