# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Combinations that would give wrong answers are refused when vLLM starts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_sparse.config import SpardaSettings, load_settings
from vllm_sparse.errors import ConfigError, UnsupportedError
from vllm_sparse.forecast.routing import route_model
from vllm_sparse.kv.host.geometry import GIB, block_bytes, host_blocks, plan_frames
from vllm_sparse.kv.host.memory import available_bytes
from vllm_sparse.plugin import BACKENDS

if TYPE_CHECKING:
    from collections.abc import Iterator


def check_config(vllm_config: Any) -> None:
    """Refuse unsupported configurations if one of our backends is chosen; size SPARDA's cache.

    vLLM may call this several times for one configuration.

    Args:
        vllm_config: vLLM's complete configuration; SPARDA sets its block size, number of blocks and
            model class.

    Raises:
        ConfigError: The settings are wrong.
        UnsupportedError: The backend cannot serve this configuration; lists every reason.
    """
    backend = vllm_config.attention_config.backend
    if backend is None or backend.name not in BACKENDS or vllm_config.model_config is None:
        return
    settings = load_settings(vllm_config.additional_config, backend.name.lower())
    reasons = list(unsupported(vllm_config))
    if isinstance(settings, SpardaSettings):
        reasons += _unsupported_by_sparda(vllm_config)
    if reasons:
        raise UnsupportedError(
            f"{backend.name} cannot serve this configuration: " + "; ".join(reasons)
        )
    if isinstance(settings, SpardaSettings):
        _size_cache(vllm_config, settings)
        route_model(vllm_config)


def unsupported(config: Any) -> Iterator[str]:
    """What neither backend can serve.

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
    if config.kv_transfer_config is not None:
        yield (
            "KV connectors move whole prompts, but a compacted request has only its kept tokens; "
            "remove --kv-transfer-config"
        )
    parallel = config.parallel_config
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        yield "context parallelism spreads one request's tokens over ranks; use tensor parallelism"
    if parallel.use_ubatching:
        yield "dual batch overlap builds the metadata of half a step; remove --enable-dbo"
    if config.attention_config.use_non_causal:
        yield "non-causal attention needs the whole context at every step"


def _unsupported_by_sparda(config: Any) -> Iterator[str]:
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


def _size_cache(config: Any, settings: SpardaSettings) -> None:
    """Make vLLM manage the blocks of the host pool; refuse pools and slabs that cannot work."""
    cache, model, parallel = config.cache_config, config.model_config, config.parallel_config
    if cache.user_specified_block_size and cache.block_size != settings.block_size:
        raise ConfigError(
            f"--block-size {cache.block_size} contradicts vllm_sparse.block_size="
            f"{settings.block_size}; leave one of them out or make them equal"
        )
    cache.block_size = settings.block_size
    layers, kv_heads = model.get_num_layers(parallel), model.get_num_kv_heads(parallel)
    shape = settings.block_size, model.get_head_size(), model.dtype.itemsize
    bytes_per_block = block_bytes(layers, kv_heads, *shape)
    blocks = host_blocks(settings, bytes_per_block, model.max_model_len)
    if cache.num_gpu_blocks_override is None:
        cache.num_gpu_blocks_override = blocks
    elif cache.num_gpu_blocks_override > blocks:
        raise ConfigError(
            f"--num-gpu-blocks-override {cache.num_gpu_blocks_override} needs more host memory than"
            f" vllm_sparse.host_gib={settings.host_gib}, which holds {blocks} blocks"
        )
    blocks = cache.num_gpu_blocks_override
    ranks = parallel.tensor_parallel_size * max(parallel.data_parallel_size_local, 1)
    total = blocks * bytes_per_block * ranks
    available = available_bytes()
    if total > available:
        raise ConfigError(
            f"vllm_sparse.host_gib: the host pool takes {total / GIB:.2f} GiB"
            f"{' on all ranks together' if ranks > 1 else ''}, but this "
            f"machine has {available / GIB:.2f} GiB available. Lower host_gib"
        )
    plan_frames(
        settings,
        num_layers=layers,
        num_pieces=blocks * kv_heads,
        num_kv_heads=kv_heads,
        piece_bytes=bytes_per_block // (layers * kv_heads),
        max_num_seqs=config.scheduler_config.max_num_seqs,
        max_model_len=model.max_model_len,
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
