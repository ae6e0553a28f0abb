#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Times what one layer of SPARDA's decode step chooses and reads on a CPU.

Random bfloat16, one row: choosing blocks by the queries of all heads (`query`,
`previous`), by one vector per KV head (`forecast`), and attention over the chosen blocks. The
median of some rounds, in microseconds; a line of JSON per shape. For comparing two checkouts, run
it with each one's ``.venv/bin/python`` from its folder, in turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from functools import partial
from typing import TYPE_CHECKING

import torch
from vllm_sparse.kernels.dispatch import sparda_kernels
from vllm_sparse.kernels.types import Blocks, Ranking

if TYPE_CHECKING:
    from collections.abc import Callable

SIZE, WINDOWS = 64, 4
# KV heads, query heads of each, head size, tokens, blocks that are read.
SHAPES = (
    ("Qwen 0.5B", 2, 7, 64, 16384, 36),
    ("Llama 8B", 8, 4, 128, 32768, 96),
    ("Llama 8B", 8, 4, 128, 131072, 96),
    ("Llama 8B on eight ranks", 1, 4, 128, 32768, 96),
)


def microseconds(run: Callable[[], object], rounds: int) -> float:
    """The median of some calls, behind one that is not counted."""
    run()
    taken = []
    for _ in range(rounds):
        started = time.perf_counter()
        run()
        taken.append((time.perf_counter() - started) * 1e6)
    return round(statistics.median(taken), 1)


def measure(
    kv_heads: int, group: int, dim: int, tokens: int, top_k: int, rounds: int
) -> dict[str, float]:
    """Microseconds of each way to choose, and of attention to what is chosen."""
    kernels, held = sparda_kernels(torch.device("cpu")), tokens // SIZE
    compressed = torch.randn(held + 1, kv_heads, WINDOWS, dim).bfloat16()
    queries, vectors = (torch.randn(1, n, dim).bfloat16() for n in (kv_heads * group, kv_heads))
    place = (torch.randperm(held) + 1).int()[None], torch.tensor([tokens - 3])
    blocks = Blocks(SIZE, SIZE // WINDOWS, 1, 2, top_k)
    choose = partial(kernels.select_blocks, compressed)
    slab = torch.randn(top_k * kv_heads, SIZE, 2 * dim).bfloat16()
    frames = torch.randperm(top_k * kv_heads).view(1, kv_heads, top_k).int()
    length, output = torch.tensor([top_k * SIZE]).int(), torch.empty_like(queries)
    runs = {
        "queries": partial(choose, queries, *place, Ranking(True, dim**-0.5, 1), blocks),
        "one vector": partial(choose, vectors, *place, Ranking(False), blocks),
        "attend": partial(kernels.attend_frames, slab, queries, output, frames, length, dim**-0.5),
    }
    return {name: microseconds(run, rounds) for name, run in runs.items()}


def main() -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for model, *shape, tokens, top_k in SHAPES:
        found = measure(*shape, tokens, top_k, options.rounds)
        print(json.dumps({"model": model, "tokens": tokens, "blocks": top_k, **found}))


if __name__ == "__main__":
    main()
