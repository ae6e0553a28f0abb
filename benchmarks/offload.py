# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What SPARDA's host-resident KV cache saves, costs and survives.

* ``memory``: device bytes per request, read from the live objects, against stock vLLM's KV bytes.
* ``overlap``: waiting time and step time at forced miss rates, with and without prefetch, with a
  copy engine of fixed bandwidth.
* ``serve``: requests whose KV exceeds the device's frames several times, against stock vLLM with
  memory for all of them.

On a CPU, host and device are two pools in the same memory; the copy engine is a thread.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import corpus, harness, live, overlap, speed
from benchmarks.capacity import serve_all as serve_all  # a command of this module's workers too
from benchmarks.engine import Worker
from benchmarks.harness import GIB, Arm

if TYPE_CHECKING:
    from collections.abc import Iterator

TINY = "tiny"
TINY_SHAPE = {"layers": 2, "hidden": 128, "heads": 4, "kv_heads": 2, "head_dim": 64, "vocab": 1024}


# Commands, executed in the worker process.


def occupy(llm, prompts: list[list[int]], steps: int) -> dict:
    """Lets requests decode some steps and returns what they occupy meanwhile."""
    speed.begin(llm, prompts, max_tokens=steps + 64 * len(prompts))
    speed.decode(llm, steps, len(prompts))
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    result = {
        "blocks": pool.num_gpu_blocks - 1 - pool.get_num_free_blocks(),  # one is the null block
        "num_blocks": pool.num_gpu_blocks,
        "block_tokens": scheduler.block_size,
        "cache_bytes": llm.collective_rpc(live.cache_bytes)[0],
    }
    if _is_sparda(llm):
        result |= llm.collective_rpc(live.sparda_memory)[0]
        llm.collective_rpc(live.check_integrity)
    speed.finish(llm)
    return result


def memory_of(llm) -> dict:
    """Checks SPARDA's tables and returns the bytes of its pools; empty for stock vLLM."""
    if not _is_sparda(llm):
        return {}
    llm.collective_rpc(live.check_integrity)
    return llm.collective_rpc(live.sparda_memory)[0]


def _is_sparda(llm) -> bool:
    backend = llm.llm_engine.vllm_config.attention_config.backend
    return backend is not None and backend.name == "SPARDA"


# Memory.

_CELL = re.compile(r"(.+)-(\d+)")
_MEMORY_ARM = re.compile(r"sparda-(\d+)(?:-local-(\d+))?")


def memory_arm(name: str, settings: dict) -> Arm:
    """Returns stock vLLM for ``dense``, SPARDA for ``sparda-BLOCKS`` or ``...-local-BLOCKS``."""
    if name == "dense":
        return Arm(name)
    match = _MEMORY_ARM.fullmatch(name)
    if match is None:
        raise ValueError(f"unknown arm {name!r}: expected dense or sparda-BLOCKS[-local-BLOCKS]")
    own = {"dense_len": 0, "top_k": int(match[1]), "local_blocks": int(match[2] or 2)}
    return Arm(name, {**settings, **own}, "SPARDA")


def measure_memory(cell: str, options: argparse.Namespace, arms: list[Arm]) -> dict:
    """Measures one model and context on all arms."""
    match = _CELL.fullmatch(cell)
    if match is None:
        raise ValueError(f"unknown cell {cell!r}: expected MODEL-TOKENS")
    name, context = match[1], int(match[2])
    generated = options.steps + 64 * options.requests
    with contextlib.ExitStack() as stack:
        overrides: dict = {"enforce_eager": True, "max_num_seqs": options.requests}
        if name == TINY:
            model = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vllm-sparse-")))
            prompts = _tiny_model(model, context, options.requests, context - generated)
            overrides["skip_tokenizer_init"] = True
        else:
            model = harness.resolve_model(name)
            prompts = corpus.documents_for(model, options.requests, context - generated)
        pool_tokens = options.requests * context
        arguments = harness.engine_args(model, context, pool_tokens, **overrides)
        results = {}
        for arm in arms:
            with Worker("benchmarks.offload", arm, arguments) as worker:
                found = worker.call("occupy", prompts=prompts, steps=options.steps)
            results[arm.name] = _per_request(found, options.requests) | {"settings": arm.settings}
            harness.progress(
                f"{cell}: {arm.name}: {results[arm.name]['device_bytes'] / 2**20:.1f} MiB a request"
            )
    dense = results[arms[0].name]["device_bytes"]
    for row in results.values():
        row["times_less_than_dense"] = dense / row["device_bytes"]
    tokens = context - generated + options.steps + 1
    return {"model": name, "context": context, "tokens": tokens, "arms": results}


