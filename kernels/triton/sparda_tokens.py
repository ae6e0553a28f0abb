# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Stores a step's new tokens, the windows of compressed keys that they complete, and queries."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from vllm_sparse.kernels.fp8 import UNSCALED, Scales
from vllm_sparse.kernels.triton.launch import FIXED, dim_block
from vllm_sparse.kernels.triton.ops import rounded_to

if TYPE_CHECKING:
    from torch import Tensor
    from vllm_sparse.kernels.types import NewQueries, NewWindows


# How wide a table is changes from step to step, which must not compile variants.
@triton.jit(do_not_specialize=["stride_table"])
def _write_tokens_kernel(
    host, slab, frame_of, slots, key, value, compressed, positions, table, kept, query, recent,
    key_scale, value_scale, stride_key_row, stride_key_head, stride_value_row, stride_value_head,
    stride_block, stride_head, stride_slot, stride_table, stride_query_row, stride_query_head,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, STRIDE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr, BLOCK_H: tl.constexpr,
    RECENT: tl.constexpr,
):  # fmt: skip
    """One token of one KV head, the window that it completes, and the queries of its group.

    Without a stride there are no windows, without a group no queries. The token itself is not read
    back: it may be on its way to the host.
    """
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    slot = tl.load(slots + row)
    if slot < 0:
        return
    dim = tl.arange(0, BLOCK_D)
    inside = dim < DIM
    element = host.dtype.element_ty
    b_k = tl.load(key + row * stride_key_row + head * stride_key_head + dim, mask=inside, other=0.0)
    b_k = rounded_to(b_k, key_scale, element)
    b_v = tl.load(
        value + row * stride_value_row + head * stride_value_head + dim, mask=inside, other=0.0
    )
    b_v = rounded_to(b_v, value_scale, element)
    piece = slot // BLOCK_SIZE * HEADS + head
    offset = slot % BLOCK_SIZE
    target = host + (piece * BLOCK_SIZE + offset) * (2 * DIM) + dim
    tl.store(target, b_k, mask=inside)
    tl.store(target + DIM, b_v, mask=inside)
    frame = tl.load(frame_of + piece).to(tl.int64)
    if frame >= 0:
        target = slab + (frame * BLOCK_SIZE + offset) * (2 * DIM) + dim
        tl.store(target, b_k, mask=inside)
        tl.store(target + DIM, b_v, mask=inside)
    if GROUP:
        query_head = head * GROUP + tl.arange(0, BLOCK_H)
        mask = (query_head < (head + 1) * GROUP)[:, None] & inside[None, :]
        source = row * stride_query_row + (query_head * stride_query_head)[:, None] + dim[None, :]
        b_q = tl.load(query + source, mask=mask).to(kept.dtype.element_ty)
        place = (query_head * DIM)[:, None] + dim[None, :]
        tl.store(kept + slot // BLOCK_SIZE * (HEADS * GROUP * DIM) + place, b_q, mask=mask)
        if RECENT:
            tl.store(recent + row * (HEADS * GROUP * DIM) + place, b_q, mask=mask)
    if STRIDE:
        end = tl.load(positions + row).to(tl.int32) + 1
        if (end >= 2 * STRIDE) & (end % STRIDE == 0):
            table += row * stride_table
            member = tl.arange(0, BLOCK_N)
            older = member < 2 * STRIDE - 1
            token = end - 2 * STRIDE + member
            block = tl.load(table + token // BLOCK_SIZE, mask=older, other=0).to(tl.int64)
            pieces = block * HEADS + head
            places = token % BLOCK_SIZE * (2 * DIM)
            frames = tl.load(frame_of + pieces, mask=older, other=-1).to(tl.int64)
            afar = older & (frames < 0)
            near = frames >= 0
            b_keys = tl.load(
                host + (pieces * (BLOCK_SIZE * 2 * DIM) + places)[:, None] + dim[None, :],
                mask=afar[:, None] & inside[None, :],
                other=0.0,
            ).to(tl.float32)
            b_keys += tl.load(
                slab + (frames * (BLOCK_SIZE * 2 * DIM) + places)[:, None] + dim[None, :],
                mask=near[:, None] & inside[None, :],
                other=0.0,
            ).to(tl.float32)
            newest = (member == 2 * STRIDE - 1)[:, None]
            b_keys = tl.where(newest, b_k.to(tl.float32)[None, :], b_keys)
            mean = tl.sum(b_keys, 0) / (2 * STRIDE) * key_scale
            window = (
                compressed + slot // BLOCK_SIZE * stride_block + head * stride_head
                + offset // STRIDE * stride_slot + dim
            )  # fmt: skip
            tl.store(window, mean.to(compressed.dtype.element_ty), mask=inside)


def write_tokens(
    host: Tensor,
    slab: Tensor,
    frame_of: Tensor,
    slots: Tensor,
    key: Tensor,
    value: Tensor,
    windows: NewWindows | None = None,
    scales: Scales = UNSCALED,
    queries: NewQueries | None = None,
) -> None:
    """Same contract as :func:`vllm_sparse.kernels.reference.sparda_tokens.write_tokens`.

    One launch. A slab that anything is on its way into must have arrived.

    Args:
        host: Contiguous ``[blocks, G, block_size, 2 * D]``; may be a device view of pinned memory.
        slab: Contiguous ``[frames, block_size, 2 * D]`` of the same dtype.
        frame_of: int32 ``[blocks * G]``.
        slots: int64 ``[T]``.
        key: ``[T, G, D]``, channels contiguous.
        value: ``[T, G, D]``, channels contiguous.
        windows: Channels of what is compressed and entries of the table are contiguous; positions
            are int32 or int64, the table is int32.
        scales: Of an fp8 cache; numbers are rounded to the nearest.
        queries: Channels are contiguous; what is kept is contiguous, may be a device view of pinned
            memory, and on the device has the same dtype.
    """
    rows, kv_heads, dim = key.shape
    assert host.is_contiguous()
    assert slab.is_contiguous()
    assert host.dtype == slab.dtype
    assert slots.is_contiguous()
    assert key.stride(-1) == value.stride(-1) == 1
    if not rows:
        return
    # Never read without windows.
    compressed, positions, table, stride = windows or (host, slots, frame_of, 0)
    steps: tuple[int, ...] = (0, 0, 0, 0)
    if windows is not None:
        assert positions.is_contiguous()
        assert compressed.stride(-1) == table.stride(-1) == 1
        steps = (*compressed.stride()[:3], table.stride(0))
    kept, query, recent = queries or (host, key, None)
    group = 0
    if queries is not None:
        group = query.shape[1] // kv_heads
        assert kept.is_contiguous()
        assert kept.shape[1:] == query.shape[1:] == (kv_heads * group, dim)
        assert query.stride(-1) == 1
        assert recent is None or (recent.is_contiguous() and recent.dtype == kept.dtype)
        assert recent is None or len(recent) >= rows
    _, warps, stages = FIXED["write_tokens_and_windows" if windows else "write_tokens"]
    _write_tokens_kernel[(rows, kv_heads)](
        host, slab, frame_of, slots, key, value, compressed, positions, table, kept, query,
        kept if recent is None else recent, scales.key, scales.value, key.stride(0), key.stride(1),
        value.stride(0), value.stride(1), *steps, query.stride(0), query.stride(1),
        HEADS=kv_heads, DIM=dim, BLOCK_SIZE=host.shape[2], STRIDE=stride,
        BLOCK_N=triton.next_power_of_2(2 * stride), BLOCK_D=dim_block(dim), GROUP=group,
        BLOCK_H=triton.next_power_of_2(max(group, 1)), RECENT=recent is not None,
        num_warps=warps, num_stages=stages,
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
    b_q = tl.load(query + source, mask=mask).to(kept.dtype.element_ty)
    tl.store(kept + target, b_q, mask=mask)


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
    together, warps, stages = FIXED["record_queries"]
    _record_queries_kernel[(len(last), triton.cdiv(heads, together))](
        kept, query, slots, last, query.stride(0), query.stride(1), HEADS=heads, DIM=dim,
        BLOCK_SIZE=block_size, BLOCK_H=together, BLOCK_D=dim_block(dim), num_warps=warps,
        num_stages=stages,
    )  # fmt: skip


# Neither the pool's size nor that of a batch compiles variants.
@triton.jit(do_not_specialize=["blocks_a_layer", "rows_a_layer"])
def _recall_queries_kernel(
    kept, recent, places, blocks, output, blocks_a_layer, rows_a_layer, SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A part of one row's queries in one layer: over the bus only where they are not recent."""
    row = tl.program_id(0).to(tl.int64)
    layer = tl.program_id(1).to(tl.int64)
    at = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = at < SIZE
    place = tl.load(places + row)
    if place >= 0:
        found = tl.load(recent + (layer * rows_a_layer + place) * SIZE + at, mask=inside)
    else:
        block = layer * blocks_a_layer + tl.load(blocks + row)
        found = tl.load(kept + block * SIZE + at, mask=inside)
    tl.store(output + (layer * rows_a_layer + row) * SIZE + at, found, mask=inside)


def recall_queries(
    kept: Tensor, recent: Tensor, places: Tensor, blocks: Tensor, output: Tensor
) -> None:
    """Same contract as :func:`vllm_sparse.kernels.reference.sparda_tokens.recall_queries`.

    One launch for all layers.

    Args:
        kept: Contiguous ``[layers, blocks, H, D]``; may be a device view of pinned memory.
        recent: Contiguous ``[layers, n, H, D]`` of the same dtype, on the device.
        places: int64 ``[R]``.
        blocks: int64 ``[R]``.
        output: As ``recent``, and none of its memory.
    """
    assert kept.is_contiguous()
    assert recent.is_contiguous()
    assert output.is_contiguous()
    assert kept.dtype == recent.dtype == output.dtype
    assert recent.shape == output.shape
    assert places.is_contiguous()
    assert blocks.is_contiguous()
    layers, most, heads, dim = recent.shape
    rows, size = len(places), heads * dim
    assert rows <= most
    if not rows:
        return
    block, warps, stages = FIXED["recall_queries"]
    _recall_queries_kernel[(rows, layers, triton.cdiv(size, block))](
        kept, recent, places, blocks, output, kept.shape[1], most, SIZE=size, BLOCK=block,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
