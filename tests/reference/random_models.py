# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Random checkpoints of several architectures, and random Forecasts for them.

How vLLM 0.32 loads a folder of :func:`save_random_minicpm` offline: the architecture
MiniCPMForCausalLM picks its own ``minicpm.py``, but transformers has no config class for
``model_type: "minicpm"``. Either

- ``trust_remote_code=True``: ``auto_map`` points at the ``configuration_minicpm.py`` in the folder,
  as in the published checkpoints. Only the config class is run, from a copy under HF_MODULES_CACHE,
  which must be writable; the model is vLLM's; or
- ``model_type: "llama"`` in config.json (``save_random_minicpm(..., model_type="llama")``): the
  Llama config class keeps the additional attributes. Nothing needs to be trusted; or
- ``AutoConfig.register("minicpm", cls)`` in each process before the model config is built. A vLLM
  plugin is early enough: vLLM calls it when the engine arguments are created. With transformers 5
  ``cls`` must declare ``max_position_embeddings: int`` (see CONFIGURATION_MINICPM below).

Without one of them vLLM fails with an error about custom code or an unknown model type.

What vLLM's model reads from the config: vocab_size, hidden_size, intermediate_size, hidden_act,
num_hidden_layers, num_attention_heads, num_key_value_heads (the head size is hidden_size /
num_attention_heads), max_position_embeddings, rms_norm_eps, rope_parameters, tie_word_embeddings,
scale_emb, scale_depth, dim_model_base, and num_experts and hidden_act_param if present.
"""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GraniteConfig,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
)

ARCHITECTURES = ("llama", "qwen2", "qwen3", "mistral", "minicpm")
# A third of what heads of 32 would have; the published ones have 1 / 64 for heads of 64.
GRANITE_SCALE = 0.06
SINKS_STD = 4.0


def save_random_model(
    path,
    arch="llama",
    *,
    layers=3,
    hidden=None,
    heads=8,
    kv_heads=2,
    head_dim=32,
    vocab=1024,
    seed=0,
    std=0.1,
    max_position_embeddings=4096,
):
    """Write a random float32 checkpoint that Hugging Face and vLLM load; returns ``path``.

    Of ``ARCHITECTURES``, granite, qwen3_moe or gemma3. ``hidden`` defaults to 128, for qwen2,
    minicpm and granite to ``heads * head_dim``: vLLM derives their head size from it. Granite
    multiplies logits with ``GRANITE_SCALE``. Layers of a Gemma 3 but the first and the last have
    windows of 128 tokens.
    """
    if hidden is None:
        hidden = heads * head_dim if arch in ("qwen2", "minicpm", "granite") else 128
    if arch in ("qwen2", "minicpm") and hidden != heads * head_dim:
        raise ValueError(f"{arch} needs hidden == heads * head_dim, got {hidden}")
    if arch == "minicpm":
        return save_random_minicpm(
            path, layers=layers, heads=heads, kv_heads=kv_heads, head_dim=head_dim, vocab=vocab,
            seed=seed, std=std, max_position_embeddings=max_position_embeddings,
        )  # fmt: skip
    sizes = _sizes(layers, hidden, heads, kv_heads, vocab, max_position_embeddings)
    if arch not in ("qwen2", "granite"):
        sizes["head_dim"] = head_dim
    kinds = ["full_attention", *["sliding_attention"] * (layers - 2), "full_attention"]
    further = {
        "qwen3_moe": {
            "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": hidden,
        },
        "mistral": {"sliding_window": None},
        "granite": {"attention_multiplier": GRANITE_SCALE},
        "gemma3": {
            "layer_types": kinds, "sliding_window": 128, "query_pre_attn_scalar": head_dim,
        },
    }  # fmt: skip
    name = "gemma3_text" if arch == "gemma3" else arch
    model = _random(name, {**sizes, **further.get(arch, {})}, seed, std)
    if arch == "gemma3":
        _count_norms_from_one(model)
    model.save_pretrained(path)
    return path


def save_copied_heads(path, model, kv_heads):
    """Write a checkpoint whose KV heads are those of ``model``, each several times; ``path``."""
    config = AutoConfig.from_pretrained(model)
    copies, dim = kv_heads // config.num_key_value_heads, config.head_dim
    config.num_key_value_heads = kv_heads
    weights = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).state_dict()
    for name, weight in weights.items():
        if "k_proj" in name or "v_proj" in name:
            heads = weight.unflatten(0, (-1, dim)).repeat_interleave(copies, 0)
            weights[name] = heads.flatten(0, 1)
    copied = AutoModelForCausalLM.from_config(config).to(torch.float32)
    copied.load_state_dict(weights)
    copied.save_pretrained(path)
    return path


def save_random_hybrid(path, state=16):
    """Write a random float32 Granite 4 H, three Mamba-2 layers and one of attention; ``path``."""
    own = {
        "intermediate_size": 256, "shared_intermediate_size": 256, "num_local_experts": 0,
        "layer_types": ["linear_attention", "full_attention", *["linear_attention"] * 2],
        "mamba_n_heads": 16, "mamba_d_state": state, "mamba_chunk_size": 64,
        "attention_multiplier": GRANITE_SCALE,
    }  # fmt: skip
    _random("granitemoehybrid", {**_sizes(4, 256), **own}).save_pretrained(path)
    return path


def save_random_delta_net(path):
    """Write a random bfloat16 Qwen3-Next: gated delta nets beside gated attention; ``path``.

    vLLM's CPU kernels of delta nets take bfloat16 and heads of 128, and its model wants one layer
    of experts. Every token has both experts, so that rounding cannot choose others.
    """
    own = {
        "layer_types": ["linear_attention", "full_attention"] * 2, "head_dim": 64,
        "linear_num_key_heads": 1, "linear_num_value_heads": 1,
        "linear_key_head_dim": 128, "linear_value_head_dim": 128,
        "num_experts": 2, "num_experts_per_tok": 2, "mlp_only_layers": [0, 1, 2],
        "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64,
    }  # fmt: skip
    model = _random("qwen3_next", {**_sizes(4, 128), **own})
    _count_norms_from_one(model, but="linear_attn")
    model.to(torch.bfloat16).save_pretrained(path)
    return path


def _count_norms_from_one(model, but="-"):
    """For norms that multiply with one plus their weights."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and but not in name:
                parameter.sub_(1.0)


