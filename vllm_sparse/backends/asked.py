# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Which features a configuration or a layer asks for, whoever is to serve them.

Names are those of :data:`vllm_sparse.features.FEATURES`; facts fill its reasons.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_sparse.forecast.routing import LOOKAHEAD_SELECTORS
from vllm_sparse.registry import is_ours

if TYPE_CHECKING:
    from collections.abc import Iterator

    Asked = Iterator[tuple[str, dict[str, object]]]

PLAIN_CACHES = ("auto", "bfloat16", "float16")
FP8_CACHES = ("fp8", "fp8_e4m3")

# They draft from tokens alone: no layers, no KV cache.
_DRAFTS_WITHOUT_CACHE = ("ngram", "ngram_gpu", "suffix", "custom_class")

# They draft with layers of their own, whose keys and values lie in our blocks.
_DRAFTERS = ("eagle", "eagle3", "mtp", "draft_model")

# They bring what another process or an earlier run has processed, or process nothing.
_UNPROCESSED = ("tensorizer", "ipc_cache")

# Their second pass over the layers brings queries alone.
_READ_TWICE = ("IQuestLoopCoderForCausalLM",)

PROMPT_LENGTHS = 1 << 30
"""In place of a reference sliding window: a builder asks for the lengths of prompts."""

TIER_MODULE = "vllm_sparse.kv.tier"
"""Of the connector that start-up chooses for ``--kv-offloading-size``."""


def has_layers(drafts: Any) -> bool:
    """Whether drafts come from layers with keys and values of their own that are served.

    Args:
        drafts: vLLM's configuration of them, or ``None``.
    """
    return (
        drafts is not None
        and drafts.method in _DRAFTERS
        and not getattr(drafts, "parallel_drafting", False)
    )


def cache_kind(config: Any) -> str:
    """The kind of KV cache that layers will have: vLLM's ``cache_dtype``, but for checkpoints.

    Where nobody has chosen and the weights of a checkpoint come with scales for its cache
    (``kv_cache_scheme`` of compressed-tensors), vLLM's layers take fp8 when they are built.

    Args:
        config: vLLM's.
    """
    kind = str(config.cache_config.cache_dtype)
    quantised = getattr(config, "quant_config", None)  # the planner has none
    if kind == "auto" and getattr(quantised, "kv_cache_scheme", None) is not None:
        return "fp8"
    return kind


def cache_itemsize(kind: str, model_itemsize: int) -> int:
    """Bytes of a number in a KV cache that is served.

    Args:
        kind: Of the cache, as vLLM's ``cache_dtype`` names it.
        model_itemsize: Bytes of the model's numbers.
    """
    if kind in FP8_CACHES:
        return 1
    return model_itemsize if kind == "auto" else 2


def of_config(config: Any, settings: Any) -> Asked:
    """What a configuration asks for.

    Args:
        config: vLLM's configuration.
        settings: The backend's.

    Yields:
        Names of features, and facts.
    """
    model = config.model_config
    if model.use_mla:
        yield "mla", {}
    if model.is_attention_free:
        yield "attention-free", {}
    if model.runner_type not in ("generate", "draft"):
        yield "pooling", {"runner": model.runner_type}
    if model.is_hybrid:
        yield "states", {}
        if getattr(config, "use_v2_model_runner", False):  # the planner has no runner
            yield "states-runner", {}
    # vLLM says so itself only where it chooses the backend.
    if config.attention_config.use_non_causal or getattr(model, "is_diffusion", False):
        yield "non-causal", {}
    for kind, other in config.attention_config.backend_per_kind.items():
        if kind == "full_attention" or is_ours(other):
            yield "per-kind", {"kind": kind, "other": other.name}
    if model.attention_chunk_size:
        yield "chunked-layers", {"size": model.attention_chunk_size}
    if getattr(model, "is_mm_prefix_lm", False):  # the planner does not know
        yield "image-prefixes", {}
    if window := config.cache_config.sliding_window:  # vLLM sets it if all layers have one
        yield "windows-only", {"window": window}
    window = getattr(model, "rswa_window", None)  # the planner has none
    if window not in (None, PROMPT_LENGTHS):  # vLLM asks again when builders have asked
        yield "reference-windows", {"window": window}
    auxiliary = getattr(config, "aux_output_config", None)  # the planner has none
    if auxiliary is not None and auxiliary.enabled:
        yield "auxiliary", {}
    if model.architecture in _READ_TWICE:
        yield "layers-twice", {"architecture": model.architecture}
    kind, own = cache_kind(config), str(model.dtype).removeprefix("torch.")
    yield from of_cache(kind)
    if kind in PLAIN_CACHES and kind not in ("auto", own):
        yield "other-dtype", {"kind": kind, "model": own}
    if model.is_hybrid:
        yield from of_managers(config)
    yield from _of_drafts(config)
    yield from _of_ranks(config)
    yield from _of_tier(config)
    yield from _of_scheduler(config)
    if model.enable_sleep_mode:
        yield "sleep", {}
    if config.lora_config is not None:
        yield "lora", {}
    yield from _of_settings(config, settings)


