# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""SparDA's block scores for decode rows: of windows of compressed keys, pooled to blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from vllm_sparse.kernels.triton.launch import (
    LOG2_E,
    MOST_SHARES,
    dim_block,
    row_block,
    split_kernel,
)
from vllm_sparse.kernels.triton.ops import dot, share_of

if TYPE_CHECKING:
    from torch import Tensor
    from vllm_sparse.kernels.types import Blocks, Ranking

# Logits that exist at the same time; more rows take turns.
_MOST_LOGITS = 1 << 24

# Logits that a program turns into probabilities at once.
_LOGITS = 1024

_KEY_STRIDES = "stride_block", "stride_head", "stride_slot"


@triton.jit
def reads_everything(position, top_k, dense_len, BLOCK_SIZE: tl.constexpr):
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
        first: For each block of a row.
        score: Scores of the windows from ``start`` on.
        start: At the beginning of a block.
        end: Windows from here on are somebody else's.
        WINDOWS: Windows per block.
    """
    BLOCKS: tl.constexpr = score.shape[0] // WINDOWS
    window = start + tl.arange(0, score.shape[0])
    tl.store(first + window // WINDOWS, score, mask=(window % WINDOWS == 0) & (window < end))
    block = start // WINDOWS + tl.arange(0, BLOCKS)
    highest = tl.max(tl.reshape(score, [BLOCKS, WINDOWS]), 1)
    tl.store(best + block, highest, mask=block < end // WINDOWS)


@triton.jit
def _share_of_free_blocks(
    position, local_blocks, least, BLOCK_SIZE: tl.constexpr, WINDOWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """This program's share of the windows that matter: see :func:`.ops.share_of`.

    Later blocks are always read; of the first of them, one window reaches back.
    """
    blocks = position // BLOCK_SIZE - local_blocks + 1
    return share_of(blocks * WINDOWS, least, 2, BLOCK_N)


@triton.jit
def _turned(
    vector, cache, position, dim, stride_cache, DIM: tl.constexpr, HALF: tl.constexpr,
    HALVES: tl.constexpr,
):  # fmt: skip
    """A vector after its rotary embedding, rounded as a stored one would be; float32 ``[D]``.

    Each channel loads the one that it turns with: that is cheaper than to exchange them.
    """
    inside = dim < DIM
    turns = dim < 2 * HALF
    if HALVES:
        is_first = dim < HALF
        other = tl.where(is_first, dim + HALF, dim - HALF)
        angle = tl.where(is_first, dim, dim - HALF)
    else:
        is_first = dim % 2 == 0
        other = tl.where(is_first, dim + 1, dim - 1)
        angle = dim // 2
    stored = tl.load(vector + dim, mask=inside, other=0.0)
    own = stored.to(tl.float32)
    partner = tl.load(vector + other, mask=turns, other=0.0).to(tl.float32)
    cache += position.to(tl.int64) * stride_cache + angle
    cos = tl.load(cache, mask=turns, other=1.0).to(tl.float32)
    sin = tl.load(cache + HALF, mask=turns, other=0.0).to(tl.float32)
    turned = own * cos + tl.where(is_first, -partner, partner) * sin
    return turned.to(stored.dtype).to(tl.float32)


# How wide a table is changes from step to step, which must not compile variants, nor must the
# number of rows, on which it depends how often they are split.
@triton.jit(do_not_specialize=["width", "least", "stride_table"])
def _forecast_kernel(
    compressed, vectors, table, positions, cache, best, first, lag, top_k, dense_len,
    local_blocks, width, least, stride_block, stride_head, stride_slot, stride_vector_row,
    stride_vector_head, stride_table, stride_cache, HEADS: tl.constexpr, DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, STRIDE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    HALF: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """Scores of one share of a row's windows by the vector of its KV head.

    Half of the channels that turn by the row's position; none turn if it is 0.
    """
    WINDOWS: tl.constexpr = BLOCK_SIZE // STRIDE
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    position = tl.load(positions + row).to(tl.int32)
    if reads_everything(position, top_k, dense_len, BLOCK_SIZE):
        return
    complete = (position - lag + 1) // STRIDE
    dim = tl.arange(0, BLOCK_D)
    dim_inside = dim < DIM
    vectors += row * stride_vector_row + head.to(tl.int64) * stride_vector_head
    if HALF:
        b_f = _turned(vectors, cache, position, dim, stride_cache, DIM, HALF, HALVES)
    else:
        b_f = tl.load(vectors + dim, mask=dim_inside, other=0.0).to(tl.float32)
    compressed += head.to(tl.int64) * stride_head
    table += row * stride_table
    best += (row * HEADS + head) * width
    first += (row * HEADS + head) * width
    begin, end = _share_of_free_blocks(position, local_blocks, least, BLOCK_SIZE, WINDOWS, BLOCK_N)
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
    compressed, vectors, table, positions, logits, peaks, masses, scale_log2, lag, top_k,
    dense_len, width, least, stride_block, stride_head, stride_slot, stride_vector_row,
    stride_vector_head, stride_table, HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, STRIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Logits of one share of a row's windows, the largest and their softmax mass, per query head.

    The compressed keys are read once: even sixteen logits are a quarter of a key of 128 channels.
    """
    WINDOWS: tl.constexpr = BLOCK_SIZE // STRIDE
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    position = tl.load(positions + row).to(tl.int32)
    if reads_everything(position, top_k, dense_len, BLOCK_SIZE):
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
    positions, logits, peaks, masses, best, first, lag, top_k, dense_len, local_blocks, width,
    shares, least, HEADS: tl.constexpr, GROUP: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    STRIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """Scores of one share of a row's windows: probabilities, summed over the group."""
    WINDOWS: tl.constexpr = BLOCK_SIZE // STRIDE
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    position = tl.load(positions + row).to(tl.int32)
    if reads_everything(position, top_k, dense_len, BLOCK_SIZE):
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
    begin, end = _share_of_free_blocks(position, local_blocks, least, BLOCK_SIZE, WINDOWS, BLOCK_N)
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


