# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Runs a vLLM engine in a process of its own and returns what it did."""

from __future__ import annotations

import json
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch

from support.forked import run_forked
from support.memory import advice_of

BLOCK_SIZE = 32
NEW_TOKENS = 100
SETTINGS = {
    "token_budget": 64,
    "min_context": 128,
    "generation_reserve": 100,
    "page_sizes": [4],
    "window": 32,
}
EVERYTHING = {**SETTINGS, "token_budget": 4096, "stage1": False}  # is read
DENSE = {"vllm_sparse.sparse": False}  # of a request
# The slab is as small as start-up allows for six requests (x 2 KV heads x 6 blocks of 32 x 2 x 32
# float32 in 3 layers), so that blocks really leave and come back.
SPARDA_SELECTION = {
    "selector": "lookahead-query",
    "block_size": BLOCK_SIZE,
    "kernel_stride": 16,
    "init_blocks": 1,
    "local_blocks": 1,
    "top_k": 6,
    "dense_len": 0,
    "sparse_prefill": False,
}
_METRICS = {
    "preemptions": "num_preemptions",
    "drafted": "spec_decode_num_draft_tokens",
    "accepted": "spec_decode_num_accepted_tokens",
}
SPARDA_SETTINGS = {
    **SPARDA_SELECTION,
    "host_gib": 0.06,
    "slab_gib": 1.7 / 1024,
    "staging_blocks": 4,
    "poison": True,
}


