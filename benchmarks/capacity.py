# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""How many requests a KV pool of as many bytes serves at once: stock vLLM against ROCKETKV.

All requests arrive together at a pool that is too small for dense attention to hold them. After
every engine step the benchmark reads vLLM's own gauges (`vllm:num_requests_running`,
`vllm:kv_cache_usage_perc`) and in the end its counter of preemptions.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from benchmarks import arms, commands, corpus, harness
from benchmarks.results import Recorder
from benchmarks.worker import Worker

if TYPE_CHECKING:
    import argparse

_CONCURRENCY = re.compile(r"Maximum concurrency for ([\d,]+) tokens per request: ([\d.]+)x")
_POOL = re.compile(r"KV cache size: ([\d,]+) tokens")
QUICK = {"context": 4096, "requests": 6, "generate": 128, "eager": True}


def measure(arm: arms.Arm, options: argparse.Namespace, prompts: list[list[int]]) -> dict[str, Any]:
    """Serves the prompts on one arm and summarises what its engine reported."""
    arguments = harness.engine_args(
        harness.resolve_model(options.model),
        max_model_len=options.context,
        pool_tokens=(options.pool_blocks - 2) * harness.BLOCK_TOKENS,
        enforce_eager=options.eager,
    )
    with Worker(arm, arguments) as worker:
        served = worker.call("serve_all", prompts=prompts, max_tokens=options.generate)
        log = worker.log()
    steps = served["steps"]
    peak = max(step["running"] for step in steps)
    decoding = [step for step in steps if step["decoding"] and step["running"] == peak]
    pool_tokens = int(_found(_POOL, log)[1].replace(",", ""))
    pool_blocks = pool_tokens // harness.BLOCK_TOKENS
    blocks = [round(step["usage"] * (pool_blocks - 1)) for step in decoding]
    return {
        "settings": arm.settings,
        "pool_blocks": pool_blocks,
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
            "kv_cache_tokens": pool_tokens,
            "maximum_concurrency": float(_found(_CONCURRENCY, log)[2]),
        },
        "metrics": commands.of_the_plugin(served["metrics"]),
    }


def _found(wanted: re.Pattern[str], log: str) -> re.Match[str]:
    if (found := wanted.search(log)) is None:
        raise RuntimeError(f"vLLM's log does not say {wanted.pattern!r}: another version?")
    return found


def main(arguments: list[str] | None = None) -> None:
    """Command line entry point."""
    parser = harness.parser("capacity", __doc__, "4096 tokens, 6 requests, eager")
    harness.add_model(parser, "smollm2")
    parser.add_argument("--context", type=int, default=8192, help="prompt and generation, tokens")
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--generate", type=int, default=256, help="tokens per request")
    parser.add_argument(
        "--pool-blocks",
        type=int,
        help="of stock in the KV pool, whose bytes all arms have; by default half of the prompts",
    )
    arms.add_options(parser, "dense,rocket-512")
    parser.add_argument("--eager", action="store_true", help="no torch.compile: faster start")
    options = harness.parse(parser, arguments, QUICK)
    prompt_tokens = options.context - options.generate
    if options.pool_blocks is None:
        # Room for half of the prompts, but not for what these requests generate. One block is
        # vLLM's null block.
        blocks = -(-prompt_tokens // harness.BLOCK_TOKENS)
        options.pool_blocks = options.requests // 2 * blocks + 2
    chosen = arms.parse_arms(parser, options)
    if any(arm.settings and arm.backend == "SPARDA" for arm in chosen):
        parser.error("SPARDA's pool is in host memory; use benchmarks.offload serve")
    body = {
        "model": options.model, "requests": options.requests, "prompt_tokens": prompt_tokens,
        "generated_tokens": options.generate, "pool_blocks": options.pool_blocks,
        "block_tokens": harness.BLOCK_TOKENS, "arms": {},
    }  # fmt: skip
    with Recorder(options.out, "capacity", body) as record:
        tokenizer = harness.tokenizer_of(options.model)
        prompts = corpus.documents(tokenizer, options.requests, prompt_tokens)
        for arm in chosen:
            found = body["arms"][arm.name] = measure(arm, options, prompts)
            record.save()
            harness.progress(f"{arm.name}: {json.dumps({**found, 'metrics': None})}")


if __name__ == "__main__":
    main()
