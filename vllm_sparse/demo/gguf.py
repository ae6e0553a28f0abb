# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Converts a GGUF file into a bfloat16 Hugging Face model directory.

Covers what the demo models need: the ``llama`` and ``qwen2`` architectures with tied embeddings
and a byte-level BPE tokenizer.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import torch
from gguf.quants import dequantize
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

if TYPE_CHECKING:
    from pathlib import Path

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}

_LAYER_MODULES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

# Written into config.json: without a version, transformers warns about the tokenizer's regex.
_TRANSFORMERS_VERSION = "5.19.0"

_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class UnsupportedGGUFError(ValueError):
    """The GGUF file is readable, but nothing this converter knows."""


class _Metadata:
    """The key-value section of a GGUF file."""

    def __init__(self, reader: gguf.GGUFReader) -> None:
        self._fields = {name: field.contents() for name, field in reader.fields.items()}
        self.architecture: str = self["general.architecture"]
        if self.architecture not in ARCHITECTURES:
            raise UnsupportedGGUFError(
                f"architecture {self.architecture!r}; supported: {', '.join(ARCHITECTURES)}"
            )

    def __getitem__(self, name: str) -> Any:
        try:
            return self._fields[name]
        except KeyError:
            raise UnsupportedGGUFError(f"metadata field {name!r} is missing") from None

    def get(self, name: str, default: Any = None) -> Any:
        return self._fields.get(name, default)

    def model(self, name: str) -> Any:
        """A field of the architecture's own section, such as ``block_count``."""
        return self[f"{self.architecture}.{name}"]

    @property
    def bos(self) -> int | None:
        return self.get("tokenizer.ggml.bos_token_id")

    @property
    def eos(self) -> int:
        return self["tokenizer.ggml.eos_token_id"]

    @property
    def pad(self) -> int:
        return self.get("tokenizer.ggml.padding_token_id", self.eos)


def convert(source: Path, target: Path) -> None:
    """Converts one model.

    Args:
        source: The GGUF file.
        target: An existing directory; weights, configuration and tokenizer are written into it.

    Raises:
        UnsupportedGGUFError: The architecture, the tokenizer or a tensor is unknown.
    """
    reader = gguf.GGUFReader(source)
    metadata = _Metadata(reader)
    weights = _weights(reader, metadata)
    vocab_size = weights["model.embed_tokens.weight"].shape[0]
    tokenizer = _tokenizer(metadata)

    weights_path = target / "model.safetensors"
    save_file(weights, weights_path, metadata={"format": "pt"})
    weights_path.chmod(0o644)  # safetensors leaves it readable by its owner only
    _write_json(target / "config.json", _config(metadata, vocab_size))
    _write_json(target / "generation_config.json", _generation_config(metadata))
    tokenizer.save(str(target / "tokenizer.json"))
    _write_json(target / "tokenizer_config.json", _tokenizer_config(metadata))
    if template := metadata.get("tokenizer.chat_template"):
        (target / "chat_template.jinja").write_text(template, encoding="utf-8")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _weights(reader: gguf.GGUFReader, metadata: _Metadata) -> dict[str, torch.Tensor]:
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    # The embeddings are tied. Some files hold a second copy for the output head, quantised
    # more finely than the first.
    embeddings = "output.weight" if "output.weight" in tensors else "token_embd.weight"
    weights = {"model.embed_tokens.weight": _dequantized(tensors[embeddings])}
    for name, tensor in tensors.items():
        if name not in ("token_embd.weight", "output.weight", "rope_freqs.weight"):
            weights[_hf_name(name)] = _unpermuted(name, _dequantized(tensor), metadata)
    return {name: weight.to(torch.bfloat16).contiguous() for name, weight in weights.items()}


def _dequantized(tensor: gguf.ReaderTensor) -> torch.Tensor:
    return torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), np.float32))


def _hf_name(name: str) -> str:
    if name == "output_norm.weight":
        return "model.norm.weight"
    match name.split("."):
        case ["blk", layer, module, ("weight" | "bias") as kind] if module in _LAYER_MODULES:
            return f"model.layers.{layer}.{_LAYER_MODULES[module]}.{kind}"
    raise UnsupportedGGUFError(f"tensor {name!r} is unknown")