# One process for engine, scheduler and worker, of which run_forked has one that is warm.
IN_PROCESS = {
    "VLLM_CPU_CI_ENV": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


def run_engine(
    model: Path,
    prompts: list[list[int]],
    *,
    settings: dict[str, Any] | None = None,
    backend: str = "rocketkv",
    waves: int = 1,
    new_tokens: int | list[int] = NEW_TOKENS,
    env: dict[str, str] | None = None,
    stand_ins: tuple[str, ...] = (),
    in_process: bool = True,
    adapter: Path | None = None,
    adapted: list[bool] | None = None,
    asked: list[dict[str, Any] | None] | None = None,
    timeout: float = 900,
    **llm: Any,
) -> dict[str, Any]:
    """Generate greedily, in float32 unless ``llm`` says otherwise.

    Args:
        model: Checkpoint folder.
        prompts: Token ids.
        settings: ``vllm_sparse`` settings; ``None`` runs stock vLLM.
        backend: Attention backend if there are settings.
        waves: How often to send all prompts, to one engine.
        new_tokens: Tokens to generate for each prompt, or for each of ``asked``.
        env: Additional environment.
        stand_ins: Functions of :mod:`.stand_ins` to call before vLLM starts.
        in_process: Engine, scheduler and worker in one process.
        adapter: Folder of a LoRA adapter.
        adapted: Which prompts use it; ``None``: every one.
        asked: What each request says of itself (``vllm_xargs``), one after the other; the waves
            take turns if there are more than prompts.
        timeout: Seconds.
        **llm: Arguments of ``LLM``.

    Returns:
        ``tokens[wave][request]``, ``cached[wave][request]`` (prefix-cache hits in tokens),
        ``counters`` (of scheduler and workers, added up), ``preemptions``, ``drafted`` and
        ``accepted`` tokens, ``free_blocks`` ``[before, after]``, ``launches`` of our Triton kernels
        (if interpreted in process), ``replays`` of graphs (on a pretended GPU), ``pieces`` that
        vLLM has compiled or left out, ``asynchronous`` (whether a step is scheduled before the one
        ahead of it has ended), ``huge_pages`` (whether a cache of a CPU asks for them) and
        ``copy_threads`` after the engine has shut down (both if in process) and ``log``.
    """
    arguments = {
        "max_model_len": 1024,
        "kv_cache_memory_bytes": 64 << 20,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 2048,
        "dtype": "float32",
        **llm,
    }
    if adapter is not None:
        arguments |= {"enable_lora": True, "max_lora_rank": 8}
    if settings is not None:
        arguments["attention_backend"] = backend
        further = arguments.get("additional_config", {})
        arguments["additional_config"] = {**further, "vllm_sparse": settings}
    on_gpu_path = (settings or {}).get("kernels") == "triton"
    environment = {
        **({"TRITON_INTERPRET": "1"} if on_gpu_path else {}),
        **IN_PROCESS,
        **({} if in_process else {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}),
        **(env or {}),
    }
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        job = {
            "model": str(model),
            "prompts": prompts,
            "waves": waves,
            "new_tokens": new_tokens,
            "llm": arguments,
            "adapter": adapter and str(adapter),
            "adapted": adapted or [adapter is not None] * len(prompts),
            "asked": asked or [None] * len(prompts),
            "stand_ins": [name for name in stand_ins if name],
            "result": str(result),
        }
        log = run_forked("support.engine", job, environment, timeout)
        return {**json.loads(result.read_text()), "log": log}


def serve(job: dict[str, Any]) -> None:
    """Do what :func:`run_engine` was asked for, in a process with nothing else to do."""
    from support import adversary, pretend_gpu, stand_ins

    for name in job["stand_ins"]:
        getattr(stand_ins, name)()
    from vllm import LLM, SamplingParams

    adversary.start_over(0)  # of a warm-up, nobody reads what it leaves
    llm = LLM(
        model=job["model"],
        skip_tokenizer_init=True,
        seed=0,
        disable_log_stats=False,
        **{"enforce_eager": True, **job["llm"]},
    )
    adversary.start_over(1)
    asked, counts = job["asked"], job["new_tokens"]
    sampling = [
        SamplingParams(
            max_tokens=count, temperature=0, ignore_eos=True, detokenize=False,
            extra_args=extra_args,
        )
        for extra_args, count in zip(
            asked, counts if isinstance(counts, list) else [counts] * len(asked), strict=True
        )
    ]  # fmt: skip
    requests = None
    if job["adapter"]:
        from vllm.lora.request import LoRARequest

        request = LoRARequest("adapter", 1, job["adapter"])
        requests = [request if wanted else None for wanted in job["adapted"]]
    result: dict[str, Any] = {"tokens": [], "cached": []}
    before = _free_blocks(llm)
    count = len(job["prompts"])
    for wave in range(job["waves"]):
        first = wave * count % len(sampling)
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in job["prompts"]],
            sampling[first : first + count],
            use_tqdm=False,
            lora_request=requests,
        )
        result["tokens"].append([list(output.outputs[0].token_ids) for output in outputs])
        result["cached"].append([output.num_cached_tokens for output in outputs])
    from vllm.compilation.counter import compilation_counter

    from vllm_sparse import metrics
    from vllm_sparse.instance import instance_of
    from vllm_sparse.metrics.published import read

    counted = metrics.counters()._values
    if before is None and "attention_backend" in job["llm"]:
        counted = read(metrics.folder(instance_of(llm.llm_engine.vllm_config).name))
    result["launches"] = dict(adversary.LAUNCHES)
    result["replays"] = pretend_gpu.Graph.replays
    scheduling = llm.llm_engine.vllm_config.scheduler_config
    result["asynchronous"] = bool(scheduling.async_scheduling)
    result["pieces"] = compilation_counter.num_piecewise_graphs_seen
    result["counters"] = {"/".join(filter(None, key)): value for key, value in counted.items()}
    for key, name in _METRICS.items():
        result[key] = sum(
            metric.value for metric in llm.get_metrics() if metric.name == f"vllm:{name}"
        )
    result["free_blocks"] = [before, _free_blocks(llm)]
    if before is not None:
        result["huge_pages"] = _on_huge_pages(llm)
        llm.llm_engine.engine_core.shutdown()
        result["copy_threads"] = [thread.name for thread in threading.enumerate()].count(
            "sparda-copy"
        )
    Path(job["result"]).write_text(json.dumps(result))


def _on_huge_pages(llm: Any) -> bool:
    """Of the middle of a cache: its borders lie on pages of others, too."""
    context = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    caches = [getattr(layer, "kv_cache", None) for layer in context.values()]
    return any(
        "hg" in advice_of(cache[len(cache) // 2])
        for cache in caches
        if isinstance(cache, torch.Tensor) and cache.device.type == "cpu" and cache.numel()
    )


def _free_blocks(llm: Any) -> int | None:
    core = getattr(llm.llm_engine.engine_core, "engine_core", None)
    if core is None:
        return None
    return core.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
