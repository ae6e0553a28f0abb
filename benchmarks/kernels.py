# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The decode kernel alone: time a layer, and how far that is from moving its bytes once.

Layers have caches of their own, together larger than the processor's, and are visited in turn, as
in a model. The floor is the bytes that one layer must read (selected channels of the key extrema,
selected keys and values) over the bandwidth of a sequential read, measured in the same run.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from vllm_sparse.kernels.cpu.decode import decode_attention
from vllm_sparse.kernels.cpu.memory import back_with_huge_pages
from vllm_sparse.kernels.layout import PageLayout
from vllm_sparse.kernels.reference.rocketkv import decode_attention as reference

from benchmarks import harness
from vllm_sparse.policies.rocketkv import plan

BLOCK_SIZE = 128
PAGE_SIZE = 4


def measure(options: argparse.Namespace) -> dict:
    """Returns microseconds a layer of each variant, and the floor."""
    split = plan(options.context - 128, 128, options.budget, options.dim, page_sizes=(PAGE_SIZE,))
    blocks = -(-split.capacity // BLOCK_SIZE)
    layout = PageLayout(BLOCK_SIZE, options.dim, PAGE_SIZE)
    content = 2 * options.dim + 2 * options.dim // PAGE_SIZE
    shape = (options.layers, options.batch * blocks, options.kv_heads, BLOCK_SIZE, content)
    noise = torch.randn(shape[1:]).bfloat16()
    caches = torch.empty(shape, dtype=torch.bfloat16)
    caches[:] = noise
    table = torch.randperm(shape[1]).int().view(options.batch, blocks)
    lengths = torch.full((options.batch,), blocks * BLOCK_SIZE, dtype=torch.int32)
    top_r = torch.full_like(lengths, split.top_r)
    heads = options.kv_heads * options.group
    query = torch.randn(options.batch, heads, options.dim).bfloat16()
    key = torch.randn(options.batch, options.kv_heads, options.dim).bfloat16()
    output = torch.empty_like(query)

    def layer(kernel, cache: torch.Tensor, read_all: bool = False) -> float:
        started = time.perf_counter()
        kernel(cache, query, key, key, output, table, lengths, lengths, top_r, layout=layout,
               top_k=split.top_k, scale=options.dim**-0.5, read_all=read_all)  # fmt: skip
        return (time.perf_counter() - started) * 1e6

    def variant(kernel, rounds: int, read_all: bool = False) -> dict:
        layer(kernel, caches[0], read_all)
        times = [layer(kernel, cache, read_all) for _ in range(rounds) for cache in caches]
        return {"us": statistics.median(times), "us_p10": sorted(times)[len(times) // 10]}

    result = {"fused, small pages": variant(decode_attention, options.rounds)}
    back_with_huge_pages(caches)
    result["fused"] = variant(decode_attention, options.rounds)
    result["fused, every kept token"] = variant(decode_attention, options.rounds, True)
    result["reference"] = variant(reference, 1)

    flat = caches.flatten()
    started = time.perf_counter()
    flat.view(torch.int64).sum()
    bandwidth = flat.nbytes / (time.perf_counter() - started)
    rows = options.batch * options.kv_heads
    channels = split.top_r * blocks * BLOCK_SIZE // PAGE_SIZE
    bytes_read = 2 * rows * (channels + split.top_k * 2 * options.dim)
    floor = bytes_read / bandwidth * 1e6
    return {
        "kept_tokens": blocks * BLOCK_SIZE,
        "top_r": split.top_r,
        "top_k": split.top_k,
        "bytes_read": bytes_read,
        "sequential_read_gb_per_s": bandwidth / 1e9,
        "floor_us": floor,
        "over_floor": result["fused"]["us"] / floor,
        "variants": result,
    }


def main() -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument("--kv-heads", type=int, default=3, help="default: SmolLM2-135M's shape")
    parser.add_argument("--group", type=int, default=3)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=harness.RESULTS_DIR / "kernels.json")
    options = parser.parse_args()
    environment = harness.environment()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    body = {"threads": options.threads, "result": measure(options)}
    harness.write_result(options.out, "kernels", environment, body)
    harness.progress(str(body["result"]))


if __name__ == "__main__":
    main()
