#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Times pure decode steps of the vLLM and the plugin that this Python has.

Random prompts of one length, eager, in one process; prints a line of JSON. Run it with a checkout's
``.venv/bin/python`` from its folder. Two checkouts in turns, and what they gain, is
``python -m benchmarks.speed --tree old=FOLDER --arms rocket-512@old,rocket-512``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from typing import Any


def parser_of(about: str | None) -> argparse.ArgumentParser:
    """The parser of a program that starts one engine: its model, backend and settings."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("model", help="folder of a checkpoint")
    parser.add_argument("backend", help="ROCKETKV, SPARDA, ..., or stock")
    parser.add_argument("--settings", type=json.loads, default={}, help="of the backend, as JSON")
    return parser


def engine_of(options: argparse.Namespace, longest: int, **arguments: Any) -> Any:
    """An engine of the model and the backend of a command line, in this process.

    Args:
        options: Of :func:`parser_of`.
        longest: Tokens of the longest request.
        **arguments: Further ones of vLLM.
    """
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM

    if options.backend != "stock":
        arguments |= {
            "attention_backend": options.backend,
            "additional_config": {"vllm_sparse": options.settings},
        }
    return LLM(
        model=options.model, dtype="bfloat16", max_model_len=longest, enforce_eager=True, seed=0,
        **arguments,
    ).llm_engine  # fmt: skip


def ask(engine: Any, name: str, prompt: list[int], tokens: int) -> None:
    """Adds a request that generates so many tokens, greedily."""
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False)
    engine.add_request(name, {"prompt_token_ids": prompt}, sampling)


def answer(engine: Any, name: str, prompt: list[int], tokens: int) -> tuple[Any, list[float]]:
    """The last output of a request that is served alone, and CPU milliseconds of each step."""
    ask(engine, name, prompt, tokens)
    steps, last = [], None
    while engine.has_unfinished_requests():
        began = time.process_time()
        last = (engine.step() or [last])[0]
        steps.append(round(1e3 * (time.process_time() - began), 1))
    return last, steps


def main() -> None:
    """Command line entry point."""
    parser = parser_of(__doc__)
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--context", type=int, default=8000, help="prompt tokens")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64, help="generated per request")
    options = parser.parse_args()
    engine = engine_of(
        options, options.context + options.tokens + 64, max_num_seqs=options.batch,
        max_num_batched_tokens=4096, kv_cache_memory_bytes=3 << 30,
        kv_cache_dtype=options.kv_cache_dtype, enable_prefix_caching=False,
    )  # fmt: skip
    chance = random.Random(0)
    for number in range(options.batch):
        prompt = [chance.randrange(1000, 20000) for _ in range(options.context)]
        ask(engine, str(number), prompt, options.tokens)
    started: set[str] = set()
    times: list[float] = []
    while engine.has_unfinished_requests():
        begin = time.perf_counter()
        outputs = engine.step()
        took = 1e3 * (time.perf_counter() - begin)
        started |= {output.request_id for output in outputs}
        if len(started) == len(outputs) == options.batch:
            times.append(took)
    times = sorted(times[3:])
    found = {"backend": options.backend, "kv_cache_dtype": options.kv_cache_dtype,
             "steps": len(times), "median_ms": round(statistics.median(times), 2),
             "least_ms": round(times[0], 2)}  # fmt: skip
    print(json.dumps(found))


if __name__ == "__main__":
    main()
