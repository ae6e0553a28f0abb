# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""How much memory a served model will take, and leave of a GPU's, told before it is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vllm_sparse.paths import hub_snapshot
from vllm_sparse.quantized import ItemBytes, described, item_bytes

# CUDA's context and libraries, captured graphs, logits, and what nobody thinks of.
_RESERVED_BYTES = 4 << 30


def left_bytes(config: Any, total_bytes: int) -> int:
    """Device memory that neither weights nor activations will take; may be negative.

    An estimate: what is loaded is known from the files, if they are on this machine, else from the
    model's shape.

    Args:
        config: vLLM's configuration; only parts that are known before anything is loaded.
        total_bytes: Of one device.
    """
    parallel = config.parallel_config
    ranks = parallel.tensor_parallel_size * parallel.pipeline_parallel_size
    usable = int(total_bytes * config.cache_config.gpu_memory_utilization)
    weights = weight_bytes(config.model_config) // ranks + _copied_bytes(config)
    return usable - weights - working_bytes(config)


def weight_bytes(model: Any) -> int:
    """Bytes of a model's weights on all ranks together; 16 bits each where nobody knows better.

    Args:
        model: vLLM's model configuration.
    """
    return _stored(model) or _weights_by_shape(model, item_bytes(model))


def least_weight_bytes(model: Any) -> int:
    """Bytes of a model's weights at least: 4 bits a number where nobody knows how many.

    Args:
        model: vLLM's model configuration.
    """
    each = item_bytes(model, min)
    return _stored(model) or _weights_by_shape(model, each) // (4 if each is None else 1)


def _copied_bytes(config: Any) -> int:
    """Bytes of a rank's weights beyond its share, where more ranks than KV heads copy these."""
    model, parallel = config.model_config, config.parallel_config
    ranks, total = parallel.tensor_parallel_size, model.get_total_num_kv_heads()
    copies = model.get_num_kv_heads(parallel) * ranks - total
    if copies <= 0:
        return 0
    layers = model.hf_text_config.num_hidden_layers // parallel.pipeline_parallel_size
    numbers = 2 * model.hf_text_config.hidden_size * copies * model.get_head_size() // ranks
    each = item_bytes(model)
    return int(layers * numbers * (each.attention if each else model.dtype.itemsize))


def mlp_widths(shape: Any) -> tuple[int, int]:
    """Width of an expert, or of a dense layer's MLP; and of the experts that all tokens share.

    Args:
        shape: The language model's part of the checkpoint's configuration, with attributes.
    """
    width = largest(getattr(shape, "moe_intermediate_size", None)) or _width(shape)
    named = ("shared_expert_intermediate_size", "shared_intermediate_size")
    shared = next((largest(found) for key in named if (found := getattr(shape, key, None))), 0)
    if shared and not getattr(shape, "num_local_experts", 1):  # dense Granite 4: no other MLP
        return shared, 0
    counted = ("n_shared_experts", "num_shared_expert")
    count = next((largest(found) for key in counted if (found := getattr(shape, key, None))), 0)
    return width, shared or width * count


def _stored(model: Any) -> int:
    """Bytes of a checkpoint's files, if all of them are on this machine; else 0.

    Some have their weights in a second form beside them. What vLLM packs as it loads is smaller
    than its files.
    """
    if getattr(model, "quantization", None) and not described(model):
        return 0
    folder = Path(model.model)
    if not folder.is_dir():
        folder = hub_snapshot(model.model, getattr(model, "revision", None)) or folder
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        files = [folder / name for name in set(named)]
        if not all(file.is_file() for file in files):
            return 0
    else:
        found = list(folder.glob("*.safetensors"))
        files = [file for file in found if not file.name.startswith("consolidated")] or found
    return sum(file.stat().st_size for file in files)


def _weights_by_shape(model: Any, each: ItemBytes | None) -> int:
    """Bytes of the weights of a Llama of this shape and its experts, without biases and norms.

    Args:
        model: vLLM's model configuration.
        each: Bytes of a number; ``None``: nobody knows, so those of the model's dtype.
    """
    shape = model.hf_text_config
    hidden, layers = shape.hidden_size, shape.num_hidden_layers
    heads = shape.num_attention_heads + model.get_total_num_kv_heads()
    width, shared = mlp_widths(shape)
    attention = 2 * hidden * heads * model.get_head_size()
    mlp = 3 * hidden * (width * max(1, model.get_num_experts()) + shared)
    embeddings = (1 if getattr(shape, "tie_word_embeddings", False) else 2) * shape.vocab_size
    plain = model.dtype.itemsize
    each = each or ItemBytes(plain, plain)
    layer = attention * each.attention + mlp * each.mlp
    return int(layers * layer + embeddings * hidden * plain)


def working_bytes(config: Any) -> int:
    """What computing the longest batch takes: a few copies of the widest activations.

    Args:
        config: vLLM's.
    """
    model, tokens = config.model_config, config.scheduler_config.max_num_batched_tokens
    shape = model.hf_text_config
    widest = 6 * shape.hidden_size + 3 * _width(shape)
    return int(tokens * widest * model.dtype.itemsize) + _RESERVED_BYTES


def mlp_bytes(config: Any) -> int:
    """What the longest batch surely takes at once on each rank, and nothing before it.

    The residual and a layer's gate and up projections; experts and attention only add to it.

    Args:
        config: vLLM's.
    """
    shape, ranks = config.model_config.hf_text_config, config.parallel_config.tensor_parallel_size
    numbers = getattr(shape, "hidden_size", 0) + 2 * _width(shape) // ranks
    tokens = config.scheduler_config.max_num_batched_tokens
    return int(tokens * numbers * config.model_config.dtype.itemsize)


def _width(shape: Any) -> int:
    return largest(getattr(shape, "intermediate_size", None)) or 4 * int(shape.hidden_size)


def largest(found: Any) -> int:
    """The largest number, where each layer has its own (Gemma 3n); 0 for none.

    Args:
        found: A number, a list of them, or ``None``.
    """
    return max(map(int, found), default=0) if isinstance(found, list) else int(found or 0)
