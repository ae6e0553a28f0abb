# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Random inputs of the ROCKETKV kernels: paged caches, queries, prompts. Never zeros."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm_sparse.kernels.layout import PageLayout

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True)
class Case:
    """Sizes of a batch.

    Attributes:
        name: Short.
        heads: Query heads.
        kv_heads: KV heads.
        dim: Head size.
        block_size: Tokens per block.
        page_size: Tokens per page of extrema.
        rows: Requests.
        longest: Tokens of the longest request.
        top_k: Tokens to attend to.
        dtype: Of the cache.
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


def call(kernel: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """Calls a kernel with those of the arguments that it has."""
    names = inspect.signature(kernel).parameters
    return kernel(**{name: arguments[name] for name in names if name in arguments})


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
        layout.extrema(cache)[place] = bounds
    if top_r is None:
        span = (max(1, dim // 4), dim + 1)
        channels = torch.randint(*span, (rows,), generator=generator, device=device).int()
    else:
        channels = torch.full_like(lengths, top_r)
    query = (noise(rows, case.heads, dim) * 1.5).to(case.dtype)
    return {
        "cache": cache,
        "query": query,
        "key": noise(rows, kv_heads, dim).to(case.dtype),
        "value": noise(rows, kv_heads, dim).to(case.dtype),
        "output": torch.full_like(query, torch.nan),
        "block_table": table,
        "lengths": lengths,
        "final_lengths": lengths,
        "top_r": channels,
        "layout": layout,
        "top_k": case.top_k,
        "scale": dim**-0.5,
        "kv_heads": kv_heads,
    }


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
    halves = stock.flatten(2).unflatten(2, (2, size, case.dim))
    table = torch.randperm(blocks, generator=generator, device=device).view(rows, width).int()
    lengths = torch.tensor([case.longest - 7 * row for row in range(rows)], device=device).int()
    tail = -(-kept // size)
    dropped = (lengths // size - tail).clamp_min(0).int()
    query = torch.randn(
        (rows, case.heads, window, case.dim), generator=generator, device=device
    ).to(case.dtype)
    return {
        "cache": cache,
        "keys": halves[:, :, 0],
        "values": halves[:, :, 1],
        "query_window": query,
        "block_table": table,
        "prompt_lens": lengths,
        "dropped_blocks": dropped,
        "layout": case.layout,
        "pool_kernel": pool_kernel,
        "window": window,
        "max_kept": int((lengths - dropped * size).max()),
        "sizes": lengths - window,
        "counts": lengths - window - dropped * size,
    }
