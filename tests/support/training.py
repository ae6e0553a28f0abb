# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Tiny frozen models and training runs on them."""

from __future__ import annotations

import torch
from transformers import GraniteConfig, GraniteModel, LlamaConfig, LlamaModel

from vllm_sparse.training.backbone import Backbone
from vllm_sparse.training.forecast import Forecast
from vllm_sparse.training.geometry import BlockGeometry
from vllm_sparse.training.samples import CachedSource, SampleSource
from vllm_sparse.training.settings import TrainSettings
from vllm_sparse.training.trainer import Trainer

GEOMETRY = BlockGeometry(block_size=32, kernel_stride=8, init_blocks=1, local_blocks=1, top_k=5)
TOKENS = 300
SETTINGS = {
    "block_size": 32,
    "kernel_stride": 8,
    "local_blocks": 1,
    "top_k": 5,
    "seq_len": 256,
    "batch_size": 2,
    "steps": 4,
    "lr": 5e-3,
    "dtype": "float32",
}
KINDS = [
    (kind, supervision)
    for kind in ("fine", "query", "block-mass")
    for supervision in ("selected", "free")
]


def config(kind=LlamaConfig, **changes):
    """A model of three layers, 4 query and 2 KV heads of size 16."""
    values = {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 1024,
        # Peaked attention, or there is nothing to learn.
        "initializer_range": 0.2,
        **changes,
    }
    return kind(**values)


def backbone(kind=(LlamaConfig, LlamaModel), seed=0, **changes):
    """A frozen random model."""
    torch.manual_seed(seed)
    return Backbone(kind[1](config(kind[0], **changes)), "tiny")


def scaled_backbones():
    """A model whose logits are scaled by 1/64, and the same one scaled by ``1 / sqrt(16)``.

    The queries of the second one make up for it, by a power of two, so that both are equal.
    """
    models = []
    for multiplier in (1 / 64, 1 / 4):
        torch.manual_seed(0)
        # Logits are peaked in spite of the small scale.
        changes = {"attention_multiplier": multiplier, "initializer_range": 0.6}
        models.append(GraniteModel(config(GraniteConfig, **changes)))
    with torch.no_grad():
        for layer in models[1].layers:
            layer.self_attn.q_proj.weight.div_(16)
    return [Backbone(model, "tiny") for model in models]


def sequences(count=5, tokens=256):
    """Random token ids."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 64, (count, tokens), generator=generator, dtype=torch.int32)


def trainer(folder, data=None, frozen=None, cache=None, **changes):
    """A trainer on a tiny model."""
    settings = TrainSettings(**{**SETTINGS, **changes})
    frozen = frozen or backbone()
    source = SampleSource(
        frozen,
        settings.geometry,
        settings.teacher,
        settings.queries,
        settings.tail_queries,
        settings.sparse_forward,
        settings.chunk,
        settings.seed,
    )
    if cache:
        source = CachedSource(source, cache)
    forecast = Forecast(3, 64, 2, 16, settings.bias)
    forecast.initialise(settings.init, frozen, settings.seed)
    tokens = sequences() if data is None else data
    return Trainer(settings, frozen, forecast, source, tokens, folder)
