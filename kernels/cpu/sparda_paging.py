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
    """Look up and assign the frames of wanted pieces, as the reference does."""
    total = wanted.numel()
    assert wanted.is_contiguous()
    assert wanted.dtype == torch.int32
    assert step.dtype == counters.dtype == torch.int64
    frames = torch.empty_like(wanted)
    missing, targets = torch.empty(2, total, dtype=torch.int32).unbind()
    misses = torch.empty(1, dtype=torch.int32)
    parts = _Table(*(part.data_ptr() for part in table), table.piece_of.shape[0])
    found = frames, missing, targets, misses
    build.call("resolve", (wanted, step, counters, *found), total, parts)
    return Resolution(*found)


def copy_pieces(
    target: Tensor,
    target_index: Tensor,
    source: Tensor,
    source_index: Tensor,
    count: Tensor,
    *,
    programs: int = 32,
) -> None:
    """Copy as many whole pieces as ``count`` says, from index to index.

    Runs on the calling thread alone and without Python's lock.
    """
    del programs
    size = target[0].nbytes
    assert target.is_contiguous()
    assert source.is_contiguous()
    assert source[0].nbytes == size
    assert target_index.dtype == source_index.dtype == count.dtype == torch.int32
    build.call("copy", (target, target_index, source, source_index, count), size)