def of_managers(config: Any) -> Asked:
    """What a configuration asks for if layers of other kinds share the pool."""
    if getattr(config.cache_config, "prefix_match_unit", None) is not None:
        yield "hits-within-blocks", {}
    if config.scheduler_config.disable_hybrid_kv_cache_manager:
        yield "one-manager", {}


def of_cache(kind: str) -> Asked:
    """What a kind of KV cache asks for: vLLM's ``cache_dtype``."""
    if kind in FP8_CACHES:
        yield "fp8", {"kind": kind}
        if not stock_reads_fp8():
            yield "fp8-narrow", {"kind": kind}
    elif kind not in PLAIN_CACHES:
        others = (
            ("e5m2", "e5m2"), ("per_token_head", "scales-per-token"), ("fp8_", "other-fp8"),
            ("", "few-bits"),
        )  # fmt: skip
        yield next(name for part, name in others if part in kind), {"kind": kind}


def stock_reads_fp8() -> bool:
    """Whether vLLM's attention on CPUs reads fp8 here, which needs AVX-512 (AMX comes with it)."""
    import torch

    return bool(torch.cpu._is_avx512_supported())


def _of_drafts(config: Any) -> Asked:
    drafts = config.speculative_config
    if drafts is None:
        return
    if drafts.method in _DRAFTS_WITHOUT_CACHE:
        yield "drafts", {}
        if drafts.method in ("suffix", "ngram_gpu"):
            yield drafts.method.replace("_", "-"), {}
        if getattr(drafts, "enable_adaptive_verification", False):
            yield "drafts-moved", {}
    elif not has_layers(drafts):
        parallel = " with parallel_drafting" if drafts.method in _DRAFTERS else ""
        yield "other-drafters", {"method": drafts.method, "parallel": parallel}
    else:
        yield from _of_drafter(config, drafts)
    if config.model_config.is_hybrid:
        alone = drafts.method in _DRAFTS_WITHOUT_CACHE
        yield "drafts-states" if alone else "drafters-states", {}
        if alone and not getattr(config, "use_v2_model_runner", True):  # the planner has no runner
            yield "drafts-states-runner", {}


def _of_drafter(config: Any, drafts: Any) -> Asked:
    models = drafts.method == "draft_model"
    yield "draft-models" if models else "drafters", {"method": drafts.method}
    if config.model_config.runner_type == "draft":  # vLLM asks again, of the drafter itself
        return
    expected, found = (
        model.get_num_attention_heads(parallel) // model.get_num_kv_heads(parallel)
        for model, parallel in (
            (config.model_config, config.parallel_config),
            (drafts.draft_model_config, drafts.draft_parallel_config),
        )
    )
    if found != expected:
        yield "unlike-drafters", {"found": found, "expected": expected}
    cache = config.cache_config.cache_dtype
    if drafts.use_multi_module_mtp():
        yield "drafters-modules", {}
    if drafts.kv_cache_dtype not in (None, cache):
        yield "drafters-caches", {"kind": drafts.kv_cache_dtype, "expected": cache}
    if config.cache_config.kv_offloading_size is not None or config.kv_transfer_config is not None:
        yield "drafters-tier", {}
    if config.parallel_config.pipeline_parallel_size > 1:
        yield "drafters-stages", {}


def _of_ranks(config: Any) -> Asked:
    parallel, heads = config.parallel_config, config.model_config.get_total_num_kv_heads()
    if parallel.tensor_parallel_size > 1:
        yield "tensor-parallel", {}
    if parallel.tensor_parallel_size > heads:
        yield "ranks-than-heads", {}
    if parallel.pipeline_parallel_size > 1:
        yield "pipeline", {}
        if getattr(config.compilation_config, "mode", None) == 0:  # vLLM's ``NONE``
            yield "pipeline-eager", {}
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        yield "context-parallel", {}
    if parallel.use_ubatching:
        yield "half-steps", {}


