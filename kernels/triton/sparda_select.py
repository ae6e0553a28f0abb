# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""SparDA's block selection for decode rows: the best blocks of scored ones, or all of few."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor
from vllm_sparse.kernels.triton.launch import launch
from vllm_sparse.kernels.triton.sparda_scores import reads_everything, score_blocks
from vllm_sparse.kernels.triton.topk import choose, radix_threshold, tile_threshold
from vllm_sparse.kernels.types import Selected

if TYPE_CHECKING:
    from vllm_sparse.kernels.types import Blocks, Ranking


@triton.jit
def _block_scores(best, first, block, own, init_blocks, local_blocks):
    """Scores to rank blocks ``0`` to ``own`` by."""
    forced = (block < init_blocks) | (block >= own - local_blocks)
    scored = (block <= own) & ~forced
    score = tl.load(best + block, mask=scored, other=0.0)
    score = tl.maximum(score, tl.load(first + block + 1, mask=scored, other=0.0))
    # A visible block without a window ranks last, but like any other.
    score = tl.maximum(score, -3.4028234663852886e38)
    return tl.where(forced, float("inf"), score)


@triton.jit
def _store_blocks(blocks, pieces, table, at, block, mask, head, HEADS: tl.constexpr):
    physical = tl.load(table + block, mask=mask, other=0)
    tl.store(blocks + at, block, mask=mask)
    tl.store(pieces + at, physical * HEADS + head, mask=mask)