def _per_request(found: dict, requests: int) -> dict:
    """Divides what was found among the requests.

    A pool's part is its bytes per block times the blocks in use; frames, staging and the part of
    the page table that belongs to frames are what the requests use together.
    """
    share = found["blocks"] / found["num_blocks"] / requests
    parts = {"kv_cache" if "slab" not in found else "compressed_keys": found["cache_bytes"] * share}
    host = 0.0
    if "slab" in found:
        parts["frames"] = found["working_set"] / requests
        parts["staging"] = found["staging"] / requests
        parts["page_table"] = found["page_table"] * share
        host = found["host"] * share
    return {
        "device_bytes": round(sum(parts.values())),
        "parts": {key: round(value) for key, value in parts.items()},
        "host_bytes": round(host),
        "measured": found,
    }


def _tiny_model(folder: Path, context: int, count: int, num_tokens: int) -> list[list[int]]:
    """Writes a random model for long contexts and returns random prompts."""
    from tests.reference.hf_rocketkv import save_random_llama

    save_random_llama(folder, max_position_embeddings=context, **TINY_SHAPE)
    rng = random.Random(0)
    return [[rng.randrange(TINY_SHAPE["vocab"]) for _ in range(num_tokens)] for _ in range(count)]


def run_memory(options: argparse.Namespace, settings: dict) -> Iterator[dict]:
    """Runs ``memory``, writing what is there after each cell."""
    arms = [memory_arm(name, settings) for name in options.arms.split(",")]
    if arms[0].settings is not None:
        raise ValueError("the first arm must be dense: the others are compared with it")
    cells = []
    for cell in options.cells:
        cells.append(measure_memory(cell, options, arms))
        yield {"requests": options.requests, "cells": cells}


# Serve.


def run_serve(options: argparse.Namespace, settings: dict) -> Iterator[dict]:
    """Runs ``serve``: stock vLLM with memory for all requests, then SPARDA."""
    model = harness.resolve_model(options.model)
    prompts = corpus.documents_for(model, options.requests, options.context - options.generate)
    arguments = harness.engine_args(
        model,
        options.context,
        options.requests * options.context,
        enforce_eager=options.eager,
        max_num_seqs=options.requests,
    )
    kv_bytes = options.requests * options.context * harness.kv_bytes_per_token(model)
    own = {
        **{"init_blocks": 1, "local_blocks": 2, "dense_len": 0, **settings},
        "top_k": options.top_k,
        "slab_gib": kv_bytes / options.times / GIB,
    }
    results: dict[str, dict] = {}
    outputs: dict[str, dict] = {}
    for arm in (Arm("dense"), Arm(f"sparda-{options.top_k}", own, "SPARDA")):
        with Worker("benchmarks.offload", arm, arguments) as worker:
            served = worker.call("serve_all", prompts=prompts, max_tokens=options.generate)
            pools = worker.call("memory_of")
        outputs[arm.name] = served["outputs"]
        stock = outputs["dense"]
        lengths = [len(tokens) for tokens in served["outputs"].values()]
        usage = max(step["usage"] for step in served["steps"])
        results[arm.name] = {
            "settings": arm.settings,
            "finished": len(lengths),
            "lost": options.requests - len(lengths),
            "complete": sum(length == options.generate for length in lengths),
            "preemptions": served["metrics"]["vllm:num_preemptions"],
            "peak_running": max(step["running"] for step in served["steps"]),
            "seconds": round(served["seconds"], 2),
            "peak_pool_usage": usage,
            "kv_over_slab": usage * pools["host"] / pools["slab"] if pools else None,
            "pools": pools,
            "tokens_before_difference": harness.summary(
                [_common(tokens, stock[key]) for key, tokens in served["outputs"].items()]
            ),
            "metrics": {k: v for k, v in served["metrics"].items() if k.startswith("vllm:sparse")},
        }
        row = {key: results[arm.name][key] for key in ("finished", "lost", "preemptions")}
        harness.progress(f"{arm.name}: {json.dumps(row)}")
        yield {
            "model": options.model,
            "requests": options.requests,
            "prompt_tokens": options.context - options.generate,
            "generated_tokens": options.generate,
            "arms": results,
        }


