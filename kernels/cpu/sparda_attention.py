# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Exact decode attention over frames in C++."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from vllm_sparse.kernels.cpu import build
from vllm_sparse.kernels.fp8 import FP8, UNSCALED, Scales
from vllm_sparse.kernels.reference.sparda_attention import unframed_rows

if TYPE_CHECKING:
    from torch import Tensor
    from vllm_sparse.kernels.types import Unframed


FrameSizes = build.sizes(
    "FrameSizes",
    "tokens kv_heads group dim block_size table_stride max_tokens query_stride out_stride",
)


def attend_frames(
    slab: Tensor,
    query: Tensor,
    output: Tensor,
    frames: Tensor,
    lengths: Tensor,
    scale: float,
    unframed: Unframed | None = None,
    scales: Scales = UNSCALED,
) -> None:
    """Exact decode attention over frames.

    Same contract as :func:`vllm_sparse.kernels.reference.sparda_attention.attend_frames`.

    Raises:
        ValueError: Unsupported dtype or head size.
    """
    tokens, heads, dim = query.shape
    kv_heads, count = frames.shape[1:]
    block_size, target = slab.shape[1], output
    if slab.dtype == FP8:
        query = query.float()
        output = torch.empty_like(query)
    assert slab.is_contiguous()
    assert frames.is_contiguous()
    assert frames.dtype == lengths.dtype == torch.int32
    assert query.stride(1) == output.stride(1) == dim
    sizes = FrameSizes(
        tokens, kv_heads, heads // kv_heads, dim, block_size, count, count * block_size,
        query.stride(0), output.stride(0),
    )  # fmt: skip
    tensors, factors = (slab, query, output, frames, lengths), (scale * scales.key, scales.value)
    build.call("attend_frames", tensors, sizes, *factors, dtype=slab.dtype)
    if unframed is not None:
        for row, pieces in unframed_rows(unframed):
            here = slice(row, row + 1)
            attend_frames(
                unframed.host.flatten(0, 1), query[here], output[here], pieces,
                unframed.lengths[here], scale, scales=scales,
            )  # fmt: skip
    if output is not target:
        target.copy_(output)
