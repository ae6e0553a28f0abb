# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Combinations that would give wrong answers are refused when vLLM starts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_sparse.config import load_settings
from vllm_sparse.errors import UnsupportedError
from vllm_sparse.forecast.routing import LOOKAHEAD_SELECTORS

if TYPE_CHECKING:
    from collections.abc import Iterator


PLAIN_CACHES = ("auto", "bfloat16", "float16")
FP8_CACHES = ("fp8", "fp8_e4m3")

_OTHER_CACHES = (
    ("e5m2", "e5m2 has two binary digits, and FlashAttention does not read it"),
    ("per_token_head", "each token has a scale of its own, which compaction does not move"),
    ("", "numbers of fewer than 8 bits are packed in ways that compaction does not know"),
)


def unserved_cache(kind: str) -> Iterator[str]:
    """Why a kind of KV cache cannot be had.

    Args:
        kind: vLLM's ``cache_dtype``.

    Yields:
        A reason and what to do, or nothing.
    """
    if kind not in (*PLAIN_CACHES, *FP8_CACHES):
        why = next(why for part, why in _OTHER_CACHES if part in kind)
        yield f"--kv-cache-dtype {kind}: {why}; use fp8 or auto"


def cache_itemsize(kind: str, model_itemsize: int) -> int:
    """Bytes of a number in a KV cache that is served.

    Args:
        kind: vLLM's ``cache_dtype``.
        model_itemsize: Bytes of the model's numbers.
    """
    if kind in FP8_CACHES:
        return 1
    return model_itemsize if kind == "auto" else 2


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
    yield from unserved_cache(str(config.cache_config.cache_dtype))
    parallel = config.parallel_config
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        yield "context parallelism spreads one request's tokens over ranks; use tensor parallelism"
    if parallel.use_ubatching:
        yield "dual batch overlap builds the metadata of half a step; remove --enable-dbo"
    if config.attention_config.use_non_causal:
        yield "non-causal attention needs the whole context at every step"


# They draft from tokens alone: no layers, no KV cache.
_DRAFTS_WITHOUT_CACHE = ("ngram", "suffix", "custom_class")


def unsupported_by_policies(config: Any, on_gpu: bool) -> Iterator[str]:
    """What policies cannot serve beside that.

    Args:
        config: vLLM's configuration.
        on_gpu: Steps take a GPU's path.

    Yields:
        A reason and what to do.
    """
    drafts = config.speculative_config
    if drafts is not None and on_gpu:
        yield (
            "speculative decoding on GPUs: steps are planned from lengths that count rejected "
            "drafts; remove --speculative-config"
        )
    elif drafts is not None and drafts.method not in _DRAFTS_WITHOUT_CACHE:
        yield (
            f"--speculative-config: the drafter of method {drafts.method} has layers of its own, "
            f"whose blocks would leave with ours; use method {', '.join(_DRAFTS_WITHOUT_CACHE)}"
        )
    if drafts is not None and config.model_config.is_hybrid:
        yield (
            "speculative decoding beside recurrent state layers: vLLM 0.32's CPU kernels give "
            "other tokens as soon as it is configured, with this plugin or without, and its GPU "
            "kernels are untried with it; remove --speculative-config"
        )
    if config.model_config.is_hybrid and on_gpu:
        yield (
            "models with recurrent state layers have blocks that are no power of two, which GPU "
            "kernels need; they are served on CPUs"
        )


def unsupported_by_sparda(config: Any, on_gpu: bool) -> Iterator[str]:
    """What SPARDA cannot serve beside that.

    Args:
        config: vLLM's configuration.
        on_gpu: Steps take a GPU's path.

    Yields:
        A reason and what to do.
    """
    if config.model_config.is_hybrid:
        yield (
            "models with recurrent state layers pad each block to a state, which takes more device "
            "memory than stock attention; use ROCKETKV on CPUs"
        )
    if config.speculative_config is not None:
        yield (
            "speculative decoding: rows of several tokens stream their whole context in every "
            "step; remove --speculative-config"
        )
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
    selector = load_settings(config.additional_config, "sparda").chosen_selector
    if config.lora_config is not None and selector in LOOKAHEAD_SELECTORS:
        yield (
            f"LoRA replaces the projections that selector {selector} sits beside; set "
            "vllm_sparse.selector to previous or query, or remove --enable-lora"
        )


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
    kv_cache_dtype: str,
    expected_cache_dtype: str,
) -> None:
    """Refuse attention variants of a single layer.

    Args:
        alibi_slopes: Not None for ALiBi models.
        sinks: Not None for learned attention sinks.
        logits_soft_cap: Non-zero for capped logits.
        attn_type: vLLM's attention type.
        kv_sharing_target_layer_name: Not None if the layer reads another layer's KV cache.
        kv_cache_dtype: The layer's; a checkpoint may set it after start-up's checks.
        expected_cache_dtype: That of all layers.

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
        *((True, reason) for reason in unserved_cache(kv_cache_dtype)),
        (
            kv_cache_dtype != expected_cache_dtype,
            f"a KV cache of {kv_cache_dtype} in a layer beside {expected_cache_dtype} in others "
            "(--kv-cache-dtype-skip-layers) has pages of another size",
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
