# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The frozen model: what its taps see, that they change nothing, and which models are refused."""

from __future__ import annotations

import json
import math

import pytest
import torch
from support.training import config, sequences
from transformers import (
    LlamaConfig,
    LlamaModel,
    MistralConfig,
    MistralModel,
    Qwen2Config,
    Qwen2Model,
    Qwen3Config,
    Qwen3Model,
)

from vllm_sparse.errors import ConfigError, UnsupportedError
from vllm_sparse.training.backbone import Backbone

MODELS = [
    pytest.param((LlamaConfig, LlamaModel), id="llama"),
    pytest.param((MistralConfig, MistralModel), id="mistral"),
    pytest.param((Qwen2Config, Qwen2Model), id="qwen2"),
    pytest.param((Qwen3Config, Qwen3Model), id="qwen3"),
]


@pytest.mark.parametrize("kind", MODELS)
def test_tap_leaves_the_model_unchanged_and_sees_its_attention(kind):
    changes = {"sliding_window": None} if kind[0] is MistralConfig else {}
    torch.manual_seed(0)
    model = kind[1](config(kind[0], **changes)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "norm.weight")):
            torch.nn.init.normal_(parameter, 1.0, 0.2)
    tokens = sequences(1, 96)[0].long()
    with torch.no_grad():
        expected = model(tokens[None], use_cache=False).last_hidden_state
        tapped = Backbone(model, "tiny")
        tapped.check_rope()
        after = model(tokens[None], use_cache=False).last_hidden_state
    torch.testing.assert_close(after, expected)
    views = []
    tapped.run(tokens, views.append)
    assert [view.layer for view in views] == [0, 1, 2]
    for view in views:
        again = tapped.project_query(view.layer, view.inputs, view.cos, view.sin)
        torch.testing.assert_close(again, view.query)
        assert view.keys.shape == (2, 96, 16)


def test_minicpm_is_loaded_as_the_llama_that_it_equals(tmp_path):
    torch.manual_seed(0)
    model = LlamaModel(config())
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    values.update(model_type="minicpm", scale_emb=12, scale_depth=1.4)
    (tmp_path / "config.json").write_text(json.dumps(values))
    loaded = Backbone.load(str(tmp_path), "float32")
    assert loaded.name == tmp_path.name
    views = []
    tokens = sequences(1, 40)[0].long()
    loaded.run(tokens, views.append)
    hidden = 12 * model.embed_tokens(tokens[None])
    tables = model.rotary_emb(hidden, torch.arange(40)[None])
    first = model.layers[0]
    with torch.no_grad():
        seen = first.input_layernorm(hidden)
        torch.testing.assert_close(views[0].inputs, seen[0])
        mask = torch.full((40, 40), -torch.inf).triu(1)[None, None]
        attended, _ = first.self_attn(seen, position_embeddings=tables, attention_mask=mask)
        hidden = hidden + attended * (1.4 / math.sqrt(3))
        grown = first.mlp(first.post_attention_layernorm(hidden))
        hidden = hidden + grown * (1.4 / math.sqrt(3))
        torch.testing.assert_close(views[1].inputs, model.layers[1].input_layernorm(hidden)[0])


def test_unsupported_models_are_refused():
    with pytest.raises(UnsupportedError, match=r"no decoder with layers\[i\]"):
        Backbone(torch.nn.Linear(2, 2), "linear")
    sliding = config(
        Qwen2Config,
        use_sliding_window=True,
        sliding_window=8,
        max_window_layers=1,
    )
    with pytest.raises(UnsupportedError, match="sliding_attention"):
        Backbone(Qwen2Model(sliding), "sliding")
    odd = LlamaModel(config())
    odd.layers[1].self_attn.k_proj = torch.nn.Linear(64, 24)
    with pytest.raises(UnsupportedError, match="layer 1's k_proj gives 24 values"):
        Backbone(odd, "odd")
    with pytest.raises(ConfigError, match="cannot load the model"):
        Backbone.load("/no/such/model")


def test_sequences_that_the_model_cannot_read_are_refused():
    frozen = Backbone(LlamaModel(config(max_position_embeddings=64)), "small")
    known = frozen.model.get_input_embeddings().num_embeddings
    frozen.check_sequences(torch.tensor([[0, known - 1] * 32]))
    with pytest.raises(ConfigError, match="66 tokens are more than the 64 positions of small"):
        frozen.check_sequences(torch.zeros(1, 66).int())
    for wrong in (known, -1):
        with pytest.raises(ConfigError, match=f"but small knows 0 to {known - 1}"):
            frozen.check_sequences(torch.tensor([[0, wrong]]))


def test_windows_that_cut_a_sequence_are_refused():
    """Configurations without kinds of layers say so nowhere else."""
    from transformers import MistralConfig, MistralModel

    frozen = Backbone(MistralModel(config(MistralConfig, sliding_window=16)), "windowed")
    frozen.model(input_ids=torch.arange(16)[None])
    with pytest.raises(UnsupportedError, match="layer 0 attends with sliding_window"):
        frozen.model(input_ids=torch.arange(17)[None])


def test_a_model_with_another_rope_is_another_one():
    """Its keys and teachers are; nothing of its weights says so."""

    def fingerprint(theta):
        torch.manual_seed(0)
        parameters = {"rope_type": "default", "rope_theta": theta}
        return Backbone(LlamaModel(config(rope_parameters=parameters)), "m").fingerprint()

    assert fingerprint(1e4) == fingerprint(1e4) != fingerprint(1e6)
