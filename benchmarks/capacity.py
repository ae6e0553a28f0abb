# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""How many requests a KV pool of fixed size serves at once: stock vLLM against ROCKETKV.

All requests arrive together at a pool that is too small for dense attention to hold them. After
every engine step the benchmark reads vLLM's own gauges (`vllm:num_requests_running`,
`vllm:kv_cache_usage_perc`) and in the end its counter of preemptions.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path

from benchmarks import corpus, harness
from benchmarks.engine import Worker

_CONCURRENCY = re.compile(r"Maximum concurrency for ([\d,]+) tokens per request: ([\d.]+)x")
_POOL = re.compile(r"KV cache size: ([\d,]+) tokens")


# Command, executed in the worker process.


def serve_all(llm, prompts: list[list[int]], max_tokens: int) -> dict:
    """Serves all requests; returns what the engine reported after each step, and all outputs."""
    from vllm import SamplingParams

    from benchmarks.counters import metrics

    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    engine = llm.llm_engine
    started = time.perf_counter()
    for prompt in prompts:
        engine.add_request(str(next(llm.request_counter)), {"prompt_token_ids": prompt}, params)
    steps, finished = [], {}
    while engine.has_unfinished_requests():
        outputs = engine.step()
        for output in outputs:
            if output.finished:
                finished[output.request_id] = list(output.outputs[0].token_ids)
        gauges = metrics(llm)
        running = int(gauges["vllm:num_requests_running"])
        steps.append(
            {
                "running": running,
                "usage": gauges["vllm:kv_cache_usage_perc"],
                # Every running request got a token, so none of them is in prefill.
                "decoding": len(outputs) == running > 0,
            }
        )
    return {
        "steps": steps,
        "outputs": finished,
        "seconds": time.perf_counter() - started,
        "metrics": metrics(llm),
    }


# The benchmark.


def measure(arm: harness.Arm, options: argparse.Namespace, prompts: list[list[int]]) -> dict:
    """Serves the prompts on one arm and summarises what its engine reported."""
    arguments = harness.engine_args(
        harness.resolve_model(options.model),
        max_model_len=options.context,
        pool_tokens=options.pool_blocks * harness.BLOCK_TOKENS,
        num_gpu_blocks_override=options.pool_blocks,
        enforce_eager=options.eager,
    )
    with Worker("benchmarks.capacity", arm, arguments) as worker:
        served = worker.call("serve_all", prompts=prompts, max_tokens=options.generate)
        log = worker.log()
    steps = served["steps"]
    peak = max(step["running"] for step in steps)
    decoding = [step for step in steps if step["decoding"] and step["running"] == peak]
    blocks = [round(step["usage"] * (options.pool_blocks - 1)) for step in decoding]
    pool, concurrency = _POOL.search(log), _CONCURRENCY.search(log)
    return {
        "settings": arm.settings,
        "preemptions": served["metrics"]["vllm:num_preemptions"],
        "peak_running": peak,
        "mean_running": sum(step["running"] for step in steps) / len(steps),
        "steps": len(steps),
        "seconds": round(served["seconds"], 2),
        "peak_usage_percent": 100 * max(step["usage"] for step in steps),
        "blocks_per_decoding_request": (
            sum(blocks) / len(blocks) / peak if blocks else None  # none if prefill never paused
        ),
        "log": {
            "kv_cache_tokens": int(pool.group(1).replace(",", "")) if pool else None,
            "maximum_concurrency": float(concurrency.group(2)) if concurrency else None,
        },
        "metrics": {k: v for k, v in served["metrics"].items() if k.startswith("vllm:sparse")},
    }


def main() -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.capacity", description=__doc__)
    parser.add_argument("--model", default="smollm2", help="name, alias (smollm2, qwen) or path")
    parser.add_argument("--context", type=int, default=8192, help="prompt and generation, tokens")
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--generate", type=int, default=256, help="tokens per request")
    parser.add_argument(
        "--pool-blocks",
        type=int,
        help="size of the KV pool; by default it holds half of the prompts",
    )
    harness.add_arm_options(parser, "dense,rocket-512")
    parser.add_argument("--eager", action="store_true", help="no torch.compile: faster start")
    parser.add_argument("--quick", action="store_true", help="4096 tokens, 6 requests, eager")
    parser.add_argument("--out", type=Path, default=harness.RESULTS_DIR / "capacity.json")
    options = parser.parse_args()
    if options.quick:
        options.context, options.requests, options.generate = 4096, 6, 128
        options.eager = True
    prompt_tokens = options.context - options.generate
    if options.pool_blocks is None:
        # Room for half of the prompts, but not for what these requests generate. One block is
        # vLLM's null block.
        blocks = -(-prompt_tokens // harness.BLOCK_TOKENS)
        options.pool_blocks = options.requests // 2 * blocks + 2

    harness.exit_cleanly()
    environment = harness.environment()
    arms = harness.parse_arms(parser, options)
    if any(arm.settings and arm.backend == "SPARDA" for arm in arms):
        parser.error("SPARDA's pool is in host memory; use benchmarks.offload serve")

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(harness.resolve_model(options.model))
    prompts = corpus.documents(tokenizer, options.requests, prompt_tokens)
    results: dict[str, dict] = {}
    for arm in arms:
        results[arm.name] = measure(arm, options, prompts)
        harness.progress(f"{arm.name}: {json.dumps({**results[arm.name], 'metrics': None})}")
        body = {
            "model": options.model,
            "requests": options.requests,
            "prompt_tokens": prompt_tokens,
            "generated_tokens": options.generate,
            "pool_blocks": options.pool_blocks,
            "block_tokens": harness.BLOCK_TOKENS,
            "arms": results,
        }
        harness.write_result(options.out, "capacity", environment, body)


if __name__ == "__main__":
    main()
