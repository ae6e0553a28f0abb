# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The C++ block selection behind the reference's interface."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from vllm_sparse.kernels.cpu import build

if TYPE_CHECKING:
    from vllm_sparse.kernels.reference.selection import Blocks, Ranking


def select_blocks(
    compressed: Tensor,
    vectors: Tensor,
    table: Tensor,
    positions: Tensor,
    ranking: Ranking,
    blocks: Blocks,
) -> Tensor:
    """Same contract as :func:`vllm_sparse.kernels.reference.selection.select_blocks`.

    Raises:
        ValueError: Unsupported dtype.
    """
    rows, heads, dim = vectors.shape
    kv_heads, windows = compressed.shape[1:3]
    table = table.contiguous()
    assert compressed.is_contiguous()
    assert table.dtype == positions.dtype == torch.int64
    assert vectors.dtype == compressed.dtype
    assert vectors.stride(1) == dim
    assert windows * blocks.kernel_stride == blocks.block_size
    chosen = torch.empty(rows, kv_heads, blocks.top_k, dtype=torch.int64)
    sizes = (ctypes.c_int64 * 13)(
        rows,
        kv_heads,
        heads // kv_heads,
        dim,
        windows,
        blocks.kernel_stride,
        table.shape[1],
        blocks.init_blocks,
        blocks.local_blocks,
        blocks.top_k,
        ranking.lag,
        int(ranking.softmax),
        vectors.stride(0),
    )
    tensors = (compressed, vectors, table, positions.contiguous(), chosen)
    status = build.load().vllm_sparse_select_blocks(
        build.DTYPES.get(compressed.dtype, -1),
        *(t.data_ptr() for t in tensors),
        sizes,
        ranking.scale,
    )
    if status:
        raise ValueError(f"the CPU selection kernel does not support {compressed.dtype}")
    return chosen
