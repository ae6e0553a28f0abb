# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""SparDA's block selection for decode rows: window scores, pooling to blocks, top-k."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor
from vllm_sparse.kernels.reference.sparda_steps import Selected
from vllm_sparse.kernels.triton.launch import (
    MOST_SHARES,
    dim_block,
    launch,
    row_block,
    split_rows,
)
from vllm_sparse.kernels.triton.ops import dot, share_of
from vllm_sparse.kernels.triton.topk import choose, radix_threshold, tile_threshold

if TYPE_CHECKING:
    from vllm_sparse.kernels.reference.selection import Blocks, Ranking

# Windows that are worth a program where rows alone fill the GPU.
_WORTH = 512

# Logits that exist at the same time; more rows take turns.
_MOST_LOGITS = 1 << 24

# Logits that a program turns into probabilities at once.
_LOGITS = 1024


@triton.jit
def _reads_everything(position, top_k, dense_len, BLOCK_SIZE: tl.constexpr):
    return (position // BLOCK_SIZE < top_k) | (position < dense_len)


@triton.jit
def _load_windows(
    compressed, table, window, inside, dim, dim_inside,
    stride_block, stride_slot, WINDOWS: tl.constexpr,
):  # fmt: skip
    """Compressed keys at slots ``window`` of a row, counted through its blocks."""
    block = tl.load(table + window // WINDOWS, mask=inside, other=0)
    source = compressed + block.to(tl.int64) * stride_block + (window % WINDOWS) * stride_slot
    return tl.load(
        source[:, None] + dim[None, :], mask=inside[:, None] & dim_inside[None, :], other=0.0
    )


@triton.jit
def _store_scores(best, first, score, start, end, WINDOWS: tl.constexpr):
    """The best score of the windows stored with each block, and that of the first of them.

    The first one also overlaps the block before, where the top-k kernel adds it.

    Args:
        best: For each block of a row.
        first: Likewise.
        score: Scores of the windows from ``start`` on.
        start: At the beginning of a block, as ``end``.
        end: Windows from here on are somebody else's.
        WINDOWS: Windows per block.
    """
    BLOCKS: tl.constexpr = score.shape[0] // WINDOWS
    window = start + tl.arange(0, score.shape[0])
    tl.store(first + window // WINDOWS, score, mask=(window % WINDOWS == 0) & (window < end))
    block = start // WINDOWS + tl.arange(0, BLOCKS)
    highest = tl.max(tl.reshape(score, [BLOCKS, WINDOWS]), 1)
    tl.store(best + block, highest, mask=block < end // WINDOWS)


# How wide a table is changes from step to step, which must not compile variants, nor must the
# number of rows, on which it depends how often they are split.
@triton.jit(do_not_specialize=["width", "least", "stride_table"])
def _forecast_kernel(
    compressed,
    vectors,
    table,
    positions,
    best,
    first,
    lag,
    top_k,
    dense_len,
    local_blocks,
    width,
    least,
    stride_block,
    stride_head,
    stride_slot,
    stride_vector_row,
    stride_vector_head,
    stride_table,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Scores of one share of a row's windows by the vector of its KV head."""
    WINDOWS: tl.constexpr = BLOCK_SIZE // STRIDE
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    position = tl.load(positions + row).to(tl.int32)
    if _reads_everything(position, top_k, dense_len, BLOCK_SIZE):
        return
    complete = (position - lag + 1) // STRIDE
    dim = tl.arange(0, BLOCK_D)
    dim_inside = dim < DIM
    vectors += row * stride_vector_row + head.to(tl.int64) * stride_vector_head
    b_f = tl.load(vectors + dim, mask=dim_inside, other=0.0).to(tl.float32)
    compressed += head.to(tl.int64) * stride_head
    table += row * stride_table
    best += (row * HEADS + head) * width
    first += (row * HEADS + head) * width
    # Later blocks are always read; of the first of them, one window reaches back.
    blocks = position // BLOCK_SIZE - local_blocks + 1
    begin, end = share_of(blocks * WINDOWS, least, 2, BLOCK_N)
    for start in range(begin, end, BLOCK_N):
        window = start + tl.arange(0, BLOCK_N)
        inside = (window > 0) & (window < tl.minimum(end, complete))
        b_k = _load_windows(
            compressed, table, window, inside, dim, dim_inside,
            stride_block, stride_slot, WINDOWS,
        )  # fmt: skip
        score = tl.sum(b_k.to(tl.float32) * b_f[None, :], 1)
        score = tl.where(inside, score, float("-inf"))
        _store_scores(best, first, score, start, end, WINDOWS)


@triton.jit(do_not_specialize=["width", "least", "stride_table"])
def _logits_kernel(
    compressed,
    vectors,
    table,
    positions,
    logits,
    peaks,
    masses,
    scale_log2,
    lag,
    top_k,
    dense_len,
    width,
    least,
    stride_block,
    stride_head,
    stride_slot,
    stride_vector_row,
    stride_vector_head,
    stride_table,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Logits of one share of a row's windows, the largest and their softmax mass, per query head.

    The compressed keys are read once: even sixteen logits are a quarter of a key of 128 channels.
    """
    WINDOWS: tl.constexpr = BLOCK_SIZE // STRIDE
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    position = tl.load(positions + row).to(tl.int32)
    if _reads_everything(position, top_k, dense_len, BLOCK_SIZE):
        return
    complete = (position - lag + 1) // STRIDE
    member = tl.arange(0, BLOCK_M)
    member_inside = member < GROUP
    dim = tl.arange(0, BLOCK_D)
    dim_inside = dim < DIM
    b_q = tl.load(
        vectors
        + row * stride_vector_row
        + (head * GROUP + member)[:, None] * stride_vector_head
        + dim[None, :],
        mask=member_inside[:, None] & dim_inside[None, :],
        other=0.0,
    )
    compressed += head.to(tl.int64) * stride_head
    table += row * stride_table
    query_head = (row * HEADS + head) * GROUP + member
    begin, end = share_of(complete, least, 2, BLOCK_N)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK_M], tl.float32)
    for start in range(begin, end, BLOCK_N):
        window = start + tl.arange(0, BLOCK_N)
        inside = (window > 0) & (window < end)  # the first slot is no window
        b_k = _load_windows(
            compressed, table, window, inside, dim, dim_inside, stride_block, stride_slot, WINDOWS
        )
        logit = dot(b_q, tl.trans(b_k)) * scale_log2
        tl.store(
            logits + query_head[:, None] * (width * WINDOWS) + window[None, :],
            logit,
            mask=member_inside[:, None] & inside[None, :],
        )
        logit = tl.where(inside[None, :], logit, float("-inf"))
        highest = tl.maximum(peak, tl.max(logit, 1))
        base = tl.where(highest == float("-inf"), 0.0, highest)
        mass = mass * tl.exp2(peak - base) + tl.sum(tl.exp2(logit - base[:, None]), 1)
        peak = highest
    at = query_head * tl.num_programs(2) + tl.program_id(2)
    tl.store(peaks + at, peak, mask=member_inside)
    tl.store(masses + at, mass, mask=member_inside)


@triton.jit(do_not_specialize=["width", "shares", "least"])
def _softmax_kernel(
    positions,
    logits,
    peaks,
    masses,
    best,
    first,
    lag,
    top_k,
    dense_len,
    local_blocks,
    width,
    shares,
    least,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MOST: tl.constexpr,
):
    """Scores of one share of a row's windows: probabilities, summed over the group."""
    WINDOWS: tl.constexpr = BLOCK_SIZE // STRIDE
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    position = tl.load(positions + row).to(tl.int32)
    if _reads_everything(position, top_k, dense_len, BLOCK_SIZE):
        return
    complete = (position - lag + 1) // STRIDE
    member = tl.arange(0, BLOCK_M)
    member_inside = member < GROUP
    query_head = (row * HEADS + head) * GROUP + member
    share = tl.arange(0, MOST)
    at = query_head[:, None] * shares + share[None, :]
    there = member_inside[:, None] & (share < shares)[None, :]
    peak = tl.load(peaks + at, mask=there, other=float("-inf"))
    mass = tl.load(masses + at, mask=there, other=0.0)
    highest = tl.max(peak, 1)
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.sum(mass * tl.exp2(peak - highest[:, None]), 1)
    total = tl.where(member_inside, total, 1.0)
    best += (row * HEADS + head) * width
    first += (row * HEADS + head) * width
    # Later blocks are always read; of the first of them, one window reaches back.
    blocks = position // BLOCK_SIZE - local_blocks + 1
    begin, end = share_of(blocks * WINDOWS, least, 2, BLOCK_N)
    for start in range(begin, end, BLOCK_N):
        window = start + tl.arange(0, BLOCK_N)
        inside = (window > 0) & (window < tl.minimum(end, complete))
        logit = tl.load(
            logits + query_head[:, None] * (width * WINDOWS) + window[None, :],
            mask=member_inside[:, None] & inside[None, :],
            other=float("-inf"),
        )
        score = tl.sum(tl.exp2(logit - highest[:, None]) / total[:, None], 0)
        score = tl.where(inside, score, float("-inf"))
        _store_scores(best, first, score, start, end, WINDOWS)


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
    best,
    first,
    table,
    positions,
    blocks,
    pieces,
    lengths,
    init_blocks,
    local_blocks,
    top_k,
    dense_len,
    width,
    capacity,
    stride_table,
    HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    lane = tl.arange(0, BLOCK)
    position = tl.load(positions + row).to(tl.int32)
    own = position // BLOCK_SIZE
    everything = _reads_everything(position, top_k, dense_len, BLOCK_SIZE)
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
    compressed: Tensor,
    vectors: Tensor,
    block_table: Tensor,
    positions: Tensor,
    ranking: Ranking,
    blocks: Blocks,
    *,
    dense_len: int = 0,
    capacity: int | None = None,
) -> Selected:
    """Same contract as :func:`vllm_sparse.kernels.reference.sparda_steps.select_blocks`.

    Three launches for a softmax, two for a Forecast, one if the table is so narrow that every row
    reads all its blocks. Queries are rounded to the dtype of the compressed keys, a Forecast is
    not. Scratch: ``8 * R * G * blocks`` bytes; with a softmax also ``4 * R * H * windows``, but not
    much more than 64 MiB: more rows take turns, of two launches each.

    Args:
        compressed: ``[blocks, G, windows per block, D]``; windows per block is a power of two.
        vectors: ``[R, H, D]`` for a softmax, else ``[R, G, D]``; channels contiguous.
        block_table: int32 ``[R, blocks]``, entries contiguous.
        positions: int32 or int64 ``[R]``; negative for padding rows.
        ranking: How to score.
        blocks: What to take.
        dense_len: Rows of at most so many tokens read all their blocks.
        capacity: Width of the result.
    """
    rows, width = block_table.shape
    kv_heads, windows = compressed.shape[1:3]
    size, device = blocks.block_size, compressed.device
    whole = max(blocks.top_k, -(-dense_len // size))
    capacity = min(whole, width) if capacity is None else capacity
    assert capacity >= min(whole, width)
    assert blocks.top_k > blocks.init_blocks + blocks.local_blocks
    assert windows * blocks.kernel_stride == size
    assert compressed.stride(-1) == vectors.stride(-1) == block_table.stride(-1) == 1
    assert positions.is_contiguous()
    logical, pieces = (
        torch.empty(rows, kv_heads, capacity, dtype=torch.int32, device=device) for _ in range(2)
    )
    lengths = torch.empty(rows, dtype=torch.int32, device=device)
    if not rows:
        return Selected(logical, pieces, lengths)
    best, first = (
        torch.empty(rows, kv_heads, width, dtype=torch.float32, device=device) for _ in range(2)
    )
    if width > whole:
        arguments = compressed, vectors, block_table, positions, best, first
        score = _score_by_softmax if ranking.softmax else _score_by_forecast
        score(*arguments, ranking=ranking, blocks=blocks, dense_len=dense_len)
    block, warps, stages = launch("choose_blocks", device)
    _choose_kernel[(rows, kv_heads)](
        best,
        first,
        block_table,
        positions,
        logical,
        pieces,
        lengths,
        blocks.init_blocks,
        blocks.local_blocks,
        blocks.top_k,
        dense_len,
        width,
        capacity,
        block_table.stride(0),
        HEADS=kv_heads,
        BLOCK_SIZE=size,
        BLOCK=block,
        num_warps=warps,
        num_stages=stages,
    )
    return Selected(logical, pieces, lengths)


def _score_by_forecast(
    compressed: Tensor,
    vectors: Tensor,
    table: Tensor,
    positions: Tensor,
    best: Tensor,
    first: Tensor,
    *,
    ranking: Ranking,
    blocks: Blocks,
    dense_len: int,
) -> None:
    (rows, width), (_, kv_heads, windows, dim) = table.shape, compressed.shape
    block, warps, stages = launch("score_blocks", table.device, dim, compressed.dtype)
    shares, least = split_rows(rows * kv_heads, width * windows, block, table.device, _WORTH)
    _forecast_kernel[(rows, kv_heads, shares)](
        compressed,
        vectors,
        table,
        positions,
        best,
        first,
        ranking.lag,
        blocks.top_k,
        dense_len,
        blocks.local_blocks,
        width,
        least,
        *compressed.stride()[:3],
        *vectors.stride()[:2],
        table.stride(0),
        HEADS=kv_heads,
        DIM=dim,
        BLOCK_SIZE=blocks.block_size,
        STRIDE=blocks.kernel_stride,
        BLOCK_N=max(block, windows),
        BLOCK_D=dim_block(dim),
        num_warps=warps,
        num_stages=stages,
    )


def _score_by_softmax(
    compressed: Tensor,
    vectors: Tensor,
    table: Tensor,
    positions: Tensor,
    best: Tensor,
    first: Tensor,
    *,
    ranking: Ranking,
    blocks: Blocks,
    dense_len: int,
) -> None:
    (total, width), (_, kv_heads, windows, dim) = table.shape, compressed.shape
    heads, device = vectors.shape[1], table.device
    vectors = vectors.to(compressed.dtype)
    # Slices of four rows begin where the whole does: at 16 bytes.
    rows = min(total, max(_MOST_LOGITS // (heads * width * windows) // 4 * 4, 4))
    block, warps, stages = launch("score_blocks", device, dim, compressed.dtype)
    shares, least = split_rows(rows * kv_heads, width * windows, block, device, _WORTH)
    logits = torch.empty(rows, heads, width * windows, dtype=torch.float32, device=device)
    peaks, masses = (
        torch.empty(rows, heads, shares, dtype=torch.float32, device=device) for _ in range(2)
    )
    shape = {
        "HEADS": kv_heads,
        "GROUP": heads // kv_heads,
        "BLOCK_SIZE": blocks.block_size,
        "STRIDE": blocks.kernel_stride,
        "num_warps": warps,
    }
    members = triton.next_power_of_2(heads // kv_heads)
    wide = max(_LOGITS // members, windows)
    numbers = ranking.lag, blocks.top_k, dense_len
    for begin in range(0, total, rows):
        part = slice(begin, begin + rows)
        grid = (len(positions[part]), kv_heads, shares)
        _logits_kernel[grid](
            compressed,
            vectors[part],
            table[part],
            positions[part],
            logits,
            peaks,
            masses,
            ranking.scale * 1.4426950408889634,
            *numbers,
            width,
            least,
            *compressed.stride()[:3],
            *vectors.stride()[:2],
            table.stride(0),
            **shape,
            DIM=dim,
            BLOCK_M=row_block(heads // kv_heads),
            BLOCK_N=block,
            BLOCK_D=dim_block(dim),
            num_stages=stages,
        )
        _softmax_kernel[grid](
            positions[part],
            logits,
            peaks,
            masses,
            best[part],
            first[part],
            *numbers,
            blocks.local_blocks,
            width,
            shares,
            -(-least * block // wide),
            **shape,
            BLOCK_M=members,
            BLOCK_N=wide,
            MOST=MOST_SHARES,
        )