@triton.jit
def _take_at_once(
    best, first, blocks, pieces, table, own, count, head, init_blocks, local_blocks,
    HEADS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Chooses among up to ``TILE`` blocks: their scores never leave the registers."""
    block = tl.arange(0, TILE)
    score = _block_scores(best, first, block, own, init_blocks, local_blocks)
    threshold, room = tile_threshold(score, block <= own, own + 1, count)
    chosen, _, _ = choose(score, block <= own, threshold, room, 0)
    ones = chosen.to(tl.int32)
    at = tl.cumsum(ones, 0) - ones
    _store_blocks(blocks, pieces, table, at, block, chosen, head, HEADS)


@triton.jit
def _take_in_passes(
    best, first, blocks, pieces, table, own, count, head, init_blocks, local_blocks,
    HEADS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Chooses among any number of blocks; overwrites their best window's scores."""
    for start in range(0, own + 1, TILE):
        block = start + tl.arange(0, TILE)
        score = _block_scores(best, first, block, own, init_blocks, local_blocks)
        tl.store(best + block, score, mask=block <= own)
    tl.debug_barrier()  # other threads of this program read them
    threshold, room = radix_threshold(best, own + 1, count, TILE)
    taken = 0
    tied = 0
    for start in range(0, own + 1, TILE):
        block = start + tl.arange(0, TILE)
        score = tl.load(best + block, mask=block <= own, other=0.0)
        chosen, _, tied = choose(score, block <= own, threshold, room, tied)
        ones = chosen.to(tl.int32)
        at = taken + tl.cumsum(ones, 0) - ones
        _store_blocks(blocks, pieces, table, at, block, chosen, head, HEADS)
        taken += tl.sum(ones, 0)


@triton.jit(do_not_specialize=["width", "capacity", "stride_table"])
def _choose_kernel(
    best, first, table, positions, blocks, pieces, lengths, init_blocks, local_blocks, top_k,
    dense_len, width, capacity, stride_table, HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    lane = tl.arange(0, BLOCK)
    position = tl.load(positions + row).to(tl.int32)
    own = position // BLOCK_SIZE
    everything = reads_everything(position, top_k, dense_len, BLOCK_SIZE)
    count = tl.where(everything, own + 1, top_k)
    length = (count - 1) * BLOCK_SIZE + position % BLOCK_SIZE + 1
    count = tl.where(position < 0, 0, count)
    if head == 0:
        tl.store(lengths + row, tl.where(position < 0, 0, length))
    pair = row * HEADS + head
    table += row * stride_table
    blocks += pair * capacity
    pieces += pair * capacity
    for start in range(count, capacity, BLOCK):
        nothing = tl.full([BLOCK], -1, tl.int32)
        tl.store(blocks + start + lane, nothing, mask=start + lane < capacity)
        tl.store(pieces + start + lane, nothing, mask=start + lane < capacity)
    if everything:  # padding rows as well
        for start in range(0, count, BLOCK):
            block = start + lane
            _store_blocks(blocks, pieces, table, block, block, block < count, head, HEADS)
        return

    best += pair * width
    first += pair * width
    SMALL: tl.constexpr = BLOCK // 4
    if own < SMALL:
        _take_at_once(
            best, first, blocks, pieces, table, own, count, head, init_blocks, local_blocks,
            HEADS, SMALL,
        )  # fmt: skip
    elif own < BLOCK:
        _take_at_once(
            best, first, blocks, pieces, table, own, count, head, init_blocks, local_blocks,
            HEADS, BLOCK,
        )  # fmt: skip
    else:
        _take_in_passes(
            best, first, blocks, pieces, table, own, count, head, init_blocks, local_blocks,
            HEADS, SMALL,
        )  # fmt: skip


def select_blocks(
    compressed: Tensor, vectors: Tensor | None, block_table: Tensor, positions: Tensor,
    ranking: Ranking, blocks: Blocks, *, dense_len: int = 0,
) -> Selected:  # fmt: skip
    """Same contract as :func:`vllm_sparse.kernels.reference.sparda_select.select_blocks`.

    Three launches for a softmax, two for a Forecast, one if the table is so narrow that every row
    reads all its blocks. Queries are rounded to the dtype of the compressed keys, a Forecast is
    not. Scratch: ``8 * R * G * blocks`` bytes; with a softmax also ``4 * R * H * windows``, but not
    much more than 64 MiB: more rows take turns, of two launches each.

    Args:
        compressed: ``[blocks, G, windows per block, D]``; windows per block is a power of two.
        vectors: ``[R, H, D]`` for a softmax, else ``[R, G, D]``, channels contiguous; or none.
        block_table: int32 ``[R, blocks]``, entries contiguous.
        positions: int32 or int64 ``[R]``; negative for padding rows.
        ranking: How to score.
        blocks: What to take.
        dense_len: Rows of at most so many tokens read all their blocks.
    """
    rows, width = block_table.shape
    kv_heads, windows = compressed.shape[1:3]
    size, device = blocks.block_size, compressed.device
    whole = max(blocks.top_k, -(-dense_len // size))
    capacity = min(whole, width)
    assert blocks.top_k > blocks.init_blocks + blocks.local_blocks
    assert windows * blocks.kernel_stride == size
    assert compressed.stride(-1) == block_table.stride(-1) == 1
    assert vectors is None or vectors.stride(-1) == 1
    assert positions.is_contiguous()
    logical, pieces = (
        torch.empty(rows, kv_heads, capacity, dtype=torch.int32, device=device) for _ in range(2)
    )
    lengths = torch.empty(rows, dtype=torch.int32, device=device)
    if not rows:
        return Selected(logical, pieces, lengths)
    # Not read where every row reads all its blocks.
    best = first = torch.empty(1, dtype=torch.float32, device=device)
    if vectors is not None and width > whole:
        best, first = score_blocks(
            compressed, vectors, block_table, positions, ranking, blocks, dense_len
        )
    block, warps, stages = launch("choose_blocks", device)
    _choose_kernel[(rows, kv_heads)](
        best, first, block_table, positions, logical, pieces, lengths, blocks.init_blocks,
        blocks.local_blocks, blocks.top_k, dense_len, width, capacity, block_table.stride(0),
        HEADS=kv_heads, BLOCK_SIZE=size, BLOCK=block, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return Selected(logical, pieces, lengths)
