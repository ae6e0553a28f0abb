# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The first weights of a Forecast."""

from __future__ import annotations

import torch
from support.training import backbone, config, sequences
from transformers import Qwen2Config, Qwen2Model

from vllm_sparse.training.backbone import Backbone
from vllm_sparse.training.forecast import Forecast


def test_lookahead_start_is_the_group_mean_of_the_next_query():
    frozen = backbone((Qwen2Config, Qwen2Model))
    for layer_index in range(3):
        torch.nn.init.normal_(frozen.projection(layer_index, "q_proj").bias)
    views = []
    frozen.run(sequences()[0], views.append)
    forecast = Forecast(3, 64, 2, 16, bias=True)
    forecast.initialise("lookahead", frozen, 0)
    for view, source in ((views[0], views[0]), (views[1], views[0]), (views[2], views[1])):
        query = frozen.project_query(view.layer, source.inputs, view.cos, view.sin)
        mine = forecast(view.layer, source.inputs, view.cos, view.sin)
        torch.testing.assert_close(mine, query.unflatten(0, (2, 2)).mean(1))


def test_lookahead_start_without_a_bias_has_it_folded_in():
    torch.manual_seed(0)
    model = Qwen2Model(config(Qwen2Config))
    # As in trained models, every hidden state has much in common.
    model.embed_tokens.weight.data += 20 * torch.randn(64)
    frozen = Backbone(model, "tiny")
    for layer_index in range(3):
        torch.nn.init.normal_(frozen.projection(layer_index, "q_proj").bias, std=5)
    text, other = sequences()[:2]
    views = []
    frozen.run(other, views.append)
    errors = []
    for start in (None, text):
        forecast = Forecast(3, 64, 2, 16)
        forecast.initialise("lookahead", frozen, 0, start)
        query = frozen.project_query(1, views[0].inputs, views[1].cos, views[1].sin)
        mine = forecast(1, views[0].inputs, views[1].cos, views[1].sin)
        errors.append((mine - query.unflatten(0, (2, 2)).mean(1)).norm() / query.norm())
    assert errors[1] < 0.1 * errors[0]


def test_uniform_start_is_bounded_and_seeded():
    weights = []
    for seed in (0, 0, 1):
        forecast = Forecast(3, 64, 2, 16)
        forecast.initialise("uniform", backbone(), seed)
        weights.append(forecast.projections[1].weight.detach())
    assert weights[0].abs().max() <= 1 / 8
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