def _of_tier(config: Any) -> Asked:
    cache, transfer = config.cache_config, config.kv_transfer_config
    ours = transfer is not None and transfer.kv_connector_module_path == TIER_MODULE
    if transfer is not None and not ours:
        yield "connectors", {}
    if cache.kv_offloading_size is None and not ours:
        return
    # Ours: start-up has chosen it, or somebody has.
    option: dict[str, object] = {
        "option": "--kv-transfer-config" if ours else "--kv-offloading-size"
    }
    yield "tier", option
    if cache.kv_offloading_backend != "native":
        yield "tier-backend", {}
    if not cache.enable_prefix_caching:
        yield "tier-alone", option
    if config.model_config.is_hybrid:
        yield "tier-states", option
    if config.parallel_config.pipeline_parallel_size > 1:
        yield "tier-stages", option


def _of_scheduler(config: Any) -> Asked:
    scheduling = config.scheduler_config
    if getattr(scheduling, "scheduler_cls", None) is None:  # the planner has none
        return
    from vllm.v1.core.sched.scheduler import Scheduler

    chosen = scheduling.get_scheduler_cls()
    if not issubclass(chosen, Scheduler):
        yield "other-schedulers", {"name": chosen.__qualname__}


def _of_settings(config: Any, settings: Any) -> Asked:
    if len(getattr(settings, "page_sizes", ())) > 1:
        yield "page-sizes", {"sizes": list(settings.page_sizes)}
    if getattr(settings, "most_tokens", 0) > getattr(settings, "token_budget", 0):
        yield "budgets", {"budget": settings.most_tokens}
    if not hasattr(settings, "chosen_selector"):
        return
    if settings.chosen_selector in LOOKAHEAD_SELECTORS:
        if config.parallel_config.pipeline_parallel_size > 1:
            yield "pipeline-ahead", {"selector": settings.chosen_selector}
        if config.lora_config is not None:
            yield "lora-ahead", {"selector": settings.chosen_selector}
        load = getattr(config, "load_config", None)  # the planner has none
        if load is not None and load.load_format in _UNPROCESSED:
            facts = {"selector": settings.chosen_selector, "kind": load.load_format}
            yield "unprocessed-ahead", facts
    transfer = getattr(config, "weight_transfer_config", None)  # the planner has none
    if settings.chosen_selector == "lookahead-query" and transfer is not None:
        yield "transfer-ahead", {}
    if settings.sparse_prefill:
        yield "sparse-prompts", {}
    prompts, outputs = settings.prompt_blocks_read, settings.blocks_read
    if settings.sparse_prefill and prompts != outputs:
        yield "prompt-blocks", {"prompts": prompts, "outputs": outputs}
    if settings.sparse_prefill and settings.chosen_prompt_selector != settings.chosen_selector:
        yield "prompt-selector", {"selector": settings.prompt_selector}


def of_layer(
    *,
    alibi_slopes: Any,
    sinks: Any,
    logits_soft_cap: float | None,
    attn_type: str,
    kv_sharing_target_layer_name: str | None,
    sliding_window: int | None,
    kv_cache_dtype: str,
    expected_cache_dtype: str,
) -> Asked:
    """What a layer asks for.

    Args:
        alibi_slopes: Not None for ALiBi models.
        sinks: Not None for learned attention sinks.
        logits_soft_cap: Non-zero for capped logits.
        attn_type: vLLM's attention type.
        kv_sharing_target_layer_name: Not None if the layer reads another layer's KV cache.
        sliding_window: Of a layer that our backend was chosen for, though those stay stock.
        kv_cache_dtype: The layer's; a checkpoint may set it after start-up's checks.
        expected_cache_dtype: That of all layers.

    Yields:
        Names of features, and facts.
    """
    if alibi_slopes is not None:
        yield "alibi", {}
    if sinks is not None:
        yield "sinks", {}
    if logits_soft_cap:
        yield "soft-cap", {}
    if attn_type != "decoder":
        yield "encoder", {"kind": attn_type}
    if kv_sharing_target_layer_name is not None:
        yield "shared-caches", {}
    if sliding_window is not None:
        yield "hidden-windows", {"window": sliding_window}
    yield from of_cache(kv_cache_dtype)
    if kv_cache_dtype != expected_cache_dtype:
        yield "several-dtypes", {"kind": kv_cache_dtype, "expected": expected_cache_dtype}
