# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What SPARDA's host-resident KV cache saves, costs and survives.

* ``memory``: device bytes per request, read from the live objects, against stock vLLM's KV bytes.
* ``overlap``: waiting time and step time at forced miss rates, with and without prefetch, with a
  copy engine of fixed bandwidth (`benchmarks.overlap`).
* ``serve``: requests whose KV exceeds the device's frames several times, against stock vLLM with
  memory for all of them.

On a CPU, host and device are two pools in the same memory; the copy engine is a thread.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import arms, commands, corpus, harness, overlap
from benchmarks.arms import GIB
from benchmarks.gpu.shapes import random_prompt, save_random_llama
from benchmarks.results import FOLDER, Recorder
from benchmarks.worker import Worker

TINY = "tiny"
TINY_SHAPE = {"layers": 2, "hidden": 128, "heads": 4, "kv_heads": 2, "head_dim": 64, "vocab": 1024}


def measure_memory(cell: str, options: argparse.Namespace, chosen: list[arms.Arm]) -> dict:
    """Measures one model and context, named MODEL-TOKENS, on all arms."""
    name, _, tokens = cell.rpartition("-")
    if not (name and tokens.isdigit()):
        raise ValueError(f"unknown cell {cell!r}: expected MODEL-TOKENS")
    context = int(tokens)
    generated = options.steps + 64 * options.requests
    with contextlib.ExitStack() as stack:
        overrides: dict = {"enforce_eager": True, "max_num_seqs": options.requests}
        if name == TINY:
            model = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vllm-sparse-")))
            save_random_llama(model, max_position_embeddings=context, **TINY_SHAPE)
            prompts = [
                random_prompt(number, context - generated, TINY_SHAPE["vocab"])
                for number in range(options.requests)
            ]
            overrides["skip_tokenizer_init"] = True
        else:
            model = harness.resolve_model(name)
            prompts = corpus.documents(
                harness.tokenizer_of(str(model)), options.requests, context - generated
            )
        arguments = harness.engine_args(model, context, options.requests * context, **overrides)
        rows: dict[str, dict] = {}
        for arm in chosen:
            with Worker(arm, arguments) as worker:
                found = worker.call("occupy", prompts=prompts, steps=options.steps)
            row = rows[arm.name] = per_request(found, options.requests)
            row["settings"] = arm.settings
            row["times_less_than_dense"] = (
                rows[chosen[0].name]["device_bytes"] / row["device_bytes"]
            )
            harness.progress(f"{cell}: {arm.name}: {row['device_bytes'] / 2**20:.1f} MiB a request")
    tokens_held = context - generated + options.steps + 1
    return {"model": name, "context": context, "tokens": tokens_held, "arms": rows}


def per_request(found: dict, requests: int) -> dict[str, Any]:
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


def run_memory(options: argparse.Namespace, settings: dict) -> None:
    """Runs ``memory``."""
    chosen = [arms.parse_arm(name, settings) for name in options.arms.split(",")]
    if chosen[0].settings is not None:
        raise ValueError("the first arm must be dense: the others are compared with it")
    body: dict = {"requests": options.requests, "cells": []}
    with Recorder(options.out, "memory", body) as record:
        for cell in options.cells:
            body["cells"].append(measure_memory(cell, options, chosen))
            record.save()


