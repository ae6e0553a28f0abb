# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Combinations that would give wrong answers are refused when vLLM starts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_sparse.config import load_settings
from vllm_sparse.errors import UnsupportedError
from vllm_sparse.plugin import BACKENDS

if TYPE_CHECKING:
    from collections.abc import Iterator


def check_config(vllm_config: Any) -> None:
    """Refuse unsupported configurations if one of our backends is chosen.

    Args:
        vllm_config: vLLM's complete configuration.

    Raises:
        ConfigError: The settings are wrong.
        UnsupportedError: The backend cannot serve this configuration; lists every reason.
    """
    backend = vllm_config.attention_config.backend
    if backend is None or backend.name not in BACKENDS or vllm_config.model_config is None:
        return
    load_settings(vllm_config.additional_config, backend.name.lower())
    reasons = list(_unsupported(vllm_config))
    if reasons:
        raise UnsupportedError(
            f"{backend.name} cannot serve this configuration: " + "; ".join(reasons)
        )


def _unsupported(config: Any) -> Iterator[str]:
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
    if config.kv_transfer_config is not None:
        yield (
            "KV connectors move whole prompts, but a compacted request has only its kept tokens; "
            "remove --kv-transfer-config"
        )
    parallel = config.parallel_config
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        yield "context parallelism spreads one request's tokens over ranks; use tensor parallelism"
    if config.attention_config.use_non_causal:
        yield "non-causal attention needs the whole context at every step"


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
