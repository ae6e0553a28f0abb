# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Plans a decode batch on the device, so that a captured graph can be replayed for any batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

if TYPE_CHECKING:
    from torch import Tensor
    from vllm_sparse.kernels.types import Rows


# How wide a table is changes from step to step, which must not compile variants.
@triton.jit(do_not_specialize=["width", "stride_table_out", "stride_table"])
def _plan_rows_kernel(
    table_out,
    lengths_out,
    top_r_out,
    parked_out,
    seq_lens,
    prompt_lens,
    table,
    rules,
    counted,
    num_rules,
    width,
    stride_table_out,
    stride_table,
    top_k,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    seq_len = tl.load(seq_lens + row)
    prompt_len = tl.load(prompt_lens + row)
    rule = tl.minimum(tl.maximum(prompt_len, 0), num_rules - 1)
    dropped = tl.load(rules + 3 * rule)
    top_r = tl.load(rules + 3 * rule + 1)
    sparse = (top_r > 0) & (seq_len > prompt_len)
    gone = tl.where(sparse, dropped, 0)
    table += row * stride_table

    column = tile * BLOCK + tl.arange(0, BLOCK)
    block = tl.load(table + tl.minimum(column + gone, width - 1), mask=column < width, other=0)
    tl.store(table_out + row * stride_table_out + column, block, mask=column < width)
    if tile == 0:
        length = seq_len - gone * BLOCK_SIZE
        tl.store(lengths_out + row, length)
        tl.store(top_r_out + row, tl.where(sparse, top_r, 0))
        index = seq_len - 1 - (prompt_len - WINDOW)
        parks = (top_r > 0) & (seq_len > 0) & (seq_len <= prompt_len) & (index >= 0)
        shared = tl.load(rules + 3 * rule + 2)
        tail = tl.load(table + shared + index // PER_BLOCK, mask=parks, other=0)
        tl.store(parked_out + row, tl.where(parks, tail * PER_BLOCK + index % PER_BLOCK, -1))
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
) -> None:
    """Same contract as :func:`vllm_sparse.kernels.reference.rows.plan_rows`."""
    count, width = block_table.shape
    assert block_table.stride(-1) == rows.block_table.stride(-1) == 1
    assert rules.is_contiguous()
    assert rows.block_table.shape == block_table.shape
    if not count:
        return
    tile = 1024
    _plan_rows_kernel[(count, -(-width // tile))](
        rows.block_table,
        rows.lengths,
        rows.top_r,
        rows.parked,
        seq_lens,
        prompt_lens,
        block_table,
        rules,
        counted,
        len(rules),
        width,
        rows.block_table.stride(0),
        block_table.stride(0),
        top_k,
        BLOCK_SIZE=block_size,
        WINDOW=window,
        PER_BLOCK=per_block,
        BLOCK=tile,
        num_warps=4,
        num_stages=1,
    )
