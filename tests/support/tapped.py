# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Runs engines with taps and stock attention in a process of their own, and keeps what they saw."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from support.forked import run_forked
from vllm_sparse.errors import UnsupportedError

if TYPE_CHECKING:
    from pathlib import Path

PROMPT_TOKENS, NEW_TOKENS, KV_HEADS, DIM = 150, 6, 2, 32


def case(
    model: Path, settings: dict[str, Any] | None, *, reload: bool = False, **llm: Any
) -> dict[str, Any]:
    """One engine: model, settings of SPARDA (None: all stock), arguments of ``LLM``.

    With ``reload``, it gets new weights after the prompt.
    """
    return {"model": str(model), "settings": settings, "reload": reload, "llm": llm}


def run_tapped(
    folder: Path, cases: dict[str, Any], *, enforce_eager: bool = True, in_process: bool = True
) -> dict[str, Any]:
    """Serve one prompt greedily with stock attention, in one engine after the other.

    Args:
        folder: For files.
        cases: From :func:`case`, by name; those with settings are routed and tapped.
        enforce_eager: Off: compiled, from an empty cache.
        in_process: Engine and worker in one process; else no snapshots are taken.

    Returns:
        ``log`` and by case: ``tokens``, ``models`` (class of each worker), ``weights`` (of each
        worker's taps), ``reloaded`` (the same after new ones were loaded), ``refused`` (why each
        worker would not take them in the format of kernels), and ``seen``: per pass
        ("prefill" and "decode") and layer, what that layer's attention found in its own tap and in
        the one before. ``rotated``: by layer, random values and their rotation.
    """
    folder.mkdir(exist_ok=True)
    result = folder / "result.pt"
    job = {
        "cases": cases,
        "enforce_eager": enforce_eager,
        "in_process": in_process,
        "result": str(result),
    }
    env = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0" if in_process else "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    }
    if enforce_eager:
        env["VLLM_CPU_CI_ENV"] = "1"
    else:
        env["VLLM_CACHE_ROOT"] = str(folder / "cache")
    log = run_forked("support.tapped", job, env, timeout=900)
    return {**torch.load(result), "log": log}


def prompt() -> list[int]:
    return torch.randint(
        1024, (PROMPT_TOKENS,), generator=torch.Generator().manual_seed(3)
    ).tolist()


def _model_class(worker: Any) -> str:
    return type(worker.model_runner.model).__name__


def _tap_weights(worker: Any) -> list[torch.Tensor]:
    layers = worker.vllm_config.compilation_config.static_forward_context.values()
    taps = [getattr(layer, "sparda_tap", None) for layer in layers]
    return [tap.weight.clone() for tap in taps if tap is not None]


def _reload(worker: Any, path: str) -> str:
    """Load weights into the served model: queries times four, then their norms times two.

    Returns:
        Why it would not take them in the format of kernels.
    """
    from safetensors.torch import load_file

    weights = load_file(f"{path}/model.safetensors")
    factors = {"q_proj": 4, "q_norm": 2}
    changed = [(name, w * factors.get(name.split(".")[-2], 1)) for name, w in weights.items()]
    changed.sort(key=lambda item: ".q_norm." in item[0])  # after what they follow
    refused = ""
    try:
        worker.reload_weights(weights_iterator=iter(()), is_checkpoint_format=False)
    except UnsupportedError as error:
        refused = str(error)
    worker.reload_weights(weights_iterator=iter(changed))
    return refused


def _serve(case: dict[str, Any], enforce_eager: bool, in_process: bool) -> dict[str, Any]:
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

    import vllm_sparse.startup as guard
    from vllm_sparse.forecast.routing import route_model

    arguments = {
        "max_model_len": 512,
        "max_num_batched_tokens": 512,
        "kv_cache_memory_bytes": 32 << 20,
        "max_num_seqs": 4,
        **case["llm"],
    }
    if case["settings"] is None:
        guard.check_config = lambda *_: None
    else:  # as if SPARDA were chosen, whose attention is not tested here
        guard.check_config = lambda config, *_: config.model_config and route_model(config)
        arguments["additional_config"] = {"vllm_sparse": case["settings"]}
    seen: dict[str, dict] = {"prefill": {}, "decode": {}}
    layers: dict[int, Any] = {}
    stock = CPUAttentionBackendImpl.forward

    def forward(self, layer, query, *args, **kwargs):
        index = int(layer.layer_name.split(".")[2])
        step = {PROMPT_TOKENS: "prefill", 1: "decode"}.get(query.shape[0])
        if layers and step and index not in seen[step]:
            taps = [getattr(layers.get(i), "sparda_tap", None) for i in (index, index - 1)]
            seen[step][index] = [
                None if tap is None else tap.values[: query.shape[0]].clone() for tap in taps
            ]
        return stock(self, layer, query, *args, **kwargs)

    CPUAttentionBackendImpl.forward = forward
    try:
        llm = LLM(
            model=case["model"],
            skip_tokenizer_init=True,
            dtype="float32",
            seed=0,
            enforce_eager=enforce_eager,
            **arguments,
        )
        rotated = {}
        if in_process:
            context = llm.llm_engine.vllm_config.compilation_config.static_forward_context
            layers.update((int(name.split(".")[2]), layer) for name, layer in context.items())
            generator = torch.Generator().manual_seed(4)
            positions = torch.randint(500, (9,), generator=generator)
            for index, layer in layers.items():
                tap = getattr(layer, "sparda_tap", None)
                if tap is not None:
                    values = torch.randn(9, KV_HEADS, DIM, generator=generator)
                    before = values.clone()
                    rotated[index] = positions, values, tap.rotate(positions, values)
                    assert torch.equal(values, before)
        sampling = SamplingParams(
            max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True, detokenize=False
        )
        output = llm.generate([{"prompt_token_ids": prompt()}], sampling, use_tqdm=False)[0]
        models, weights = (llm.collective_rpc(each) for each in (_model_class, _tap_weights))
        reloaded, refused = None, None
        if case["reload"]:
            refused = llm.collective_rpc(_reload, args=(case["model"],))
            reloaded = llm.collective_rpc(_tap_weights)
        return {
            "tokens": list(output.outputs[0].token_ids),
            "seen": seen,
            "rotated": rotated,
            "models": models,
            "weights": weights,
            "reloaded": reloaded,
            "refused": refused,
        }
    finally:
        CPUAttentionBackendImpl.forward = stock
        if in_process:
            cleanup_dist_env_and_memory()


def serve(job: dict[str, Any]) -> None:
    """Do what :func:`run_tapped` was asked for, in a process with nothing else to do."""
    results = {
        name: _serve(case, job["enforce_eager"], job["in_process"])
        for name, case in job["cases"].items()
    }
    torch.save(results, job["result"])
