# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Combinations that would give wrong answers are refused when vLLM starts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_sparse.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Iterator


def unsupported(config: Any) -> Iterator[str]:
    """What none of our backends can serve.

    Args:
        config: vLLM's configuration.

    Yields:
        A reason and what to do.
    """
    model = config.model_config
    if model.use_mla:
        yield "MLA models have one latent vector per token and no KV heads; use a GQA model"
    if not model.is_attention_free and model.runner_type != "generate":
        yield f"{model.runner_type} models do not decode; leave out --attention-backend"
    if model.is_hybrid:
        yield "models with recurrent state layers have another cache layout"
    if str(config.cache_config.cache_dtype) not in ("auto", "bfloat16", "float16"):
        yield (
            f"--kv-cache-dtype {config.cache_config.cache_dtype}: quantised KV caches are packed "
            "differently; use auto"
        )
    if config.speculative_config is not None:
        yield "speculative decoding verifies several tokens per step; remove --speculative-config"
    # The size becomes a connector only after this check.
    for option, value in (
        ("--kv-transfer-config", config.kv_transfer_config),
        ("--kv-offloading-size", config.cache_config.kv_offloading_size),
    ):
        if value is not None:
            yield (
                "KV connectors move whole prompts, but a compacted request has only its kept "
                f"tokens; remove {option}"
            )
    parallel = config.parallel_config
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        yield "context parallelism spreads one request's tokens over ranks; use tensor parallelism"
    if parallel.use_ubatching:
        yield "dual batch overlap builds the metadata of half a step; remove --enable-dbo"
    if config.attention_config.use_non_causal:
        yield "non-causal attention needs the whole context at every step"


def unsupported_by_sparda(config: Any) -> Iterator[str]:
    """What SPARDA cannot serve beside that.

    Args:
        config: vLLM's configuration.

    Yields:
        A reason and what to do.
    """
    parallel = config.parallel_config
    if parallel.pipeline_parallel_size > 1:
        yield "pipeline parallelism puts a layer and the one before it on different ranks"
    heads = config.model_config.get_total_num_kv_heads()
    if parallel.tensor_parallel_size > heads:
        yield (
            f"--tensor-parallel-size {parallel.tensor_parallel_size} is more than the {heads} KV "
            "heads, each of which has a cache of its own"
        )
    if config.model_config.enable_sleep_mode:
        yield "sleep mode frees device memory that it does not know of; remove --enable-sleep-mode"
    if config.lora_config is not None:
        yield "LoRA replaces the projections that the Forecast sits beside; remove --enable-lora"


def windows_refused(name: str) -> str:
    """Why a backend that needs every layer cannot serve a model with sliding-window layers."""
    return (
        f"this model has sliding-window layers, but {name} looks from each layer to the next and "
        "needs them all alike. Use --attention-backend ROCKETKV"
    )


def check_layer(
    *,
    alibi_slopes: Any,
    sinks: Any,
    logits_soft_cap: float | None,
    attn_type: str,
    kv_sharing_target_layer_name: str | None,
) -> None:
    """Refuse attention variants of a single layer.

    Args:
        alibi_slopes: Not None for ALiBi models.
        sinks: Not None for learned attention sinks.
        logits_soft_cap: Non-zero for capped logits.
        attn_type: vLLM's attention type.
        kv_sharing_target_layer_name: Not None if the layer reads another layer's KV cache.

    Raises:
        UnsupportedError: What the layer needs and why it cannot be had.
    """
    for present, what in (
        (
            alibi_slopes is not None,
            "ALiBi adds a bias by position, which kept tokens no longer have",
        ),
        (sinks is not None, "learned attention sinks take part in every softmax"),
        (bool(logits_soft_cap), "capped logits are not implemented by the decode kernels"),
        (attn_type != "decoder", f"{attn_type} attention has no KV cache that grows by decoding"),
        (
            kv_sharing_target_layer_name is not None,
            "layers that share one KV cache keep different tokens",
        ),
    ):
        if present:
            raise UnsupportedError(
                f"this model cannot be served sparsely: {what}. Leave out --attention-backend"
            )


def check_block_size(block_size: int) -> None:
    """Refuse blocks that the kernels of GPUs have no tiles for.

    Raises:
        UnsupportedError: Not a power of two.
    """
    if block_size & (block_size - 1):
        raise UnsupportedError(
            f"blocks of {block_size} tokens: on GPUs a block must be a power of two. Choose "
            "--block-size (SPARDA: vllm_sparse.block_size) 16, 32, 64 or 128"
        )
