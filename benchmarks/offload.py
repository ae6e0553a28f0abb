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

from benchmarks import corpus, harness, live, speed
from benchmarks.capacity import serve_all as serve_all  # a command of this module's workers too
from benchmarks.engine import Worker
from benchmarks.harness import GIB, Arm

if TYPE_CHECKING:
    from collections.abc import Iterator

BLOCK = 64
TINY = "tiny"
TINY_SHAPE = {"layers": 2, "hidden": 128, "heads": 4, "kv_heads": 2, "head_dim": 64, "vocab": 1024}
SETTLING_STEPS = 3  # after the miss rate has changed
LINK_MISS_RATE = 0.15  # at which the copies of a layer take as long as the layer


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


def begin_forced(llm, prompts: list[list[int]], max_tokens: int) -> dict:
    """Brings requests to decode, then takes over the selection."""
    speed.begin(llm, prompts, max_tokens)
    llm.collective_rpc(live.force_selection)
    return llm.collective_rpc(live.shape)[0]


def forced(llm, rate: float, steps: int, batch: int) -> dict:
    """Decodes at a forced miss rate and returns the seconds of each step, and what was counted."""
    llm.collective_rpc(live.set_rate, args=(rate,))
    speed.decode(llm, 0, batch, dropped=SETTLING_STEPS)
    before = llm.collective_rpc(live.forced_counts)[0]
    seconds = speed.decode(llm, steps, batch)
    after = llm.collective_rpc(live.forced_counts)[0]
    return {"seconds": seconds, "counts": {key: after[key] - before[key] for key in after}}


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
            prompts = _documents(model, options.requests, context - generated)
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


def _documents(model: Path, count: int, num_tokens: int) -> list[list[int]]:
    from transformers import AutoTokenizer

    return corpus.documents(AutoTokenizer.from_pretrained(model), count, num_tokens)


def run_memory(options: argparse.Namespace, settings: dict) -> Iterator[dict]:
    """Runs ``memory``, writing what is there after each cell."""
    arms = [memory_arm(name, settings) for name in options.arms.split(",")]
    if arms[0].settings is not None:
        raise ValueError("the first arm must be dense: the others are compared with it")
    cells = []
    for cell in options.cells:
        cells.append(measure_memory(cell, options, arms))
        yield {"requests": options.requests, "cells": cells}


# Overlap.


def overlap_arms(options: argparse.Namespace, settings: dict) -> dict[str, dict]:
    """Returns the settings of each arm but the link's rate and the sizes of the pools."""
    common = {"init_blocks": 1, "local_blocks": 2, "top_k": options.top_k, **settings}
    # The selection that is forced later is known a layer ahead, whatever the engine starts with.
    common |= {"dense_len": 0, "selector": "query"}
    return {
        "resident": {**common, "resident": True},
        "no prefetch": {**common, "prefetch": False},
        "prefetch": common,
        "no prefetch, layer 0 resident": {
            **common,
            "prefetch": False,
            "resident_first_layer": True,
        },
        "prefetch, layer 0 resident": {**common, "resident_first_layer": True},
    }


