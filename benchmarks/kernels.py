# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The decode kernel alone: time a layer, and how far that is from moving its bytes once.

Layers have caches of their own, together larger than the processor's, and are visited in turn, as
in a model. The floor is the bytes that one layer must read (selected channels of the key extrema,
selected keys and values) over the bandwidth of a sequential read: the best of several passes, since
others can only slow one down. Beside it, in turns, the same in a cache of fp8.
"""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

import torch
from vllm_sparse.kernels.cpu import decode, memory
from vllm_sparse.kernels.fp8 import FP8, Scales

from benchmarks import harness
from benchmarks.ops import kernels
from benchmarks.ops.rocketkv_inputs import Case, make_decode
from benchmarks.results import Recorder
from vllm_sparse.policies.rocketkv import plan

if TYPE_CHECKING:
    import argparse

BLOCK_SIZE, PAGE_SIZE = 128, 4
SCALES = Scales(truncates=True)
PASSES = 7


def read_bandwidth(tensor: torch.Tensor, passes: int = PASSES) -> float:
    """Bytes per second of the fastest of some sequential reads."""
    numbers = tensor.flatten().view(torch.int64)
    seconds = []
    for _ in range(passes):
        started = time.perf_counter()
        numbers.sum()
        seconds.append(time.perf_counter() - started)
    return numbers.nbytes / min(seconds)


def measure(options: argparse.Namespace) -> dict:
    """Returns microseconds a layer of each variant, and the floor."""
    split = plan(options.context - 128, 128, options.budget, options.dim, page_sizes=(PAGE_SIZE,))
    kept = -(-split.capacity // BLOCK_SIZE) * BLOCK_SIZE
    heads, rows = options.kv_heads * options.group, options.batch
    sizes = (heads, options.kv_heads, options.dim, BLOCK_SIZE, PAGE_SIZE, rows, kept, split.top_k)
    lengths = torch.full((rows,), kept, dtype=torch.int32)
    generator = torch.Generator().manual_seed(0)
    step = make_decode(
        Case("", *sizes), lengths.device, generator, lengths=lengths, top_r=split.top_r
    )
    caches = step["cache"].expand(options.layers, *step["cache"].shape).contiguous()

    def variants(kernel, rounds: int, read_all: bool = False, *caches: torch.Tensor) -> list[dict]:
        # Found once: that takes a tenth of what a layer takes.
        arguments = kernels.accepted(kernel, {**step, "read_all": read_all, "scales": SCALES})

        def layer(cache: torch.Tensor) -> float:
            started = time.perf_counter()
            kernel(**{**arguments, "cache": cache})
            return (time.perf_counter() - started) * 1e6

        for cache in caches:
            layer(cache[0])
        turns = [
            [layer(cache) for cache in turn]
            for _ in range(rounds)
            for turn in zip(*caches, strict=True)
        ]
        return [
            {"us": statistics.median(times), "us_p10": sorted(times)[len(times) // 10]}
            for times in zip(*turns, strict=True)
        ]

    fused = decode.decode_attention
    (small,) = variants(fused, options.rounds, False, caches)
    narrow = caches.to(FP8)
    for cache in (caches, narrow):
        memory.back_with_huge_pages(cache)
    result = {"fused, small pages": small}
    for name, read_all in (("fused", False), ("fused, every kept token", True)):
        found = variants(fused, options.rounds, read_all, caches, narrow)
        result[name], result[f"{name}, fp8"] = found
    (result["reference"],) = variants(kernels.reference("decode_attention"), 1, False, caches)

    bandwidth = read_bandwidth(caches)
    channels = split.top_r * kept // PAGE_SIZE
    bytes_read = 2 * rows * options.kv_heads * (channels + split.top_k * 2 * options.dim)
    floor = bytes_read / bandwidth * 1e6
    return {
        "kept_tokens": kept, "top_r": split.top_r, "top_k": split.top_k, "bytes_read": bytes_read,
        "sequential_read_gb_per_s": bandwidth / 1e9, "floor_us": floor,
        "over_floor": result["fused"]["us"] / floor, "variants": result,
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Command line entry point."""
    parser = harness.parser("kernels", __doc__)
    for name, default, about in (
        ("context", 8192, "tokens of each request"),
        ("batch", 8, "requests"),
        ("budget", 512, "token budget"),
        ("kv-heads", 3, "default: SmolLM2-135M's shape"),
        ("group", 3, "query heads per KV head"),
        ("dim", 64, "head size"),
        ("layers", 30, "each with a cache of its own"),
        ("rounds", 6, "over all layers"),
        ("threads", torch.get_num_threads(), "of the processor"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=about)
    options = harness.parse(parser, arguments)
    torch.set_num_threads(options.threads)
    body = {"threads": options.threads}
    with Recorder(options.out, "kernels", body):
        body["result"] = measure(options)
        harness.progress(str(body["result"]))


if __name__ == "__main__":
    main()
