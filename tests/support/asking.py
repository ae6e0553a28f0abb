# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""How features are asked for in vLLM's configuration."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

from support.configuration import drafter

AHEAD = {"selector": "lookahead-query"}

# What vLLM's configuration says when somebody asks for a feature, and part of the reason.
BY_CONFIGURATION: dict[str, tuple[dict[str, Any], str]] = {
    "states": ({"model_config__is_hybrid": True}, "recurrent state"),
    "states-runner": (
        {"model_config__is_hybrid": True, "use_v2_model_runner": True},
        "VLLM_USE_V2_MODEL_RUNNER=0",
    ),
    "mla": ({"model_config__use_mla": True}, "MLA"),
    "pooling": ({"model_config__runner_type": "pooling"}, "pooling models"),
    "non-causal": ({"attention_config__use_non_causal": True}, "non-causal"),
    "per-kind": (
        {"attention_config__backend_per_kind": {"full_attention": SimpleNamespace(name="other")}},
        "backend_per_kind gives layers of kind full_attention to other",
    ),
    "attention-free": (
        {"model_config__is_attention_free": True},
        "no attention layers that [A-Z]+ could serve",
    ),
    "reference-windows": ({"model_config__rswa_window": 128}, "the last 128 outputs only"),
    "chunked-layers": ({"model_config__attention_chunk_size": 8192}, "chunks of 8192 tokens"),
    "image-prefixes": ({"model_config__is_mm_prefix_lm": True}, "both ways"),
    "one-manager": (
        {
            "scheduler_config__disable_hybrid_kv_cache_manager": True,
            "model_config__is_hybrid": True,
        },
        "--disable-hybrid-kv-cache-manager",
    ),
    "hits-within-blocks": (
        {"cache_config__prefix_match_unit": 16, "model_config__is_hybrid": True},
        "--prefix-match-unit",
    ),
    "layers-twice": (
        {"model_config__hf_config": SimpleNamespace(architectures=["IQuestLoopCoderForCausalLM"])},
        "IQuestLoopCoder",
    ),
    "other-dtype": (
        {"cache_config__cache_dtype": "float16"},
        "--kv-cache-dtype float16 beside a model in bfloat16",
    ),
    "fp8": ({"cache_config__cache_dtype": "fp8"}, "--kv-cache-dtype fp8"),
    "e5m2": ({"cache_config__cache_dtype": "fp8_e5m2"}, "fp8_e5m2: .*two binary digits"),
    "scales-per-token": (
        {"cache_config__cache_dtype": "int8_per_token_head"},
        "scale of its own.*use fp8 or auto",
    ),
    "other-fp8": ({"cache_config__cache_dtype": "fp8_inc"}, "fp8_inc: .*other devices"),
    "few-bits": ({"cache_config__cache_dtype": "nvfp4"}, "fewer than 8 bits"),
    "tier": ({"cache_config__kv_offloading_size": 1e-3}, "remove --kv-offloading-size"),
    "tier-backend": (
        {
            "cache_config__kv_offloading_size": 1e-3,
            "cache_config__kv_offloading_backend": "lmcache",
        },
        "remove --kv-offloading-backend",
    ),
    "tier-alone": (
        {
            "cache_config__kv_offloading_size": 1e-3,
            "cache_config__enable_prefix_caching": False,
        },
        "--no-enable-prefix-caching",
    ),
    "tier-states": (
        {"cache_config__kv_offloading_size": 1e-3, "model_config__is_hybrid": True},
        "states of recurrent layers .*--kv-offloading-size",
    ),
    "tier-stages": (
        {
            "cache_config__kv_offloading_size": 1e-3,
            "parallel_config__pipeline_parallel_size": 2,
        },
        "stages of a pipeline",
    ),
    "connectors": ({"kv_transfer_config": Mock(kv_connector="any")}, "--kv-transfer-config"),
    "page-sizes": ({"settings": {"page_sizes": [1, 2]}}, r"page_sizes=\[1, 2\]"),
    "budgets": ({"settings": {"max_token_budget": 4096}}, "max_token_budget=4096: on GPUs"),
    "tensor-parallel": ({"parallel_config__tensor_parallel_size": 2}, ""),
    "ranks-than-heads": (
        {"parallel_config__tensor_parallel_size": 4},
        "",
    ),
    "pipeline": ({"parallel_config__pipeline_parallel_size": 2}, ""),
    "pipeline-ahead": (
        {"settings": AHEAD, "parallel_config__pipeline_parallel_size": 2},
        "pipeline parallelism.* lookahead-query",
    ),
    "pipeline-eager": (
        {"parallel_config__pipeline_parallel_size": 2, "compilation_config__mode": 0},
        "remove --enforce-eager",
    ),
    "windows-only": ({"cache_config__sliding_window": 4096}, "window of 4096 tokens"),
    "auxiliary": ({"aux_output_config": SimpleNamespace(enabled=True)}, "auxiliary outputs"),
    "context-parallel": (
        {"parallel_config__decode_context_parallel_size": 2},
        "context parallelism",
    ),
    "half-steps": ({"parallel_config__use_ubatching": True}, "--enable-dbo"),
    "drafts": ({"speculative_config": SimpleNamespace(method="ngram")}, "--speculative-config"),
    "suffix": ({"speculative_config": SimpleNamespace(method="suffix")}, ""),
    "ngram-gpu": ({"speculative_config": SimpleNamespace(method="ngram_gpu")}, ""),
    "drafts-moved": (
        {"speculative_config": SimpleNamespace(method="ngram", enable_adaptive_verification=True)},
        "adaptive_verification",
    ),
    "drafters": ({"speculative_config": drafter("eagle")}, "--speculative-config"),
    "draft-models": ({"speculative_config": drafter("draft_model")}, "--speculative-config"),
    "other-drafters": (
        {"speculative_config": drafter("eagle3", parallel_drafting=True)},
        "--speculative-config",
    ),
    "unlike-drafters": ({"speculative_config": drafter("eagle", heads=6)}, "has 3 query heads"),
    "drafters-modules": (
        {"speculative_config": drafter("mtp", use_multi_module_mtp=lambda: True)},
        "MTP modules .*num_speculative_tokens to 1",
    ),
    "drafters-caches": (
        {"speculative_config": drafter("eagle", kv_cache_dtype="fp8")},
        "fp8 beside the model's auto",
    ),
    "drafters-tier": (
        {"speculative_config": drafter("mtp"), "cache_config__kv_offloading_size": 1e-3},
        "remove --kv-offloading-size",
    ),
    "drafters-stages": (
        {"speculative_config": drafter("mtp"), "parallel_config__pipeline_parallel_size": 2},
        "remove --pipeline-parallel-size",
    ),
    "drafts-states": (
        {
            "speculative_config": SimpleNamespace(method="ngram"),
            "model_config__is_hybrid": True,
        },
        "beside recurrent state layers",
    ),
    "drafts-states-runner": (
        {
            "speculative_config": SimpleNamespace(method="suffix"),
            "model_config__is_hybrid": True,
            "use_v2_model_runner": False,
        },
        "beside recurrent state layers under Model Runner V1",
    ),
    "drafters-states": (
        {"speculative_config": drafter("mtp"), "model_config__is_hybrid": True},
        "a drafter's layers do beside recurrent states",
    ),
    "lora": ({"lora_config": object()}, "LoRA"),
    "transfer-ahead": (
        {"settings": AHEAD, "weight_transfer_config": object()},
        "lookahead-query .*--weight-transfer-config",
    ),
    "lora-ahead": ({"settings": AHEAD, "lora_config": object()}, "lookahead-query .*--enable-lora"),
    "unprocessed-ahead": (
        {"settings": AHEAD, "load_config": SimpleNamespace(load_format="tensorizer")},
        "--load-format tensorizer .* lookahead-query",
    ),
    "sparse-prompts": ({"settings": {"sparse_prefill": True}}, "sparse_prefill"),
    "prompt-blocks": (
        {"settings": {"sparse_prefill": 8}},
        "sparse_prefill: 8 blocks for prompts and 4 for outputs",
    ),
    "prompt-selector": (
        {"settings": {**AHEAD, "sparse_prefill": True, "prompt_selector": "query"}},
        "prompt_selector=query beside another selector",
    ),
    "other-schedulers": (
        {
            "scheduler_config__scheduler_cls": "any",
            "scheduler_config__get_scheduler_cls": lambda: SimpleNamespace,
        },
        "--scheduler-cls SimpleNamespace does not extend",
    ),
    "sleep": ({"model_config__enable_sleep_mode": True}, "--enable-sleep-mode"),
}
