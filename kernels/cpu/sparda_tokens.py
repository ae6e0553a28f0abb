# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What a SparDA layer stores of a step, in C++: tokens, windows of compressed keys, queries."""

from __future__ import annotations

import torch
from torch import Tensor
from vllm_sparse.kernels.cpu import build

WriteSizes = build.sizes(
    "SpardaWriteSizes",
    "tokens kv_heads block_size head_bytes key_token key_head value_token value_head",
)
WindowSizes = build.sizes(
    "SpardaWindowSizes",
    "rows kv_heads block_size dim stride table_row "
    "compressed_block compressed_head compressed_window",
)
RecordSizes = build.sizes(
    "SpardaRecordSizes", "count heads block_size head_bytes query_token query_head"
)


def write_tokens(
    host: Tensor, slab: Tensor, frame_of: Tensor, slots: Tensor, key: Tensor, value: Tensor
) -> None:
    """Store tokens on the host, and in those frames that hold their pieces.

    Memory is contiguous, but for tokens and heads of ``key`` and ``value``.
    """
    key, value = key.to(host.dtype), value.to(host.dtype)
    tokens, kv_heads, dim = key.shape
    size = host.element_size()
    assert slots.dtype == torch.int64
    assert frame_of.dtype == torch.int32
    assert host.is_contiguous()
    assert slab.is_contiguous()
    assert key.stride(2) == value.stride(2) == 1
    sizes = WriteSizes(
        tokens, kv_heads, host.shape[2], dim * size,
        key.stride(0) * size, key.stride(1) * size, value.stride(0) * size, value.stride(1) * size,
    )  # fmt: skip
    build.call("write_tokens", (host, slab, frame_of, slots, key, value), sizes)


def update_windows(
    compressed: Tensor, source: Tensor, positions: Tensor, block_table: Tensor, stride: int, *,
    slab: Tensor | None = None, frame_of: Tensor | None = None,
) -> None:  # fmt: skip
    """Store the windows of compressed keys that decode rows complete, means of two strides.

    Memory is contiguous, but for rows of the table and blocks, heads and windows of ``compressed``.
    Results are those of the reference to the last bit.

    Raises:
        ValueError: Unsupported dtype.
    """
    _, kv_heads, block_size, width = source.shape
    assert compressed.dtype == source.dtype
    assert block_table.dtype == torch.int32
    assert source.is_contiguous()
    assert compressed.stride(3) == block_table.stride(1) == 1
    positions = positions.to(torch.int64).contiguous()
    sizes = WindowSizes(
        positions.shape[0], kv_heads, block_size, width // 2, stride, block_table.stride(0),
        *compressed.stride()[:3],
    )  # fmt: skip
    tensors = compressed, source, slab, frame_of, positions, block_table
    build.call("update_windows", tensors, sizes, dtype=compressed.dtype)


def record_queries(
    kept: Tensor, query: Tensor, slots: Tensor, last: Tensor, block_size: int
) -> None:
    """Store the queries of the last token of each block under that block's id.

    Memory is contiguous, but for tokens and heads of ``query``.
    """
    query = query.to(kept.dtype)
    size = kept.element_size()
    assert slots.dtype == last.dtype == torch.int64
    assert kept.is_contiguous()
    assert query.stride(2) == 1
    sizes = RecordSizes(
        last.shape[0], query.shape[1], block_size, query.shape[2] * size, query.stride(0) * size,
        query.stride(1) * size,
    )  # fmt: skip
    build.call("record_queries", (kept, query, slots, last), sizes)