def run_overlap(options: argparse.Namespace, settings: dict) -> Iterator[dict]:
    """Runs ``overlap``: all arms are alive at once and measured in turns."""
    model = harness.resolve_model(options.model)
    turns = options.rounds * len(options.rates)
    generated = turns * (options.steps + SETTLING_STEPS) + options.link_steps + SETTLING_STEPS
    generated += 64  # what the first request generates before the last one begins
    prompts = _documents(model, options.batch, options.context - generated)
    arguments = harness.engine_args(
        model,
        options.context,
        options.batch * options.context,
        enforce_eager=options.eager,
        max_num_seqs=options.batch,
    )
    sizes = _sizes(model, options)
    link = options.link_gb_per_s
    frames: dict[str, list[int]] = {}
    rows: dict[tuple[str, float], list[dict]] = {}
    with contextlib.ExitStack() as stack:
        workers = []
        for name, own in overlap_arms(options, settings).items():
            own = {**own, "host_gib": sizes["host_gib"]}
            if name != "resident":
                own["link_gb_per_s"] = link
                first = own.get("resident_first_layer", False)
                own["slab_gib"] = sizes["slab_gib_first" if first else "slab_gib"]
            arm = Arm(name, own, "SPARDA")
            worker = stack.enter_context(Worker("benchmarks.offload", arm, arguments))
            shape = worker.call("begin_forced", prompts=prompts, max_tokens=generated)
            frames[name] = shape.pop("frames")
            harness.progress(f"{name}: frames in each layer {frames[name]}")
            if name == "resident" and link is None:
                link = _link(worker, options, shape)
                harness.progress(f"link: {link:.3f} GB/s")
            worker.pause()
            workers.append(worker)
        for turn in range(turns):
            rate = options.rates[turn % len(options.rates)]
            for worker in workers if turn % 2 == 0 else workers[::-1]:
                with worker.running():
                    found = worker.call(
                        "forced", rate=rate, steps=options.steps, batch=options.batch
                    )
                _check(worker.arm, rate, found["counts"], shape["piece_bytes"])
                rows.setdefault((worker.arm.name, rate), []).append(found)
            harness.progress(f"turn {turn + 1} of {turns}")
    settings_of = {worker.arm.name: worker.arm.settings for worker in workers}
    cells = [_overlap_row(name, rate, found) for (name, rate), found in rows.items()]
    yield {
        "model": options.model,
        "context": options.context,
        "batch": options.batch,
        "top_k": options.top_k,
        "link_gb_per_s": link,
        "shape": shape,
        "frames": frames,
        "settings": settings_of,
        "rows": cells,
    }


