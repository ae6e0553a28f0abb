# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""A RocketKV decode step in three launches: append, select, attend."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from vllm_sparse.kernels.fp8 import FP8, UNSCALED, Scales
from vllm_sparse.kernels.triton.append import append_tokens
from vllm_sparse.kernels.triton.attention import attend_grid, attend_slots
from vllm_sparse.kernels.triton.launch import launch
from vllm_sparse.kernels.triton.pages import score_shares, select_slots
from vllm_sparse.kernels.types import Probes

if TYPE_CHECKING:
    from torch import Tensor
    from vllm_sparse.kernels.layout import PageLayout

# Bytes that the scores of pages may take at a time, where scratch goes by rows.
_MOST_SCORES = 256 << 20
# And where each row of a request has a plane: each is a few hundredths of a percent of the cache.
_MOST_PLANES = 4 << 30


def decode_attention(
    cache: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    final_lengths: Tensor,
    top_r: Tensor,
    *,
    layout: PageLayout,
    top_k: int,
    scale: float,
    read_all: bool = False,
    replays: bool = True,
    most_rows: int | None = None,
    parked: Tensor | None = None,
    per_block: int = 0,
    scales: Scales = UNSCALED,
    sinks: Tensor | None = None,
) -> None:
    """Same contract as :func:`vllm_sparse.kernels.reference.decode.decode_attention`.

    Capturable: grids and scratch depend on shapes only. The channel axes must be contiguous and
    so must a page of the cache; other strides are free. Integer tensors are int32. Queries are
    rounded to the cache's dtype, unless it is fp8. Scratch: see :func:`decode_scratch_bytes`.
    No two requests may have a block in common that rows of both score, unless a request may have
    any number of rows (``replays`` without ``most_rows``). Then, and where planes of scratch would
    be too many, pages are scored for so many rows at a time as to bound it.
    """
    rows, kv_heads = len(query), cache.shape[1]
    padded = -(-rows // 4) * 4  # where the second half starts is aligned as the first is
    arrived = torch.empty(2, padded, kv_heads, dtype=torch.int32, device=cache.device)[:, :rows]
    probes = None if read_all else _make_probes(cache, query)
    append_tokens(
        cache,
        key,
        value,
        block_table,
        lengths,
        final_lengths,
        top_r,
        layout,
        replays=replays,
        query=query,
        parked=parked,
        per_block=per_block,
        probes=probes,
        scale=scale,
        arrived=arrived,
        scales=scales,
    )
    slots = None
    if probes is not None:
        slots = _select(
            cache,
            probes,
            block_table,
            lengths,
            top_r,
            layout,
            top_k,
            arrived[0],
            final_lengths,
            most_rows if replays else 1,
            sinks,
        )
    attend_slots(
        cache,
        query,
        output,
        slots,
        block_table,
        lengths,
        top_r,
        layout=layout,
        top_k=top_k,
        scale=scale,
        arrived=arrived[1],
        scales=scales,
        sinks=sinks,
    )


def _make_probes(cache: Tensor, query: Tensor) -> Probes:
    (rows, heads, dim), kv_heads, device = query.shape, cache.shape[1], cache.device
    return Probes(
        torch.empty(
            query.shape, dtype=query.dtype if cache.dtype == FP8 else cache.dtype, device=device
        ),
        torch.empty(rows, kv_heads, dim, dtype=torch.int32, device=device),
        *(torch.empty(rows, heads, dtype=torch.float32, device=device) for _ in range(2)),
    )


def _select(
    cache: Tensor,
    probes: Probes,
    block_table: Tensor,
    lengths: Tensor,
    top_r: Tensor,
    layout: PageLayout,
    top_k: int,
    arrived: Tensor,
    final_lengths: Tensor,
    most_rows: int | None,
    sinks: Tensor | None,
) -> Tensor:
    """Slots of all rows, see :func:`.pages.select_slots`."""
    (rows, heads, _), (max_blocks, kv_heads) = (
        probes.query.shape,
        (block_table.shape[1], cache.shape[1]),
    )
    capacity = min(top_k, max_blocks * layout.block_size)
    slots = torch.empty(rows, kv_heads, capacity, dtype=torch.int32, device=cache.device)
    step, planes = rows, _planes(most_rows, len(cache), layout, heads + kv_heads)
    if not planes:
        step = _rows_at_once(rows, heads, kv_heads, max_blocks * layout.pages_per_block)
    for start in range(0, rows, max(step, 1)):
        part = slice(start, start + step)
        select_slots(
            cache,
            Probes(*(field[part] for field in probes)),
            block_table[part],
            lengths[part],
            top_r[part],
            layout=layout,
            top_k=top_k,
            private=planes > 0,
            final_lengths=final_lengths[part],
            most_rows=planes,
            arrived=arrived[part],
            out=slots[part],
            sinks=sinks,
        )
    return slots


def _planes(most_rows: int | None, blocks: int, layout: PageLayout, numbers: int) -> int:
    """Planes of scratch for as many rows of a request; 0: scratch goes by rows."""
    plane_bytes = 4 * blocks * layout.pages_per_block * numbers
    return most_rows if most_rows and most_rows * plane_bytes <= _MOST_PLANES else 0


def _rows_at_once(rows: int, heads: int, kv_heads: int, pages: int) -> int:
    """Rows to score together; a multiple of 4, so that what starts there is aligned as a whole."""
    parts = -(-rows * pages * 4 * (heads + kv_heads) // _MOST_SCORES)
    return -(-rows // max(parts, 1) // 4) * 4


def decode_scratch_bytes(
    rows: int,
    max_blocks: int,
    cache_blocks: int,
    *,
    layout: PageLayout,
    heads: int,
    kv_heads: int,
    top_k: int,
    dtype: torch.dtype,
    device: torch.device,
    most_rows: int = 1,
) -> int:
    """What :func:`decode_attention` holds at a time, at most, with any number of rows up to one.

    Its layers run one after the other and use the same memory. What an allocator rounds up is not
    counted.

    Args:
        rows: T, at most.
        max_blocks: Width of the block table.
        cache_blocks: Blocks of the cache.
        layout: Page geometry.
        heads: H.
        kv_heads: G.
        top_k: Tokens to attend to per KV head.
        dtype: Of the cache; of queries if the cache is fp8.
        device: Where.
        most_rows: Of a request, where several are planned on the device.
    """
    dim, tokens = layout.head_dim, max_blocks * layout.block_size
    head_bytes = dim * dtype.itemsize
    pages = max_blocks * layout.pages_per_block
    per_page = 4 * (heads + kv_heads)
    per_row = heads * dim * dtype.itemsize + 4 * (kv_heads * dim + 2 * heads)  # probes
    per_row += 4 * kv_heads * min(top_k, tokens)  # slots
    tile = launch("select_slots", device, dim, dtype).block
    token_tile = launch("attend", device, dim, dtype).block
    planes = max(_planes(rows, cache_blocks, layout, heads + kv_heads) for rows in {1, most_rows})
    most = 0
    for count in range(1, rows + 1):
        part = min(_rows_at_once(count, heads, kv_heads, pages), count)
        scored = 0
        for some, held in ((part, part * max_blocks), (count, planes * cache_blocks)):
            shares = score_shares(some * kv_heads, pages, tile, head_bytes, device)
            scores = held * layout.pages_per_block * per_page + 4 * some * heads * (2 * shares + 1)
            scored = max(scored, scores)
        _, shares = attend_grid(
            count * kv_heads, tokens, top_k, token_tile, head_bytes, device, False
        )
        attended = 4 * count * heads * shares * (dim + 1)
        counters = 8 * kv_heads * (-(-count // 4) * 4)
        most = max(most, counters + count * per_row + max(scored, attended))
    return most
