# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Plans a decode batch on the device, so that a captured graph can be replayed for any batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from vllm_sparse.kernels.triton.launch import FIXED

if TYPE_CHECKING:
    from torch import Tensor
    from vllm_sparse.kernels.types import Rows


# How wide a table is changes from step to step, which must not compile variants.
@triton.jit(do_not_specialize=["width", "stride_table_out", "stride_table", "requests"])
def _plan_rows_kernel(
    table_out,
    lengths_out,
    top_r_out,
    parked_out,
    final_out,
    seq_lens,
    prompt_lens,
    table,
    rules,
    counted,
    query_start,
    requests,
    num_rules,
    width,
    stride_table_out,
    stride_table,
    top_k,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    SEVERAL: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    row = token
    if SEVERAL:
        before = 0  # requests whose tokens all come earlier
        for first in range(0, requests, BLOCK):
            request = first + tl.arange(0, BLOCK)
            end = tl.load(query_start + 1 + request, mask=request < requests, other=1 << 30)
            before += tl.sum((end <= token).to(tl.int32))
        row = tl.minimum(before, requests - 1).to(tl.int64)
        final = tl.where(before < requests, tl.load(seq_lens + row), 0)
        later = tl.load(query_start + row + 1) - 1 - token.to(tl.int32)
        seq_len = tl.where(before < requests, tl.maximum(final - later, 0), 0)
    else:
        seq_len = tl.load(seq_lens + row)
        final = seq_len
    prompt_len = tl.load(prompt_lens + row)
    rule = tl.minimum(tl.maximum(prompt_len, 0), num_rules - 1)
    dropped = tl.load(rules + 3 * rule)
    top_r = tl.load(rules + 3 * rule + 1)
    sparse = (top_r > 0) & (seq_len > prompt_len)
    gone = tl.where(sparse, dropped, 0)
    table += row * stride_table

    column = tile * BLOCK + tl.arange(0, BLOCK)
    block = tl.load(table + tl.minimum(column + gone, width - 1), mask=column < width, other=0)
    tl.store(table_out + token * stride_table_out + column, block, mask=column < width)
    if tile == 0:
        length = seq_len - gone * BLOCK_SIZE
        tl.store(lengths_out + token, length)
        if SEVERAL:
            tl.store(final_out + token, final - gone * BLOCK_SIZE)
        tl.store(top_r_out + token, tl.where(sparse, top_r, 0))
        index = seq_len - 1 - (prompt_len - WINDOW)
        parks = (top_r > 0) & (seq_len > 0) & (seq_len <= prompt_len) & (index >= 0)
        shared = tl.load(rules + 3 * rule + 2)
        tail = tl.load(table + shared + index // PER_BLOCK, mask=parks, other=0)
        tl.store(parked_out + token, tl.where(parks, tail * PER_BLOCK + index % PER_BLOCK, -1))
        if sparse:
            tl.atomic_add(counted, 1, sem="relaxed")
            tl.atomic_add(counted + 1, seq_len.to(tl.int64), sem="relaxed")
            tl.atomic_add(counted + 2, tl.minimum(length, top_k).to(tl.int64), sem="relaxed")


def plan_rows(
    rows: Rows,
    seq_lens: Tensor,
    prompt_lens: Tensor,
    block_table: Tensor,
    rules: Tensor,
    counted: Tensor,
    *,
    block_size: int,
    window: int,
    per_block: int,
    top_k: int,
    query_start: Tensor | None = None,
) -> None:
    """Same contract as :func:`vllm_sparse.kernels.reference.rows.plan_rows`."""
    (requests, width), count = block_table.shape, len(rows.lengths)
    assert block_table.stride(-1) == rows.block_table.stride(-1) == 1
    assert rules.is_contiguous()
    assert rows.block_table.shape == (count, width)
    final, start = rows.final_lengths, query_start
    if final is None or start is None:
        assert final is start is None
        assert count == requests
        final = start = rows.lengths  # not used
    else:
        assert start.is_contiguous()
    if not count or not requests:
        return
    tile, warps, stages = FIXED["plan_rows"]
    _plan_rows_kernel[(count, -(-width // tile))](
        rows.block_table,
        rows.lengths,
        rows.top_r,
        rows.parked,
        final,
        seq_lens,
        prompt_lens,
        block_table,
        rules,
        counted,
        start,
        requests,
        len(rules),
        width,
        rows.block_table.stride(0),
        block_table.stride(0),
        top_k,
        BLOCK_SIZE=block_size,
        WINDOW=window,
        PER_BLOCK=per_block,
        BLOCK=tile,
        SEVERAL=query_start is not None,
        num_warps=warps,
        num_stages=stages,
    )
