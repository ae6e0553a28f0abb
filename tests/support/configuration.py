# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The parts of vLLM's configuration that start-up reads, without vLLM."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import torch

from vllm_sparse.kv.host.geometry import GIB

BLOCK_BYTES = 8192


class Model(SimpleNamespace):
    """A model of 4 layers and 2 KV heads of 8 bfloat16 numbers: 8 KiB per block of 32 tokens."""

    use_mla = is_attention_free = is_hybrid = enable_sleep_mode = is_mm_prefix_lm = False
    attention_chunk_size = None
    runner_type = "generate"
    max_model_len = 1024
    dtype = torch.bfloat16
    kv_heads = 2
    model = "/nowhere"
    quantization = None
    hf_text_config = SimpleNamespace(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64,
        vocab_size=128, tie_word_embeddings=True,
    )  # fmt: skip

    def get_num_experts(self) -> int:
        return 0

    @property
    def architecture(self) -> str:
        return self.hf_config.architectures[0]

    def get_num_layers(self, parallel) -> int:
        stages = {1: [4], 2: [1, 3]}[parallel.pipeline_parallel_size]
        return stages[parallel.rank // parallel.tensor_parallel_size]

    def get_total_num_kv_heads(self) -> int:
        return self.kv_heads

    def get_num_kv_heads(self, parallel) -> int:
        return max(1, self.kv_heads // parallel.tensor_parallel_size)

    def get_num_attention_heads(self, parallel) -> int:
        return 4 // parallel.tensor_parallel_size

    def get_head_size(self) -> int:
        return 8


# 40 blocks of host memory.
SPARDA = {
    **{"selector": "query", "block_size": 32, "kernel_stride": 8, "local_blocks": 1},
    **{"top_k": 4, "dense_len": 0, "host_gib": 40 * BLOCK_BYTES / GIB},
}


def drafter(method: str, heads: int = 4, **changes: Any) -> SimpleNamespace:
    """Drafts that come from layers, which have two KV heads.

    Args:
        method: vLLM's name.
        heads: Query heads.
        **changes: Of vLLM's configuration of drafts.
    """
    layers = SimpleNamespace(get_num_attention_heads=lambda _: heads, get_num_kv_heads=lambda _: 2)
    given = {
        **{"kv_cache_dtype": None, "parallel_drafting": False, "attention_backend": None},
        "use_multi_module_mtp": lambda: False,
    }
    return SimpleNamespace(
        method=method, draft_model_config=layers, draft_parallel_config=None, **{**given, **changes}
    )


def configuration(backend: str, settings: dict[str, Any] | None = None, **changes: Any) -> Any:
    """A configuration that the backend serves, but for the changes.

    Args:
        backend: Its name.
        settings: Its own, beside those that make SPARDA small.
        **changes: ``part__key`` or whole parts.
    """
    section = {**(SPARDA if backend == "SPARDA" else {}), **(settings or {})}
    values = {
        "attention_config": SimpleNamespace(
            backend=SimpleNamespace(name=backend), use_non_causal=False, backend_per_kind={}
        ),
        "additional_config": {"vllm_sparse": section},
        "model_config": Model(hf_config=SimpleNamespace(architectures=["LlamaForCausalLM"])),
        "cache_config": SimpleNamespace(
            cache_dtype="auto",
            kv_offloading_size=None,
            kv_offloading_backend="native",
            enable_prefix_caching=True,
            sliding_window=None,
            block_size=16,
            user_specified_block_size=False,
            num_gpu_blocks_override=None,
        ),
        "speculative_config": None,
        "kv_transfer_config": None,
        "lora_config": None,
        "scheduler_config": SimpleNamespace(max_num_seqs=4, disable_hybrid_kv_cache_manager=False),
        "compilation_config": SimpleNamespace(cudagraph_capture_sizes=None),
        "parallel_config": SimpleNamespace(
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
            pipeline_parallel_size=1,
            tensor_parallel_size=1,
            rank=0,
            data_parallel_size_local=1,
            _api_process_count=1,
            _api_process_rank=0,
            use_ubatching=False,
        ),
    }
    for key, value in changes.items():
        head, _, tail = key.partition("__")
        if tail:
            setattr(values[head], tail, value)
        else:  # start-up changes some of it
            values[head] = copy.copy(value) if isinstance(value, SimpleNamespace) else value
    return SimpleNamespace(**values)


def llama(settings: dict[str, Any], **changes: Any) -> Any:
    """Llama 3.1 8B's shape for SPARDA, and vLLM's own limits of a server on a CPU.

    Args:
        settings: The plugin's.
        **changes: As of :func:`configuration`.
    """
    given = configuration("SPARDA", **changes)
    model = given.model_config
    model.kv_heads, model.max_model_len = 8, changes.get("model_config__max_model_len", 131072)
    model.get_num_layers = lambda parallel: 32
    model.get_head_size = lambda: 128
    model.get_num_attention_heads = lambda parallel: 32 // parallel.tensor_parallel_size
    model.hf_text_config = SimpleNamespace(
        hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, intermediate_size=14336,
        vocab_size=128256, tie_word_embeddings=False,
    )  # fmt: skip
    given.scheduler_config.max_num_seqs = 128
    given.scheduler_config.max_num_batched_tokens = 2048
    given.cache_config.gpu_memory_utilization = 0.92
    given.additional_config = {"vllm_sparse": settings}
    return given
