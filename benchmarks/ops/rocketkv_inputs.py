# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Random inputs of the ROCKETKV kernels: paged caches, queries, prompts. Never zeros."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm_sparse.kernels.layout import PageLayout
from vllm_sparse.kernels.types import Probes, Rows


@dataclass(frozen=True)
class Case:
    """Sizes of a batch.

    Query heads, KV heads and head size; tokens per block and per page of extrema; requests, tokens
    of the longest one, and tokens to attend to; dtype of the cache.
    """

    name: str
    heads: int
    kv_heads: int
    dim: int
    block_size: int
    page_size: int
    rows: int
    longest: int
    top_k: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def layout(self) -> PageLayout:
        """Page geometry."""
        return PageLayout(self.block_size, self.dim, self.page_size)

    @property
    def blocks_per_row(self) -> int:
        """Width of the block table."""
        return -(-self.longest // self.block_size) + 1


def make_decode(
    case: Case,
    device: torch.device,
    generator: torch.Generator,
    *,
    lengths: Tensor | None = None,
    top_r: int | None = None,
) -> dict[str, Any]:
    """Arguments of a decode step, by name.

    Args:
        case: Sizes.
        device: Where the tensors are.
        generator: Of that device.
        lengths: Tokens of each row; random ones up to the longest unless given.
        top_r: Channels to read; random ones unless given.
    """
    layout, rows, kv_heads, dim = case.layout, case.rows, case.kv_heads, case.dim
    width = case.blocks_per_row
    blocks = rows * width + 1
    content = 2 * dim + 2 * dim // case.page_size
    cache = torch.full((blocks, kv_heads, case.block_size, content), torch.nan, dtype=case.dtype)
    cache = cache.to(device)
    table = torch.randperm(blocks - 1, generator=generator, device=device) + 1
    table = table.view(rows, width).int()
    if lengths is None:
        span = (case.longest // 2, case.longest + 1)
        lengths = torch.randint(*span, (rows,), generator=generator, device=device).int()
        lengths[0] = case.longest

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    for row in range(rows):  # one at a time: float32 copies of a long batch are large
        held = int(lengths[row]) - 1
        tokens = noise(kv_heads, width * case.block_size, 2 * dim).to(case.dtype)
        paged = tokens[..., :dim].unflatten(1, (-1, case.page_size))
        bounds = torch.cat((paged.amin(2), paged.amax(2)), -1)
        # What the row does not own must not be read, or it shows.
        tokens[:, held:] = torch.nan
        bounds[:, held // case.page_size :] = torch.nan
        place = table[row].long()
        tokens = tokens.unflatten(1, (width, case.block_size)).transpose(0, 1)
        bounds = bounds.unflatten(1, (width, -1)).permute(1, 0, 3, 2)
        layout.tokens(cache)[place] = tokens
        layout.index(cache)[place] = bounds
    if top_r is None:
        span = (max(1, dim // 4), dim + 1)
        channels = torch.randint(*span, (rows,), generator=generator, device=device).int()
    else:
        channels = torch.full_like(lengths, top_r)
    query = (noise(rows, case.heads, dim) * 1.5).to(case.dtype)
    return {
        "cache": cache, "query": query, "key": noise(rows, kv_heads, dim).to(case.dtype),
        "value": noise(rows, kv_heads, dim).to(case.dtype),
        "output": torch.full_like(query, torch.nan), "block_table": table, "lengths": lengths,
        "final_lengths": lengths, "top_r": channels, "layout": layout, "top_k": case.top_k,
        "scale": dim**-0.5, "kv_heads": kv_heads,
        "probes": Probes(
            torch.full_like(query, torch.nan),
            torch.full((rows, kv_heads, dim), -1, dtype=torch.int32, device=device),
            *torch.full((2, rows, case.heads), torch.nan, device=device),
        ),
    }  # fmt: skip


def make_prompts(
    case: Case,
    device: torch.device,
    generator: torch.Generator,
    *,
    window: int,
    kept: int,
    pool_kernel: int = 63,
) -> dict[str, Any]:
    """Arguments of stage 1, by name: prompts in the stock kernel's pages.

    Args:
        case: Sizes; ``longest`` is the length of the first prompt, the others are shorter.
        device: Where the tensors are.
        generator: Of that device.
        window: Observation window.
        kept: Tokens that each prompt keeps, rounded up to whole blocks.
        pool_kernel: Width of the max pool.
    """
    size, rows, width = case.block_size, case.rows, case.blocks_per_row
    content = 2 * case.dim + 2 * case.dim // case.page_size
    blocks = rows * width
    cache = torch.full((blocks, case.kv_heads, size, content), torch.nan, dtype=case.dtype)
    cache = cache.to(device)
    stock = case.layout.tokens(cache)
    for block in stock:  # one at a time: float32 copies of long prompts are large
        block.copy_(torch.randn(block.shape, generator=generator, device=device))
    table = torch.randperm(blocks, generator=generator, device=device).view(rows, width).int()
    lengths = torch.tensor([case.longest - 7 * row for row in range(rows)], device=device).int()
    tail = -(-kept // size)
    dropped = (lengths // size - tail).clamp_min(0).int()
    query = torch.randn(
        (rows, case.heads, window, case.dim), generator=generator, device=device
    ).to(case.dtype)
    arguments = {
        "cache": cache, "query_window": query, "block_table": table, "prompt_lens": lengths,
        "dropped_blocks": dropped, "layout": case.layout,
        "pool_kernel": pool_kernel, "scale": case.dim**-0.5,
        "window": window, "max_kept": int((lengths - dropped * size).max()),
        "sizes": lengths - window, "counts": lengths - window - dropped * size,
    }  # fmt: skip
    return with_views(arguments)


def with_views(arguments: dict[str, Any]) -> dict[str, Any]:
    """Adds keys and values: views of the cache in the stock kernel's pages."""
    layout = arguments["layout"]
    pages = layout.tokens(arguments["cache"]).flatten(2)
    halves = pages.unflatten(2, (2, layout.block_size, layout.head_dim))
    return {**arguments, "keys": halves[:, :, 0], "values": halves[:, :, 1]}


def make_rows(
    case: Case, device: torch.device, generator: torch.Generator, window: int
) -> dict[str, Any]:
    """Arguments of a plan, by name: rows in every state of a request."""
    size, group = case.block_size, case.heads // case.kv_heads
    longest, width, count = 40 * size, 41, 40
    per_block = max(1, 2 * size // case.page_size // group)
    least = -(-window // per_block) + -(-window // size)  # blocks that the window needs

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator, device=device).int()

    prompt_lens = integers(1, longest, count)
    # Padding, inside the prompt, in its window, decoding.
    after = torch.cat([integers(low, high, 10) for low, high in ((0, 1), (1, longest))]).repeat(2)
    near = prompt_lens - integers(-40, 40, count)
    seq_lens = torch.where(integers(0, 2, count) > 0, after, near).clamp(0, longest)
    lengths = torch.arange(longest + 1, device=device)
    dropped = (lengths // size - integers(least, least + 4, longest + 1)).clamp_min(0)
    top_r = torch.where(dropped > 0, integers(1, case.dim, longest + 1), 0)
    gone = torch.where(top_r > 0, dropped, 0)
    rules = torch.stack((gone, top_r, gone), 1).int()
    return {
        "rows": Rows(torch.full((count, width), -9, device=device).int(),
                     *torch.full((3, count), -9, device=device).int()),
        "counted": torch.zeros(3, dtype=torch.int64, device=device),
        "seq_lens": seq_lens.int(),
        "prompt_lens": prompt_lens,
        "block_table": integers(0, 10**6, count, width),
        "rules": rules,
        "block_size": size,
        "window": window,
        "per_block": per_block,
        "top_k": case.top_k,
    }  # fmt: skip