def score_blocks(
    compressed: Tensor,
    vectors: Tensor,
    table: Tensor,
    positions: Tensor,
    ranking: Ranking,
    blocks: Blocks,
    dense_len: int,
) -> tuple[Tensor, Tensor]:
    """Scores the blocks that compete; see :func:`.sparda_select.select_blocks` for the arguments.

    Returns:
        The best score of the windows stored with each block, and the score of the first of them,
        which also overlaps the block before; float32 ``[R, G, blocks]``, anything where a block
        does not compete.
    """
    (rows, width), (_, kv_heads, windows, dim) = table.shape, compressed.shape
    heads, device = vectors.shape[1], table.device
    best, first = (
        torch.empty(rows, kv_heads, width, dtype=torch.float32, device=device) for _ in range(2)
    )
    at_once = rows
    if ranking.softmax:
        vectors = vectors.to(compressed.dtype)
        # Slices of four rows begin where the whole does: at 16 bytes.
        at_once = min(rows, max(_MOST_LOGITS // (heads * width * windows) // 4 * 4, 4))
    (block, warps, stages), (shares, least) = split_kernel(
        "score_blocks", at_once * kv_heads, width * windows, dim, compressed.dtype, device
    )
    rows_of = {
        "lag": ranking.lag, "top_k": blocks.top_k, "dense_len": dense_len, "width": width,
        "HEADS": kv_heads, "BLOCK_SIZE": blocks.block_size, "STRIDE": blocks.kernel_stride,
        "num_warps": warps,
    }  # fmt: skip
    keys = {
        **dict(zip(_KEY_STRIDES, compressed.stride()[:3], strict=True)),
        "stride_vector_row": vectors.stride(0), "stride_vector_head": vectors.stride(1),
        "stride_table": table.stride(0), "DIM": dim, "BLOCK_D": dim_block(dim),
        "num_stages": stages,
    }  # fmt: skip
    local = blocks.local_blocks
    if not ranking.softmax:
        cache, halves = ranking.rotary or (vectors[0, 0], False)
        turning = cache.shape[1] if ranking.rotary else 0
        assert turning <= dim
        assert cache.stride(-1) == 1
        _forecast_kernel[(rows, kv_heads, shares)](
            compressed, vectors, table, positions, cache, best, first, local_blocks=local,
            least=least, stride_cache=cache.stride(0), BLOCK_N=max(block, windows),
            HALF=turning // 2, HALVES=halves, **rows_of, **keys,
        )  # fmt: skip
        return best, first
    logits = torch.empty(at_once, heads, width * windows, dtype=torch.float32, device=device)
    peaks, masses = (
        torch.empty(at_once, heads, shares, dtype=torch.float32, device=device) for _ in range(2)
    )
    group = heads // kv_heads
    members = triton.next_power_of_2(group)
    wide = max(_LOGITS // members, windows)
    for begin in range(0, rows, at_once):
        part = slice(begin, begin + at_once)
        grid = (len(positions[part]), kv_heads, shares)
        _logits_kernel[grid](
            compressed, vectors[part], table[part], positions[part], logits, peaks, masses,
            scale_log2=ranking.scale * LOG2_E, least=least, GROUP=group,
            BLOCK_M=row_block(group), BLOCK_N=block, **rows_of, **keys,
        )  # fmt: skip
        _softmax_kernel[grid](
            positions[part], logits, peaks, masses, best[part], first[part], local_blocks=local,
            shares=shares, least=-(-least * block // wide), GROUP=group, BLOCK_M=members,
            BLOCK_N=wide, MOST=MOST_SHARES, **rows_of,
        )  # fmt: skip
    return best, first
