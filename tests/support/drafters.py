# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Checkpoints of drafters with layers: ones that know their model, and ones that know nothing.

An EAGLE head reads at each position the *next* token's embedding beside the model's hidden state.
One that ignores the hidden state and has the weights of a model of one layer says what the model
says, but for the first token, which it never sees. So its drafts are accepted if its keys and
values are where it looks for them.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from pathlib import Path

DRAFTS = 3


def drafts(path: Path | None, method: str, count: int = DRAFTS) -> dict[str, Any]:
    """The ``speculative_config`` of a drafter."""
    drafter = {} if path is None else {"model": str(path)}
    return {**drafter, "method": method, "num_speculative_tokens": count}


def save_knowing_eagle(path: Path, model: Path) -> Path:
    """Write the EAGLE head that is a Llama of one layer, which it changes; returns ``path``.

    The head has no norm before its layer and none behind it. So the model's embeddings get a root
    mean square of one, and its last norm no weights.
    """
    config, weights = _read(model)
    assert config["num_hidden_layers"] == 1
    embedded = weights["model.embed_tokens.weight"]
    embedded /= embedded.square().mean(1, keepdim=True).sqrt()
    weights["model.norm.weight"].fill_(1.0)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    layer = _layer(weights, 0)
    before = layer.pop("input_layernorm.weight")
    for name in ("q_proj", "k_proj", "v_proj"):
        layer[f"self_attn.{name}.weight"] = layer[f"self_attn.{name}.weight"] * before
    size = config["hidden_size"]
    head = {f"layers.0.{name}": weight for name, weight in layer.items()}
    head["fc.weight"] = torch.cat((torch.eye(size), torch.zeros(size, size)), 1)
    head["embed_tokens.weight"] = embedded
    return _write(path, config, head)


def save_eagle3(path: Path, model: Path) -> Path:
    """Write an EAGLE-3 head of a Llama that knows nothing of it; returns ``path``."""
    config, weights = _read(model)
    size, generator = config["hidden_size"], torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return 0.1 * torch.randn(shape, generator=generator)

    head = {f"midlayer.{name}": weight for name, weight in _layer(weights, 0).items()}
    for name in ("q_proj", "k_proj", "v_proj"):  # of the next token and of what the model thinks
        key = f"midlayer.self_attn.{name}.weight"
        head[key] = random(head[key].shape[0], 2 * size)
    for name in ("midlayer.hidden_norm", "norm"):
        head[f"{name}.weight"] = torch.ones(size)
    head["fc.weight"] = random(size, 3 * size)
    head["lm_head.weight"] = weights["lm_head.weight"]
    changes = {"architectures": ["LlamaForCausalLMEagle3"], "num_hidden_layers": 1}
    return _write(path, {**config, **changes, "draft_vocab_size": config["vocab_size"]}, head)


def save_mimo(path: Path, model: Path) -> Path:
    """Write a Qwen2 with a layer that predicts one token more, and knows nothing; ``path``."""
    config, weights = _read(model)
    size, generator = config["hidden_size"], torch.Generator().manual_seed(1)
    more = {f"model.mtp_layers.0.{name}": weight for name, weight in _layer(weights, 0).items()}
    for name in ("token_layernorm", "hidden_layernorm", "final_layernorm"):
        more[f"model.mtp_layers.0.{name}.weight"] = torch.ones(size)
    mixed = 0.1 * torch.randn(size, 2 * size, generator=generator)
    more["model.mtp_layers.0.input_proj.weight"] = mixed
    changes = {"architectures": ["MiMoForCausalLM"], "num_nextn_predict_layers": 1}
    return _write(path, {**config, **changes}, {**weights, **more})


def _read(model: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    config = json.loads((model / "config.json").read_text())
    return config, load_file(model / "model.safetensors")


def _layer(weights: dict[str, torch.Tensor], layer: int) -> dict[str, torch.Tensor]:
    prefix = f"model.layers.{layer}."
    return {
        name.removeprefix(prefix): weight.clone()
        for name, weight in weights.items()
        if name.startswith(prefix)
    }


def _write(path: Path, config: dict[str, Any], weights: dict[str, torch.Tensor]) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    contiguous = {name: weight.contiguous() for name, weight in weights.items()}
    save_file(contiguous, path / "model.safetensors", metadata={"format": "pt"})
    return path
