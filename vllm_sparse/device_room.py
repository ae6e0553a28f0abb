# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""How much memory a served model will take, and leave of a GPU's, told before it is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# CUDA's context and libraries, captured graphs, logits, and what nobody thinks of.
_RESERVED_BYTES = 4 << 30
_MXFP4_BYTES = 17 / 32  # of a number: 4 bits, and 8 for each 32 numbers


def left_bytes(config: Any, total_bytes: int) -> int:
    """Device memory that neither weights nor activations will take; may be negative.

    An estimate: what is loaded is known from the files of a local model, else from its shape.

    Args:
        config: vLLM's configuration; only parts that are known before anything is loaded.
        total_bytes: Of one device.
    """
    parallel = config.parallel_config
    ranks = parallel.tensor_parallel_size * parallel.pipeline_parallel_size
    usable = int(total_bytes * config.cache_config.gpu_memory_utilization)
    return usable - weight_bytes(config.model_config) // ranks - working_bytes(config)


def weight_bytes(model: Any) -> int:
    """Bytes of a model's weights on all ranks together.

    Args:
        model: vLLM's model configuration.
    """
    return _stored(model) or _weights_by_shape(model)


def least_weight_bytes(model: Any) -> int:
    """As :func:`weight_bytes`, but not more than it may be: 4 bits a number where unknown.

    Args:
        model: vLLM's model configuration.
    """
    packed = getattr(model, "quantization", None) and not _has_mxfp4(model)
    parts = 4 if packed else 1
    return _stored(model) or _weights_by_shape(model) // parts


def _stored(model: Any) -> int:
    """Bytes of a local model's files; some have their weights in a second form beside them."""
    files = list(Path(model.model).glob("*.safetensors"))
    first = [file for file in files if not file.name.startswith("consolidated")]
    return sum(file.stat().st_size for file in first or files)


def _weights_by_shape(model: Any) -> int:
    """As of a Llama; experts count, biases and norms do not."""
    shape = model.hf_text_config
    hidden, layers = shape.hidden_size, shape.num_hidden_layers
    heads = shape.num_attention_heads + model.get_total_num_kv_heads()
    experts = max(1, model.get_num_experts())
    width = getattr(shape, "moe_intermediate_size", None) or _width(shape)
    attention = 2 * hidden * heads * model.get_head_size()
    embeddings = (1 if getattr(shape, "tie_word_embeddings", False) else 2) * shape.vocab_size
    whole = layers * attention + embeddings * hidden
    item = model.dtype.itemsize
    of_experts = _MXFP4_BYTES if _has_mxfp4(model) else item
    return int(whole * item + layers * 3 * hidden * width * experts * of_experts)


def _has_mxfp4(model: Any) -> bool:
    """Whether experts are stored in it, and nothing else (gpt-oss)."""
    return "mxfp4" in str(getattr(model, "quantization", None))


def working_bytes(config: Any) -> int:
    """What computing the longest batch takes: a few copies of the widest activations.

    Args:
        config: As of :func:`left_bytes`.
    """
    model, tokens = config.model_config, config.scheduler_config.max_num_batched_tokens
    shape = model.hf_text_config
    widest = 6 * shape.hidden_size + 3 * _width(shape)
    return int(tokens * widest * model.dtype.itemsize) + _RESERVED_BYTES


def _width(shape: Any) -> int:
    return int(getattr(shape, "intermediate_size", 4 * shape.hidden_size))
