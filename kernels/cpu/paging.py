# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The C++ page table, copies and attention over frames behind the reference's interface."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from vllm_sparse.kernels.cpu import build
from vllm_sparse.kernels.reference.paging import PageTable, Resolved, SlabFullError


def resolve(table: PageTable, pieces: Tensor, step: int) -> Resolved:
    """Same contract as :func:`vllm_sparse.kernels.reference.paging.resolve`."""
    wanted = pieces.contiguous()
    frames = torch.empty(wanted.shape, dtype=torch.int32)
    missing, targets = (torch.empty(wanted.numel(), dtype=torch.int64) for _ in range(2))
    counts = (ctypes.c_int64 * 2)()
    full = build.load().vllm_sparse_resolve(
        table.frame_of.data_ptr(),
        table.piece_of.data_ptr(),
        table.last_use.data_ptr(),
        table.recent.data_ptr(),
        len(table.piece_of),
        table.hand.data_ptr(),
        step,
        wanted.data_ptr(),
        wanted.numel(),
        frames.data_ptr(),
        missing.data_ptr(),
        targets.data_ptr(),
        ctypes.addressof(counts),
    )
    if full:
        raise SlabFullError(
            f"all {len(table.piece_of)} frames of the device slab are in use in this step"
        )
    hits, misses = counts
    return Resolved(frames, missing[:misses], targets[:misses], hits)


def copy_pieces(target: Tensor, target_index: Tensor, source: Tensor, source_index: Tensor) -> None:
    """Same contract as :func:`vllm_sparse.kernels.reference.paging.copy_pieces`.

    Runs on the calling thread alone and without Python's lock.
    """
    size = target[0].nbytes
    assert target.is_contiguous()
    assert source.is_contiguous()
    assert source[0].nbytes == size
    assert target_index.dtype == source_index.dtype == torch.int64
    build.load().vllm_sparse_copy(
        target.data_ptr(),
        target_index.contiguous().data_ptr(),
        source.data_ptr(),
        source_index.contiguous().data_ptr(),
        len(target_index),
        size,
    )


def attend_frames(
    slab: Tensor, query: Tensor, output: Tensor, frames: Tensor, lengths: Tensor, scale: float
) -> None:
    """Same contract as :func:`vllm_sparse.kernels.reference.paging.attend_frames`.

    Raises:
        ValueError: Unsupported dtype or head size.
    """
    tokens, heads, dim = query.shape
    kv_heads, count = frames.shape[1:]
    block_size = slab.shape[1]
    assert slab.is_contiguous()
    assert frames.is_contiguous()
    assert frames.dtype == lengths.dtype == torch.int32
    assert query.stride(1) == output.stride(1) == dim
    sizes = (ctypes.c_int64 * 9)(
        tokens,
        kv_heads,
        heads // kv_heads,
        dim,
        block_size,
        count,
        count * block_size,
        query.stride(0),
        output.stride(0),
    )
    pointers = (t.data_ptr() for t in (slab, query, output, frames, lengths))
    status = build.load().vllm_sparse_attend_frames(
        build.DTYPES.get(slab.dtype, -1), *pointers, sizes, scale
    )
    if status:
        raise ValueError(f"the CPU kernel does not support {slab.dtype}, head size {dim}")
