# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""SparDA's page table and copies in C++."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from vllm_sparse.kernels.cpu import build
from vllm_sparse.kernels.types import PageTable, Resolution


class _Table(ctypes.Structure):
    """``SpardaPageTable`` of sparda_paging.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in PageTable._fields),
        ("num_frames", ctypes.c_int64),
    )


def resolve(table: PageTable, wanted: Tensor, step: Tensor, counters: Tensor) -> Resolution:
    """Same contract as :func:`vllm_sparse.kernels.reference.sparda_paging.resolve`."""
    total = wanted.numel()
    assert wanted.is_contiguous()
    assert wanted.dtype == torch.int32
    assert step.dtype == counters.dtype == torch.int64
    frames = torch.empty_like(wanted)
    missing, targets = torch.empty(2, total, dtype=torch.int32).unbind()
    misses = torch.empty(1, dtype=torch.int32)
    parts = _Table(*(part.data_ptr() for part in table), table.piece_of.shape[0])
    build.load().vllm_sparse_resolve(
        ctypes.byref(parts), wanted.data_ptr(), total, step.data_ptr(), counters.data_ptr(),
        frames.data_ptr(), missing.data_ptr(), targets.data_ptr(), misses.data_ptr(),
    )  # fmt: skip
    return Resolution(frames, missing, targets, misses)


def copy_pieces(
    target: Tensor,
    target_index: Tensor,
    source: Tensor,
    source_index: Tensor,
    count: Tensor,
    *,
    programs: int = 32,
) -> None:
    """Same contract as :func:`vllm_sparse.kernels.reference.sparda_paging.copy_pieces`.

    Runs on the calling thread alone and without Python's lock.
    """
    del programs
    size = target[0].nbytes
    assert target.is_contiguous()
    assert source.is_contiguous()
    assert source[0].nbytes == size
    assert target_index.dtype == source_index.dtype == count.dtype == torch.int32
    build.load().vllm_sparse_copy(
        target.data_ptr(), target_index.data_ptr(), source.data_ptr(), source_index.data_ptr(),
        count.data_ptr(), size,
    )  # fmt: skip