def _unpermuted(name: str, weight: torch.Tensor, metadata: _Metadata) -> torch.Tensor:
    """Undoes the interleaving of rotary halves in a llama file's query and key projections."""
    counts = {".attn_q.": "attention.head_count", ".attn_k.": "attention.head_count_kv"}
    for part, count in counts.items():
        if metadata.architecture == "llama" and part in name:
            heads = metadata.model(count)
            pairs = weight.reshape(heads, weight.shape[0] // heads // 2, 2, *weight.shape[1:])
            return pairs.swapaxes(1, 2).reshape(weight.shape)
    return weight


def _config(metadata: _Metadata, vocab_size: int) -> dict[str, Any]:
    config = {
        "architectures": [ARCHITECTURES[metadata.architecture]],
        "model_type": metadata.architecture,
        "attention_dropout": 0.0,
        "bos_token_id": metadata.bos,
        "eos_token_id": metadata.eos,
        "pad_token_id": metadata.pad,
        "hidden_act": "silu",
        "hidden_size": metadata.model("embedding_length"),
        "intermediate_size": metadata.model("feed_forward_length"),
        "max_position_embeddings": metadata.model("context_length"),
        "num_attention_heads": metadata.model("attention.head_count"),
        "num_hidden_layers": metadata.model("block_count"),
        "num_key_value_heads": metadata.model("attention.head_count_kv"),
        # Stored in float32: 1e-05 would read 9.999999747378752e-06.
        "rms_norm_eps": round(metadata.model("attention.layer_norm_rms_epsilon"), 9),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": metadata.model("rope.freq_base"),
        },
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": _TRANSFORMERS_VERSION,
        "use_cache": True,
        "vocab_size": vocab_size,
    }
    if metadata.architecture == "llama":
        config |= {"attention_bias": False, "mlp_bias": False}
        config["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
    else:
        config["use_sliding_window"] = False
    return config


def _generation_config(metadata: _Metadata) -> dict[str, Any]:
    eos = [metadata.eos]
    tokens = metadata["tokenizer.ggml.tokens"]
    if metadata.architecture == "qwen2" and "<|endoftext|>" in tokens:
        eos.append(tokens.index("<|endoftext|>"))
    return {
        "bos_token_id": metadata.bos,
        "eos_token_id": eos,
        "pad_token_id": metadata.pad,
        "do_sample": False,
    }


def _tokenizer_config(metadata: _Metadata) -> dict[str, Any]:
    tokens = metadata["tokenizer.ggml.tokens"]
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "eos_token": tokens[metadata.eos],
        "model_max_length": metadata.model("context_length"),
        "pad_token": tokens[metadata.pad],
    }
    if metadata.architecture != "qwen2" and metadata.bos is not None:
        config["bos_token"] = tokens[metadata.bos]
    return config


def _tokenizer(metadata: _Metadata) -> Tokenizer:
    if metadata["tokenizer.ggml.model"] != "gpt2":
        raise UnsupportedGGUFError(f"tokenizer {metadata['tokenizer.ggml.model']!r}")
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    types = [gguf.TokenType(value) for value in metadata["tokenizer.ggml.token_type"]]
    added = [
        index
        for index, kind in enumerate(types)
        if kind in (gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED)
    ]
    # Qwen2's special tokens follow its vocabulary; SmolLM2's are part of it.
    in_vocabulary = {gguf.TokenType.NORMAL}
    if metadata.architecture == "llama":
        in_vocabulary |= {gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED}
    tokenizer = Tokenizer(
        models.BPE(
            vocab={
                token: index
                for index, (token, kind) in enumerate(zip(tokens, types, strict=True))
                if kind in in_vocabulary
            },
            merges=[tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]],
        )
    )
    _set_pre_tokenizer(tokenizer, metadata["tokenizer.ggml.pre"])
    tokenizer.decoder = decoders.ByteLevel()
    for index in added:
        special = types[index] == gguf.TokenType.CONTROL
        tokenizer.add_tokens([AddedToken(tokens[index], special=special, normalized=False)])
        if tokenizer.token_to_id(tokens[index]) != index:
            raise UnsupportedGGUFError(f"token {tokens[index]!r} cannot keep its id {index}")
    return tokenizer


def _set_pre_tokenizer(tokenizer: Tokenizer, kind: str) -> None:
    split: pre_tokenizers.PreTokenizer
    if kind == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
        split = pre_tokenizers.Split(Regex(_QWEN2_SPLIT), "isolated")
        by_regex = False
    elif kind == "smollm":
        split = pre_tokenizers.Digits(individual_digits=True)
        by_regex = True
    else:
        raise UnsupportedGGUFError(f"pre-tokenizer {kind!r}")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=by_regex)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
