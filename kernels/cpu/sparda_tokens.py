# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What a SparDA layer stores of a step, in C++: tokens, windows of compressed keys, queries."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from vllm_sparse.kernels.cpu import build
from vllm_sparse.kernels.fp8 import FP8, UNSCALED, Scales
from vllm_sparse.kernels.reference import sparda_tokens as reference

if TYPE_CHECKING:
    from vllm_sparse.kernels.types import NewQueries, NewWindows

WriteSizes = build.sizes(
    "SpardaWriteSizes",
    "tokens kv_heads block_size head_bytes fp8 key_token key_head value_token value_head "
    "query_heads query_bytes query_token query_head",
)
WindowSizes = build.sizes(
    "SpardaWindowSizes",
    "rows kv_heads block_size dim stride fp8 table_row "
    "compressed_block compressed_head compressed_window",
)
RecordSizes = build.sizes(
    "SpardaRecordSizes", "count heads block_size head_bytes query_token query_head"
)


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
    """Store tokens on the host, and in those frames that hold their pieces.

    Memory is contiguous, but for tokens and heads of ``key``, ``value`` and queries, and for rows
    of the table and blocks, heads and windows of what is compressed. Windows are those of the
    reference to the last bit.

    Raises:
        ValueError: Unsupported dtype.
    """
    # The kernel makes fp8 of floats, and leaves all others as they are.
    fp8 = host.dtype == FP8
    given = torch.float32 if fp8 else host.dtype
    key, value = key.to(given), value.to(given)
    tokens, kv_heads, dim = key.shape
    size = given.itemsize
    assert slots.dtype == torch.int64
    assert frame_of.dtype == torch.int32
    assert host.is_contiguous()
    assert slab.is_contiguous()
    assert key.stride(2) == value.stride(2) == 1
    kept = query = recent = None
    asked: tuple[int, ...] = (0, 0, 0, 0)
    if queries is not None:
        kept, query, recent = queries
        query, width = query.to(kept.dtype), kept.element_size()
        assert kept.is_contiguous()
        assert query.stride(2) == 1
        assert recent is None or (recent.is_contiguous() and recent.dtype == kept.dtype)
        head = query.shape[2] * width
        asked = query.shape[1], head, query.stride(0) * width, query.stride(1) * width
    sizes = WriteSizes(
        tokens, kv_heads, host.shape[2], dim * host.element_size(), fp8,
        key.stride(0) * size, key.stride(1) * size, value.stride(0) * size, value.stride(1) * size,
        *asked,
    )  # fmt: skip
    tensors = host, slab, frame_of, slots, key, value, kept, query, recent
    build.call("write_tokens", tensors, sizes, scales.key, scales.value)
    if windows is not None:
        _complete_windows(windows, host, slab, frame_of, scales.key)


def _complete_windows(
    windows: NewWindows, host: Tensor, slab: Tensor, frame_of: Tensor, key_scale: float
) -> None:
    compressed, table = windows.compressed, windows.table
    _, kv_heads, block_size, width = host.shape
    fp8 = host.dtype == FP8
    assert fp8 or compressed.dtype == host.dtype
    assert table.dtype == torch.int32
    assert compressed.stride(3) == table.stride(1) == 1
    positions = windows.positions.to(torch.int64).contiguous()
    sizes = WindowSizes(
        positions.shape[0], kv_heads, block_size, width // 2, windows.stride, fp8, table.stride(0),
        *compressed.stride()[:3],
    )  # fmt: skip
    tensors = compressed, host, slab, frame_of, positions, table
    build.call("update_windows", tensors, sizes, key_scale, dtype=compressed.dtype)


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


def recall_queries(
    kept: Tensor, recent: Tensor, places: Tensor, blocks: Tensor, output: Tensor
) -> None:
    """Find the queries of the token before each row, by the reference.

    Not worth a kernel: where host and device are one memory, nobody keeps queries twice.
    """
    reference.recall_queries(kept, recent, places, blocks, output)
