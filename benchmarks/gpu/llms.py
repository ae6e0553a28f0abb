# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""vLLM engines in this process: how the stages build them, and what they turned out to be."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from benchmarks import arms
from benchmarks.gpu import shapes
from benchmarks.gpu.stages import CheckFailedError

if TYPE_CHECKING:
    import argparse
    from pathlib import Path

    from benchmarks.arms import Arm

# Graphs of whole decode steps, nothing compiled: starts are short, and both sides have the same.
# Nor are vLLM's kernels for samplers compiled that no request here asks for: minutes of each start.
GRAPHS: dict[str, Any] = {
    "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
    "kernel_config": {"enable_jit_warmup": False},
}
EAGER = {"enforce_eager": True}
COMPILED: dict[str, Any] = {}  # as vLLM does it by default


def stock_arm(options: argparse.Namespace) -> Arm:
    """Stock vLLM: FlashAttention on a GPU, whatever it uses on a CPU."""
    return arms.Arm("dense", None, "FLASH_ATTN" if options.device == "cuda" else "")


def build(arm: Arm, options: argparse.Namespace, model: Path, **arguments: Any) -> Any:
    """Starts an engine.

    Args:
        arm: The side of the comparison; its backend is set for stock vLLM, too.
        options: For ``--engine-arg``, ``--seed`` and ``--tiny``.
        model: Model folder.
        **arguments: Of `LLM`. Dummy weights are made random here, the same for all arms.
    """
    from vllm import LLM

    shared = {
        "model": str(model), "dtype": "bfloat16", "seed": options.seed,
        "skip_tokenizer_init": True, "disable_log_stats": False,
        **arguments,
        **arms.parse_settings(options.engine_arg),
    }  # fmt: skip
    own = arm.engine_args(shared)
    if arm.settings is None and arm.backend:
        own = {"attention_backend": arm.backend}
    llm = LLM(**shared, **own)
    if shared.get("load_format") == "dummy":
        llm.collective_rpc(shapes.randomise, args=(options.seed,))
    return llm


def check_graphs(facts: dict[str, Any], mode: dict[str, Any]) -> None:
    """Raises unless decode steps run in captured graphs where they should; vLLM would only warn.

    Raises:
        CheckFailedError: They do not.
    """
    wanted = {"FULL_DECODE_ONLY"} if mode == GRAPHS else {"FULL_AND_PIECEWISE", "FULL"}
    found = facts["graphs"].rpartition(".")[2]
    if mode != EAGER and found not in wanted:
        raise CheckFailedError(f"decode steps run with graphs {found}, and not as they are to")


def facts(llm: Any, started: float) -> dict[str, Any]:
    """What a reader of a result wants to know of an engine.

    Args:
        llm: The engine.
        started: When its start began, as of `time.perf_counter`.
    """
    config = llm.llm_engine.vllm_config
    core = getattr(llm.llm_engine.engine_core, "engine_core", None)
    pool = core.scheduler.kv_cache_manager.block_pool if core else None
    size = core.scheduler.block_size if core else config.cache_config.block_size
    blocks = pool.num_gpu_blocks - 1 if pool else config.cache_config.num_gpu_blocks
    return {
        "start_s": round(time.perf_counter() - started, 1),
        "block_size": size,
        "pool_tokens": blocks * size,
        "graphs": str(config.compilation_config.cudagraph_mode),
        "compilation": str(config.compilation_config.mode),
        "async_scheduling": bool(config.scheduler_config.async_scheduling),
        "model_runner": "V2" if getattr(config, "use_v2_model_runner", False) else "V1",
        "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
        "weights": "norms 1, embedding N(0, 1), others N(0, 0.02), by seed",
        **_flash_attention(config),
    }


def _flash_attention(config: Any) -> dict[str, Any]:
    """What stock vLLM's kernel is told; nothing where there is none."""
    try:
        from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

        version = get_flash_attn_version()
    except (ImportError, RuntimeError):
        return {}
    splits = config.attention_config.flash_attn_max_num_splits_for_cuda_graph
    return {"flash_attention": version, "flash_attention_most_splits": splits}