def run_serve(options: argparse.Namespace, settings: dict) -> None:
    """Runs ``serve``: stock vLLM with memory for all requests, then SPARDA."""
    model = harness.resolve_model(options.model)
    prompts = corpus.documents(
        harness.tokenizer_of(str(model)), options.requests, options.context - options.generate
    )
    arguments = harness.engine_args(
        model, options.context, options.requests * options.context, enforce_eager=options.eager,
        max_num_seqs=options.requests,
    )  # fmt: skip
    kv_bytes = options.requests * options.context * harness.kv_bytes_per_token(model)
    settings = {**settings, "slab_gib": kv_bytes / options.times / GIB}
    body: dict = {
        "model": options.model,
        "requests": options.requests,
        "prompt_tokens": options.context - options.generate,
        "generated_tokens": options.generate,
        "arms": {},
    }
    stock: dict[str, list[int]] = {}
    with Recorder(options.out, "serve", body) as record:
        for arm in (arms.Arm(arms.DENSE), arms.parse_arm(f"sparda-{options.top_k}", settings)):
            with Worker(arm, arguments) as worker:
                served = worker.call("serve_all", prompts=prompts, max_tokens=options.generate)
                pools = worker.call("memory_of")
            stock = stock or served["outputs"]
            row = body["arms"][arm.name] = _served(arm, served, pools, stock, options)
            record.save()
            shown = {key: row[key] for key in ("finished", "lost", "preemptions")}
            harness.progress(f"{arm.name}: {json.dumps(shown)}")


def _served(
    arm: arms.Arm, served: dict, pools: dict, stock: dict, options: argparse.Namespace
) -> dict[str, Any]:
    lengths = [len(tokens) for tokens in served["outputs"].values()]
    usage = max(step["usage"] for step in served["steps"])
    return {
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
        "metrics": commands.of_the_plugin(served["metrics"]),
    }


def _common(left: list[int], right: list[int]) -> int:
    """Leading tokens that are equal."""
    pairs = zip(left, right, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


QUICK = {
    "memory": {"cells": ["smollm2-2048", f"{TINY}-8192"], "arms": "dense,sparda-16"},
    "overlap": {
        **{"model": "smollm2", "context": 1536, "batch": 2, "rates": [0.0, 0.2, 0.4], "steps": 4},
        **{"rounds": 1, "link_steps": 4, "top_k": 8, "eager": True},
    },
    "serve": {"context": 1024, "generate": 16, "requests": 10, "top_k": 4, "eager": True},
}
RUNS = {"memory": run_memory, "overlap": overlap.run, "serve": run_serve}


def _parser(quick: bool) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.offload", description=__doc__)
    kinds = parser.add_subparsers(dest="kind", required=True)
    memory, waits, serve = (kinds.add_parser(name) for name in RUNS)
    memory.add_argument(
        "--cells", nargs="+", default=["smollm2-8192", "qwen-32768", f"{TINY}-131072"],
        metavar="MODEL-TOKENS", help="model and context; tiny is a random model of two layers",
    )  # fmt: skip
    memory.add_argument(
        "--arms",
        default="dense,sparda-96-local-32,sparda-32",
        help="comma-separated; dense first, then sparda-BLOCKS[-local-BLOCKS]",
    )
    memory.add_argument("--requests", type=int, default=1)
    memory.add_argument("--steps", type=int, default=16, help="decode steps before looking")
    overlap.add_options(waits)
    serve.add_argument("--generate", type=int, default=128, help="tokens per request")
    serve.add_argument("--requests", type=int, default=10)
    serve.add_argument("--times", type=float, default=4.0, help="KV of all requests over the slab")
    for one, model, top_k in ((waits, "qwen", 32), (serve, "smollm2", 16)):
        harness.add_model(one, model)
        one.add_argument("--context", type=int, default=8192, help="prompt and generation, tokens")
        one.add_argument("--top-k", type=int, default=top_k, help="blocks")
        one.add_argument("--eager", action="store_true", help="no torch.compile: faster start")
    for name, one in zip(RUNS, (memory, waits, serve), strict=True):
        one.add_argument("--setting", nargs="+", default=[], metavar="KEY=JSON", help="of SPARDA")
        one.add_argument("--quick", action="store_true", help="tiny sizes")
        one.add_argument("--out", type=Path, default=FOLDER / f"{name}.json")
        one.set_defaults(**QUICK[name] if quick else {})
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Command line entry point."""
    harness.exit_cleanly()
    parser = _parser(_parser(False).parse_args(arguments).quick)
    options = parser.parse_args(arguments)
    try:
        RUNS[options.kind](options, arms.parse_settings(options.setting))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
