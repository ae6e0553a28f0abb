# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The loss of training: against a naive float64 one, and however it is chunked."""

from __future__ import annotations

import pytest
import torch
from reference.forecast_loss import naive_row
from support.training import GEOMETRY, KINDS, TOKENS

from vllm_sparse.policies.sparda import compress_keys, select_blocks
from vllm_sparse.training.objective import (
    LiveTeacher,
    StoredTeacher,
    best_free_blocks,
    forecast_loss,
    pooled,
)

SCALE = 16**-0.5


def layer(seed=0, heads=4, kv_heads=2, dim=16, tokens=TOKENS):
    """Random queries, keys and a Forecast of one layer."""
    generator = torch.Generator().manual_seed(seed)
    query = 2 * torch.randn(heads, tokens, dim, generator=generator)
    keys = torch.randn(kv_heads, tokens, dim, generator=generator)
    forecast = 2 * torch.randn(kv_heads, tokens, dim, generator=generator)
    return query, keys, forecast


@pytest.mark.parametrize(("kind", "supervision"), KINDS)
def test_loss_and_gradient_equal_a_naive_implementation(kind, supervision):
    query, keys, forecast = layer()
    scale = 0.3  # not the 1 / sqrt(16) of most models
    positions = torch.tensor([3, 40, 131, 200, 263, 299])
    forecast = forecast[:, positions].requires_grad_()
    teacher = LiveTeacher(kind, query[:, positions], keys, positions, GEOMETRY, scale)
    compressed = compress_keys(keys, 16, 8)
    loss = forecast_loss(
        forecast, teacher, compressed, positions, TOKENS, GEOMETRY, supervision, chunk=4
    )
    (gradient,) = torch.autograd.grad(loss, forecast)

    exact = forecast.detach().double().requires_grad_()
    wide = query.double(), keys.double()
    rows = [
        naive_row(kind, supervision, *wide, exact[head, i], row, head, GEOMETRY, scale)
        for head in range(2)
        for i, row in enumerate(positions.tolist())
    ]
    expected = torch.stack(rows).mean()
    (expected_gradient,) = torch.autograd.grad(expected, exact)
    assert expected > 0.01
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(("kind", "supervision"), KINDS)
def test_chunk_size_does_not_matter(kind, supervision):
    query, keys, forecast = layer(1)
    positions = torch.arange(TOKENS)
    compressed = compress_keys(keys, 16, 8)
    results = []
    for chunk in (None, 1, 7, 64):
        leaf = forecast.clone().requires_grad_()
        teacher = LiveTeacher(kind, query, keys, positions, GEOMETRY, SCALE)
        loss = forecast_loss(
            leaf, teacher, compressed, positions, TOKENS, GEOMETRY, supervision, chunk
        )
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    for loss, gradient in results[1:]:
        torch.testing.assert_close(loss, results[0][0], rtol=2e-6, atol=0)
        torch.testing.assert_close(gradient, results[0][1], rtol=1e-3, atol=1e-8)


def test_stored_teacher_gives_what_the_live_one_gave():
    query, keys, forecast = layer(2)
    positions = torch.arange(100, TOKENS, 3)
    live = LiveTeacher("block-mass", query[:, positions], keys, positions, GEOMETRY, SCALE)
    stored = StoredTeacher(
        torch.cat([live.rows(0, 32), live.rows(32, len(positions))], 1), True, SCALE
    )
    compressed = compress_keys(keys, 16, 8)
    forecast = forecast[:, positions]
    arguments = (compressed, positions, TOKENS, GEOMETRY, "free", 32)
    torch.testing.assert_close(
        forecast_loss(forecast, live, *arguments), forecast_loss(forecast, stored, *arguments)
    )


def test_supervised_and_forced_blocks_are_those_of_the_policy():
    query, keys, _ = layer(3)
    positions = torch.arange(TOKENS)
    scores = LiveTeacher("query", query, keys, positions, GEOMETRY, SCALE).rows(0, TOKENS)
    free = best_free_blocks(pooled(scores, TOKENS, GEOMETRY), positions, GEOMETRY)
    blocks = torch.arange(GEOMETRY.num_blocks(TOKENS))
    visible = blocks <= (positions // 32).unsqueeze(-1)
    mine = free | (~GEOMETRY.free(positions, len(blocks)) & visible)
    policy = select_blocks(
        scores,
        positions,
        block_size=32,
        init_blocks=1,
        local_blocks=1,
        top_k=5,
        kernel_stride=8,
    )
    expected = torch.zeros_like(mine, dtype=torch.int32)
    expected.scatter_add_(-1, policy.clamp_min(0), (policy >= 0).int())
    assert torch.equal(mine, expected.bool())


def test_rows_without_a_choice_cost_nothing():
    query, keys, forecast = layer(4)
    positions = torch.arange(32)
    teacher = LiveTeacher("fine", query[:, positions], keys, positions, GEOMETRY, SCALE)
    for supervision in ("selected", "free"):
        leaf = forecast[:, positions].clone().requires_grad_()
        loss = forecast_loss(
            leaf, teacher, compress_keys(keys, 16, 8), positions, TOKENS, GEOMETRY, supervision
        )
        loss.backward()
        assert loss.abs() < 1e-6
        assert leaf.grad.isfinite().all()
