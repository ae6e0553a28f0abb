# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""SparDA's block selection in C++."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from vllm_sparse.kernels.cpu import build
from vllm_sparse.kernels.reference.sparda_select import rotate
from vllm_sparse.kernels.types import Selected

if TYPE_CHECKING:
    from vllm_sparse.kernels.types import Blocks, Ranking

_COUNTS = (
    *("rows", "kv_heads", "group", "dim", "windows", "stride", "blocks", "table_row"),
    *("init_blocks", "local_blocks", "top_k", "lag", "softmax", "dense_len", "capacity"),
    *("vector_row", "vector_head", "compressed_block", "compressed_head", "compressed_window"),
)


class _Sizes(ctypes.Structure):
    """``SpardaSelectSizes`` of sparda_select.cpp."""

    _fields_ = (*((name, ctypes.c_int64) for name in _COUNTS), ("scale", ctypes.c_float))


def select_blocks(
    compressed: Tensor, vectors: Tensor | None, block_table: Tensor, positions: Tensor,
    ranking: Ranking, blocks: Blocks, *, dense_len: int = 0,
) -> Selected:  # fmt: skip
    """The blocks that each decode row reads.

    Same contract as :func:`vllm_sparse.kernels.reference.sparda_select.select_blocks`.

    Channels of ``compressed`` and ``vectors`` and entries of ``block_table`` are contiguous.
    Vectors are rounded to the dtype of the compressed keys.

    Raises:
        ValueError: Unsupported dtype.
    """
    rows, width = block_table.shape
    _, kv_heads, windows, dim = compressed.shape
    size = blocks.block_size
    capacity = min(max(blocks.top_k, -(-dense_len // size)), width)
    assert blocks.top_k > blocks.init_blocks + blocks.local_blocks
    assert windows * blocks.kernel_stride == size
    assert block_table.dtype == torch.int32
    assert compressed.stride(-1) == block_table.stride(-1) == 1
    group, row_stride, head_stride = 0, 0, 0
    if vectors is not None:
        if ranking.rotary is not None:
            vectors = rotate(vectors, positions.clamp(min=0), ranking.rotary)
        vectors = vectors.to(compressed.dtype)
        assert vectors.stride(-1) == 1
        group = vectors.shape[1] // kv_heads
        row_stride, head_stride = vectors.stride()[:2]
    positions = positions.to(torch.int64).contiguous()
    chosen, pieces = torch.empty(2, rows, kv_heads, capacity, dtype=torch.int32).unbind()
    lengths = torch.empty(rows, dtype=torch.int32)
    sizes = _Sizes(
        rows, kv_heads, group, dim, windows, blocks.kernel_stride, width, block_table.stride(0),
        blocks.init_blocks, blocks.local_blocks, blocks.top_k, ranking.lag, ranking.softmax,
        dense_len, capacity, row_stride, head_stride, *compressed.stride()[:3], ranking.scale,
    )  # fmt: skip
    selected = Selected(chosen, pieces, lengths)
    tensors = compressed, vectors, block_table, positions, *selected
    build.call("select_blocks", tensors, sizes, dtype=compressed.dtype)
    return selected