def save_random_gpt_oss(path):
    """Write a random float32 gpt-oss: learned sinks, every other layer windowed; ``path``.

    Every token has both experts, so that rounding cannot choose others. Sinks are as large as
    logits become, some heads' take most of their weight.
    """
    own = {
        "intermediate_size": 128, "head_dim": 64, "sliding_window": 128,
        "num_local_experts": 2, "num_experts_per_tok": 2,
    }  # fmt: skip
    model = _random("gpt_oss", {**_sizes(4, 128), **own}, std=0.1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "sinks" in name:
                parameter.mul_(SINKS_STD / 0.1)
    model.save_pretrained(path)
    return path


def save_random_listener(path, text):
    """Write a Qwen2-Audio that reads text as the Qwen2 in folder ``text`` does; ``path``."""
    encoder = {
        "model_type": "qwen2_audio_encoder", "d_model": 32, "encoder_layers": 1,
        "encoder_attention_heads": 2, "encoder_ffn_dim": 64, "num_mel_bins": 16,
        "max_source_positions": 8,
    }  # fmt: skip
    reader = AutoModelForCausalLM.from_pretrained(text, dtype=torch.float32)
    config = Qwen2AudioConfig(
        audio_config=encoder, text_config=reader.config.to_dict(), dtype="float32",
        architectures=["Qwen2AudioForConditionalGeneration"],
    )  # fmt: skip
    model = Qwen2AudioForConditionalGeneration(config)
    _randomise(model, seed=0, std=0.1)
    config.save_pretrained(path)
    weights = {f"language_model.{name}": part for name, part in reader.state_dict().items()}
    for name, part in model.model.state_dict().items():
        if not name.startswith("language_model."):
            weights[name] = part
    # Hugging Face would name them in a way that vLLM's model does not know.
    save_file(weights, Path(path) / "model.safetensors", metadata={"format": "pt"})
    return path


def _sizes(layers, hidden, heads=8, kv_heads=2, vocab=1024, max_position_embeddings=4096):
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": max_position_embeddings,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }


def _random(kind, options, seed=0, std=0.1):
    """A float32 model of one of Hugging Face's kinds."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **options))
    _randomise(model, seed, std)
    return model.to(torch.float32)


def _randomise(model, seed, std):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator) * std
            parameter.copy_(1.0 + noise if "norm" in name else noise)


# Like the published class: the attributes come before the call of the base class, which reads
# max_position_embeddings when it converts rope_theta and rope_scaling to rope_parameters.
CONFIGURATION_MINICPM = """\
from transformers.configuration_utils import PretrainedConfig


class MiniCPMConfig(PretrainedConfig):
    model_type = "minicpm"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self, max_position_embeddings=65536, rope_theta=10000.0, rope_scaling=None, **kwargs
    ):
        self.max_position_embeddings = max_position_embeddings
        self.rope_theta = rope_theta
        self.rope_scaling = rope_scaling
        super().__init__(**kwargs)