def _common(left: list[int], right: list[int]) -> int:
    """Leading tokens that are equal."""
    for index, pair in enumerate(zip(left, right, strict=False)):
        if pair[0] != pair[1]:
            return index
    return min(len(left), len(right))


# Command line.

QUICK = {
    "memory": {"cells": ["smollm2-2048", f"{TINY}-8192"], "arms": "dense,sparda-16"},
    "overlap": {
        **{"model": "smollm2", "context": 1536, "batch": 2, "rates": [0.0, 0.2, 0.4], "steps": 4},
        **{"rounds": 1, "link_steps": 4, "top_k": 8, "eager": True},
    },
    "serve": {
        **{"context": 1024, "generate": 16, "requests": 10, "top_k": 4, "eager": True},
    },
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.offload", description=__doc__)
    kinds = parser.add_subparsers(dest="kind", required=True)
    memory, waits, serve = (kinds.add_parser(name) for name in QUICK)
    memory.add_argument(
        "--cells",
        nargs="+",
        default=["smollm2-8192", "qwen-32768", f"{TINY}-131072"],
        metavar="MODEL-TOKENS",
        help="model and context; tiny is a random model of two layers",
    )
    memory.add_argument(
        "--arms",
        default="dense,sparda-96-local-32,sparda-32",
        help="comma-separated; dense first, then sparda-BLOCKS[-local-BLOCKS]",
    )
    memory.add_argument("--requests", type=int, default=1)
    memory.add_argument("--steps", type=int, default=16, help="decode steps before looking")
    waits.add_argument("--model", default="qwen", help="name, alias (smollm2, qwen) or path")
    waits.add_argument("--context", type=int, default=8192, help="prompt and generation, tokens")
    waits.add_argument("--batch", type=int, default=4)
    waits.add_argument("--rates", nargs="+", type=float, default=[0.0, 0.05, 0.1, 0.2, 0.4])
    waits.add_argument("--steps", type=int, default=48, help="per turn")
    waits.add_argument("--rounds", type=int, default=3, help="turns of each arm and rate")
    waits.add_argument(
        "--link-gb-per-s",
        type=float,
        help="rate of the copy engine; by default the misses of a layer take as long as the layer "
        f"at {overlap.LINK_MISS_RATE:.0%}% misses",
    )
    waits.add_argument("--link-steps", type=int, default=32, help="to find that rate")
    serve.add_argument("--model", default="smollm2", help="name, alias (smollm2, qwen) or path")
    serve.add_argument("--context", type=int, default=8192, help="prompt and generation, tokens")
    serve.add_argument("--generate", type=int, default=128, help="tokens per request")
    serve.add_argument("--requests", type=int, default=10)
    serve.add_argument("--times", type=float, default=4.0, help="KV of all requests over the slab")
    for one in (waits, serve):
        one.add_argument("--top-k", type=int, default=32 if one is waits else 16, help="blocks")
        one.add_argument("--eager", action="store_true", help="no torch.compile: faster start")
    for name, one in zip(QUICK, (memory, waits, serve), strict=True):
        one.add_argument("--setting", nargs="+", default=[], metavar="KEY=JSON", help="of SPARDA")
        one.add_argument("--quick", action="store_true", help="tiny sizes")
        one.add_argument("--out", type=Path, default=harness.RESULTS_DIR / f"{name}.json")
    return parser


def main() -> None:
    """Command line entry point."""
    parser = _parser()
    options = parser.parse_args()
    if options.quick:
        for key, value in QUICK[options.kind].items():
            setattr(options, key, value)
    harness.exit_cleanly()
    environment = harness.environment()
    run = {"memory": run_memory, "overlap": overlap.run, "serve": run_serve}[options.kind]
    try:
        for body in run(options, harness.parse_settings(options.setting)):
            harness.write_result(options.out, options.kind, environment, body)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
