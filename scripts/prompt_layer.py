#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Times one layer of a prompt on a CPU: PyTorch's flash attention, SPARDA dense, SPARDA sparse.

Random queries and keys in bfloat16, one thread, CPU seconds of the process, the least of some
rounds taken in turns; prints a line of JSON per prompt length. Chosen blocks of random data hardly
coincide from token to token, which is the worst case for what tokens share.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch.nn import functional
from vllm_sparse.kernels.dispatch import sparda_kernels
from vllm_sparse.kernels.reference.sparda_tokens import mean_of_windows
from vllm_sparse.kernels.types import Blocks, Ranking

from vllm_sparse.prefetch.stream import Tile
from vllm_sparse.steps.host_prompt import attend_prompt

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

SIZE, STRIDE, CHUNK, STAGED = 64, 16, 4096, 32 * 64
KERNELS = sparda_kernels(torch.device("cpu"))


class Prompt:
    """Queries, keys and values of a layer.

    Args:
        tokens: n, a multiple of the chunk.
        heads: H and G.
        dim: D.
    """

    def __init__(self, tokens: int, heads: tuple[int, int], dim: int) -> None:
        self.query = torch.randn(tokens, heads[0], dim).bfloat16()
        self.rows = torch.randn(tokens, heads[1], 2 * dim).bfloat16()
        self.dim, self.scale = dim, dim**-0.5
        windows = self.rows[..., :dim].unfold(0, 2 * STRIDE, STRIDE).permute(0, 3, 1, 2)
        means = mean_of_windows(windows).to(self.rows.dtype)
        slots = torch.cat((torch.zeros_like(means[:1]), means))
        slots = slots.unflatten(0, (tokens // SIZE, SIZE // STRIDE))
        self.compressed = slots.transpose(1, 2).contiguous()

    def flash(self) -> None:
        """The whole prompt at once, by PyTorch."""
        query, key, value = (
            x.transpose(0, 1)[None] for x in (self.query, *self.rows.split(self.dim, -1))
        )
        functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=self.scale, enable_gqa=True
        )

    def served(self, blocks: Blocks | None, took: dict[str, float]) -> None:
        """In chunks, as SPARDA serves it; ``None``: densely. Adds the time of selections."""
        for start in range(0, len(self.query), CHUNK):
            here, chosen = slice(start, start + CHUNK), None
            if blocks is not None:
                begin = time.process_time()
                chosen = self.choose(blocks, here)
                took["select"] += time.process_time() - begin
            attend_prompt(
                self.query[here], self.rows[here], self.staged(start), start,
                CHUNK if blocks is None else 0, chosen, block_size=SIZE, tile_tokens=STAGED,
                attend_part=KERNELS.attend_part, scale=self.scale,
            )  # fmt: skip

    def choose(self, blocks: Blocks, here: slice) -> Tensor:
        """What the tokens of a chunk read, by their own queries."""
        table = torch.arange(here.stop // SIZE)
        positions = torch.arange(here.start, here.stop)
        ranking = Ranking(True, self.scale)
        return KERNELS.choose_blocks(
            self.compressed, self.query[here], table, positions, ranking, blocks
        )

    def staged(self, start: int) -> Iterator[tuple[Tile, Tensor]]:
        """Earlier tokens, copied together as the stream does."""
        for first in range(0, start, STAGED):
            rows = self.rows[first : first + STAGED].transpose(0, 1).contiguous()
            table = torch.arange(STAGED // SIZE)
            yield Tile(table, first // SIZE, STAGED, False), rows


def main() -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contexts", type=int, nargs="+", default=[8192, 16384, 32768])
    parser.add_argument("--blocks", type=int, nargs="+", default=[36, 64], help="per token")
    parser.add_argument("--local-blocks", type=int, default=2)
    parser.add_argument("--heads", type=int, nargs=2, default=[14, 2], help="H and G")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for context in options.contexts:
        prompt = Prompt(context, tuple(options.heads), options.dim)
        selections: dict[str, dict[str, float]] = {}
        arms: dict[str, Callable[[], None]] = {"torch flash": prompt.flash}
        for count in (None, *options.blocks):
            name = "dense" if count is None else f"{count} blocks"
            blocks = None if count is None else Blocks(SIZE, STRIDE, 1, options.local_blocks, count)
            selections[name] = {"select": 0.0}
            arms[name] = partial(prompt.served, blocks, selections[name])
        best: dict[str, dict[str, float]] = {}
        for _ in range(options.rounds):
            for name, run in arms.items():
                begin, before = time.process_time(), selections.get(name, {}).get("select", 0.0)
                run()
                took = {"seconds": round(time.process_time() - begin, 3)}
                if select := selections.get(name, {}).get("select", 0.0) - before:
                    took["select"] = round(select, 3)
                best[name] = min(best.get(name, took), took, key=lambda found: found["seconds"])
        print(json.dumps({"tokens": context, **best}), flush=True)


if __name__ == "__main__":
    main()