"""


def save_random_minicpm(
    path,
    *,
    layers=4,
    heads=8,
    kv_heads=2,
    head_dim=32,
    vocab=1024,
    seed=0,
    std=0.1,
    max_position_embeddings=4096,
    model_type="minicpm",
    scale_emb=12.0,
    scale_depth=1.4,
    dim_model_base=None,
):
    """Write a random checkpoint like MiniCPM4.1; returns ``path``. See the module's docstring.

    ``model_type="llama"`` makes a folder that vLLM loads without ``trust_remote_code``.
    ``dim_model_base`` defaults to a quarter of the hidden size.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    hidden = heads * head_dim
    # Rises from about 1 like the published factors, which end near 126 for 64 frequencies.
    factors = [round(126.0 ** (k / (head_dim // 2)) * 0.9982, 6) for k in range(head_dim // 2)]
    config = {
        **_sizes(layers, hidden, heads, kv_heads, vocab, max_position_embeddings),
        "architectures": ["MiniCPMForCausalLM"],
        "model_type": model_type,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": {
            "rope_type": "longrope",
            "short_factor": factors,
            "long_factor": factors,
            "original_max_position_embeddings": max_position_embeddings,
        },
        "scale_emb": scale_emb,
        "scale_depth": scale_depth,
        "dim_model_base": hidden // 4 if dim_model_base is None else dim_model_base,
        "attention_bias": False,
        "use_cache": True,
        "dtype": "float32",
    }
    if model_type == "minicpm":
        config["auto_map"] = {"AutoConfig": "configuration_minicpm.MiniCPMConfig"}
        (path / "configuration_minicpm.py").write_text(CONFIGURATION_MINICPM)
    (path / "config.json").write_text(json.dumps(config, indent=1))
    model = AutoModelForCausalLM.from_config(granite_config(config)).to(torch.float32)
    _randomise(model, seed, std)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


def granite_config(config):
    """The Granite with the arithmetic of a MiniCPM ``config``."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "hidden_act",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
        "rms_norm_eps",
        "tie_word_embeddings",
    )
    return GraniteConfig(
        **{name: config[name] for name in names},
        rope_parameters={"rope_theta": config["rope_theta"], **config["rope_scaling"]},
        embedding_multiplier=config["scale_emb"],
        residual_multiplier=config["scale_depth"] / math.sqrt(config["num_hidden_layers"]),
        logits_scaling=hidden / config["dim_model_base"],
        attention_multiplier=(hidden // heads) ** -0.5,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


def save_random_forecast(path, model_dir, seed=0, std=0.1, bias=False, **metadata):
    """Write random Forecast weights for the checkpoint in ``model_dir``; returns ``path``."""
    config = json.loads((Path(model_dir) / "config.json").read_text())
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    shape = (config["num_key_value_heads"] * head_dim, hidden)
    generator = torch.Generator().manual_seed(seed)
    weights = {"model.layers.0.self_attn.q_curr_proj.weight": None}
    for layer in range(config["num_hidden_layers"]):
        weights[f"model.layers.{layer}.self_attn.q_future_proj.weight"] = None
    for name in weights:
        weights[name] = torch.randn(shape, generator=generator) * std
    if bias:
        for name in list(weights):
            noise = torch.randn(shape[0], generator=generator)
            weights[name.replace("weight", "bias")] = noise
    save_file(weights, path, metadata={"format": "pt", **{k: str(v) for k, v in metadata.items()}})
    return path
