# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Stores a step's new tokens, the windows of compressed keys that they complete, and queries."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from vllm_sparse.kernels.triton.launch import dim_block

# Heads whose queries one program stores.
_HEADS = 8

if TYPE_CHECKING:
    from torch import Tensor


@triton.jit
def _write_tokens_kernel(
    host, slab, frame_of, slots, key, value, stride_key_row, stride_key_head, stride_value_row,
    stride_value_head, HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    slot = tl.load(slots + row)
    if slot < 0:
        return
    dim = tl.arange(0, BLOCK_D)
    inside = dim < DIM
    element = host.dtype.element_ty
    b_k = tl.load(key + row * stride_key_row + head * stride_key_head + dim, mask=inside)
    b_v = tl.load(value + row * stride_value_row + head * stride_value_head + dim, mask=inside)
    piece = slot // BLOCK_SIZE * HEADS + head
    offset = slot % BLOCK_SIZE
    target = host + (piece * BLOCK_SIZE + offset) * (2 * DIM) + dim
    tl.store(target, b_k.to(element), mask=inside)
    tl.store(target + DIM, b_v.to(element), mask=inside)
    frame = tl.load(frame_of + piece).to(tl.int64)
    if frame >= 0:
        target = slab + (frame * BLOCK_SIZE + offset) * (2 * DIM) + dim
        tl.store(target, b_k.to(element), mask=inside)
        tl.store(target + DIM, b_v.to(element), mask=inside)


def write_tokens(
    host: Tensor, slab: Tensor, frame_of: Tensor, slots: Tensor, key: Tensor, value: Tensor
) -> None:
    """Same contract as :func:`vllm_sparse.kernels.reference.sparda_tokens.write_tokens`.

    Args:
        host: Contiguous ``[blocks, G, block_size, 2 * D]``; may be a device view of pinned memory.
        slab: Contiguous ``[frames, block_size, 2 * D]`` of the same dtype.
        frame_of: int32 ``[blocks * G]``.
        slots: int64 ``[T]``.
        key: ``[T, G, D]``, channels contiguous.
        value: ``[T, G, D]``, channels contiguous.
    """
    rows, kv_heads, dim = key.shape
    assert host.is_contiguous()
    assert slab.is_contiguous()
    assert host.dtype == slab.dtype
    assert slots.is_contiguous()
    assert key.stride(-1) == value.stride(-1) == 1
    if not rows:
        return
    _write_tokens_kernel[(rows, kv_heads)](
        host, slab, frame_of, slots, key, value, key.stride(0), key.stride(1), value.stride(0),
        value.stride(1), HEADS=kv_heads, DIM=dim, BLOCK_SIZE=host.shape[2],
        BLOCK_D=dim_block(dim), num_warps=1,
    )  # fmt: skip


# How wide a table is changes from step to step, which must not compile variants.
@triton.jit(do_not_specialize=["stride_table"])
def _update_windows_kernel(
    compressed, source, slab, frame_of, positions, table, stride_block, stride_head, stride_slot,
    stride_table, HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    STRIDE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, FRAMES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    end = tl.load(positions + row).to(tl.int32) + 1
    if (end < 2 * STRIDE) | (end % STRIDE != 0):
        return
    table += row * stride_table
    dim = tl.arange(0, BLOCK_D)
    inside = dim < DIM
    member = tl.arange(0, BLOCK_N)
    taken = member < 2 * STRIDE
    token = end - 2 * STRIDE + member
    block = tl.load(table + token // BLOCK_SIZE, mask=taken, other=0).to(tl.int64)
    piece = block * HEADS + head
    offset = token % BLOCK_SIZE * (2 * DIM)
    afar = taken
    if FRAMES:
        frame = tl.load(frame_of + piece, mask=taken, other=-1).to(tl.int64)
        framed = frame >= 0  # false beyond the window
        afar = taken & (frame < 0)
    b_k = tl.load(
        source + (piece * (BLOCK_SIZE * 2 * DIM) + offset)[:, None] + dim[None, :],
        mask=afar[:, None] & inside[None, :],
        other=0.0,
    ).to(tl.float32)
    if FRAMES:
        b_k += tl.load(
            slab + (frame * (BLOCK_SIZE * 2 * DIM) + offset)[:, None] + dim[None, :],
            mask=framed[:, None] & inside[None, :],
            other=0.0,
        ).to(tl.float32)
    mean = tl.sum(b_k, 0) / (2 * STRIDE)
    newest = end - 1
    block = tl.load(table + newest // BLOCK_SIZE).to(tl.int64)
    window = newest % BLOCK_SIZE // STRIDE
    target = compressed + block * stride_block + head * stride_head + window * stride_slot + dim
    tl.store(target, mean.to(compressed.dtype.element_ty), mask=inside)


def update_windows(
    compressed: Tensor, source: Tensor, positions: Tensor, block_table: Tensor, stride: int, *,
    slab: Tensor | None = None, frame_of: Tensor | None = None,
) -> None:  # fmt: skip
    """Same contract as :func:`vllm_sparse.kernels.reference.sparda_tokens.update_windows`.

    Args:
        compressed: ``[blocks, G, windows per block, D]``, channels contiguous.
        source: Contiguous ``[blocks, G, block_size, 2 * D]``, the new tokens written; may be a
            device view of pinned memory.
        positions: int32 or int64 ``[R]``.
        block_table: int32 ``[R, blocks]``, entries contiguous.
        stride: Tokens from one window's start to the next.
        slab: Contiguous ``[frames, block_size, 2 * D]`` of the same dtype, as soon as nothing is
            on its way into it.
        frame_of: int32 ``[blocks * G]``; needed with ``slab``.
    """
    kv_heads, block_size = source.shape[1:3]
    dim = compressed.shape[3]
    assert source.is_contiguous()
    assert positions.is_contiguous()
    assert compressed.stride(-1) == block_table.stride(-1) == 1
    assert (slab is None) == (frame_of is None)
    frames = slab is not None
    if slab is None or frame_of is None:
        slab = frame_of = source  # unused
    assert slab.is_contiguous()
    assert slab.dtype == source.dtype
    if not len(positions):
        return
    _update_windows_kernel[(len(positions), kv_heads)](
        compressed, source, slab, frame_of, positions, block_table, *compressed.stride()[:3],
        block_table.stride(0), HEADS=kv_heads, DIM=dim, BLOCK_SIZE=block_size, STRIDE=stride,
        BLOCK_N=triton.next_power_of_2(2 * stride), BLOCK_D=dim_block(dim), FRAMES=frames,
        num_warps=4,
    )  # fmt: skip


@triton.jit
def _record_queries_kernel(
    kept, query, slots, last, stride_query_row, stride_query_head, HEADS: tl.constexpr,
    DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.load(last + tl.program_id(0))
    slot = tl.load(slots + row)
    if slot < 0:
        return
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    dim = tl.arange(0, BLOCK_D)
    mask = (head < HEADS)[:, None] & (dim < DIM)[None, :]
    source = row * stride_query_row + (head * stride_query_head)[:, None] + dim[None, :]
    target = slot // BLOCK_SIZE * (HEADS * DIM) + (head * DIM)[:, None] + dim[None, :]
    b_q = tl.load(query + source, mask=mask)
    tl.store(kept + target, b_q.to(kept.dtype.element_ty), mask=mask)


def record_queries(
    kept: Tensor, query: Tensor, slots: Tensor, last: Tensor, block_size: int
) -> None:
    """Same contract as :func:`vllm_sparse.kernels.reference.sparda_tokens.record_queries`.

    Args:
        kept: Contiguous ``[blocks, H, D]``; may be a device view of pinned memory.
        query: ``[T, H, D]``, channels contiguous.
        slots: int64 ``[T]``.
        last: int64 ``[n]``.
        block_size: Tokens per block.
    """
    heads, dim = query.shape[1:]
    assert kept.is_contiguous()
    assert kept.shape[1:] == query.shape[1:]
    assert slots.is_contiguous()
    assert last.is_contiguous()
    assert query.stride(-1) == 1
    if not len(last):
        return
    _record_queries_kernel[(len(last), triton.cdiv(heads, _HEADS))](
        kept, query, slots, last, query.stride(0), query.stride(1), HEADS=heads, DIM=dim,
        BLOCK_SIZE=block_size, BLOCK_H=_HEADS, BLOCK_D=dim_block(dim), num_warps=4,
    )  # fmt: skip