def _sizes(model: Path, options: argparse.Namespace) -> dict[str, float]:
    """Host and slab GiB; the slab is exactly the working set of one step."""
    config = json.loads((model / "config.json").read_text())
    layers, kv_heads = config["num_hidden_layers"], config["num_key_value_heads"]
    piece = BLOCK * harness.kv_bytes_per_token(model) // (layers * kv_heads)
    blocks = options.batch * -(-options.context // BLOCK) + 2
    working_set = options.batch * kv_heads * options.top_k
    half = 0.5 * piece  # against rounding
    return {
        "host_gib": (blocks * kv_heads * layers * piece + half) / GIB,
        "slab_gib": (working_set * layers * piece + half) / GIB,
        "slab_gib_first": ((working_set * (layers - 1) + blocks * kv_heads) * piece + half) / GIB,
    }


def _link(worker: Worker, options: argparse.Namespace, shape: dict) -> float:
    """The rate at which the misses of a layer take as long as a layer of the resident arm."""
    found = worker.call("forced", rate=0.0, steps=options.link_steps, batch=options.batch)
    layer_seconds = harness.summary(found["seconds"])["median"] / shape["layers"]
    forced_blocks = 1 + 2 + 1
    misses = round(LINK_MISS_RATE * (options.top_k - forced_blocks))
    pieces = max(1, misses) * options.batch * shape["kv_heads"]
    return pieces * shape["piece_bytes"] / layer_seconds / 1e9


def _check(arm: Arm, rate: float, counts: dict, piece_bytes: int) -> None:
    """Raises unless exactly the forced misses were moved."""
    misses = counts["expected_misses"]
    if not (
        counts["frame_misses"] == misses
        and counts["host_to_device_bytes"] == misses * piece_bytes
        and counts["engine_bytes"] == misses * piece_bytes
    ):
        raise RuntimeError(f"{arm.name} at {rate:.0%}: {misses} misses were forced, but {counts}")


def _overlap_row(name: str, rate: float, turns: list[dict]) -> dict:
    """Joins the turns of one arm at one rate."""
    seconds = [second for turn in turns for second in turn["seconds"]]
    steps = len(seconds)
    total = {key: sum(turn["counts"][key] for turn in turns) for key in turns[0]["counts"]}
    issued = total["prefetch_issued"]
    return {
        "arm": name,
        "rate": rate,
        "step_ms": harness.summary([1e3 * second for second in seconds]),
        "exposed_wait_ms_per_step": 1e3 * total["exposed_wait_seconds"] / steps,
        "late_share": total["prefetch_late"] / issued if issued else None,
        "misses_per_step": total["frame_misses"] / steps,
        "hits_per_step": total["frame_hits"] / steps,
        "bytes_per_step": total["engine_bytes"] / steps,
        "miss_share_of_free_picks": (
            total["frame_misses"] / total["free_picks"] if total["free_picks"] else 0.0
        ),
        "bytes_equal_misses_times_piece_bytes": True,  # or the run would have ended
        "totals": total,
    }


# Serve.


def run_serve(options: argparse.Namespace, settings: dict) -> Iterator[dict]:
    """Runs ``serve``: stock vLLM with memory for all requests, then SPARDA."""
    model = harness.resolve_model(options.model)
    prompts = _documents(model, options.requests, options.context - options.generate)
    arguments = harness.engine_args(
        model,
        options.context,
        options.requests * options.context,
        enforce_eager=options.eager,
        max_num_seqs=options.requests,
    )
    kv_bytes = options.requests * options.context * harness.kv_bytes_per_token(model)
    own = {
        **{"init_blocks": 1, "local_blocks": 2, "dense_len": 0, "top_k": options.top_k},
        "slab_gib": kv_bytes / options.times / GIB,
        **settings,
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.offload", description=__doc__)
    kinds = parser.add_subparsers(dest="kind", required=True)
    memory, overlap, serve = (kinds.add_parser(name) for name in ("memory", "overlap", "serve"))
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
    overlap.add_argument("--model", default="qwen", help="name, alias (smollm2, qwen) or path")
    overlap.add_argument("--context", type=int, default=8192, help="prompt and generation, tokens")
    overlap.add_argument("--batch", type=int, default=4)
    overlap.add_argument("--rates", nargs="+", type=float, default=[0.0, 0.05, 0.1, 0.2, 0.4])
    overlap.add_argument("--steps", type=int, default=48, help="per turn")
    overlap.add_argument("--rounds", type=int, default=3, help="turns of each arm and rate")
    overlap.add_argument(
        "--link-gb-per-s",
        type=float,
        help="rate of the copy engine; by default the misses of a layer take as long as the layer "
        f"at {LINK_MISS_RATE:.0%} misses",
    )
    overlap.add_argument("--link-steps", type=int, default=32, help="to find that rate")
    serve.add_argument("--model", default="smollm2", help="name, alias (smollm2, qwen) or path")
    serve.add_argument("--context", type=int, default=8192, help="prompt and generation, tokens")
    serve.add_argument("--generate", type=int, default=128, help="tokens per request")
    serve.add_argument("--requests", type=int, default=10)
    serve.add_argument("--times", type=float, default=4.0, help="KV of all requests over the slab")
    for one in (overlap, serve):
        one.add_argument("--top-k", type=int, default=32 if one is overlap else 16, help="blocks")
        one.add_argument("--eager", action="store_true", help="no torch.compile: faster start")
    for name, one in (("memory", memory), ("overlap", overlap), ("serve", serve)):
        one.add_argument("--setting", nargs="+", default=[], metavar="KEY=JSON", help="of SPARDA")
        one.add_argument("--quick", action="store_true", help="tiny sizes")
        one.add_argument("--out", type=Path, default=harness.RESULTS_DIR / f"{name}.json")
    return parser


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


def main() -> None:
    """Command line entry point."""
    parser = _parser()
    options = parser.parse_args()
    if options.quick:
        for key, value in QUICK[options.kind].items():
            setattr(options, key, value)
    harness.exit_cleanly()
    environment = harness.environment()
    run = {"memory": run_memory, "overlap": run_overlap, "serve": run_serve}[options.kind]
    try:
        for body in run(options, harness.parse_settings(options.setting)):
            harness.write_result(options.out, options.kind, environment, body)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
