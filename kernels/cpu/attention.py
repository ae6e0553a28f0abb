# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The C++ attention over selected tokens behind the reference's interface."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from vllm_sparse.kernels.cpu import build
from vllm_sparse.kernels.fp8 import FP8, UNSCALED, Scales

if TYPE_CHECKING:
    from vllm_sparse.kernels.layout import PageLayout

SlotSizes = build.sizes(
    "SlotSizes",
    "tokens kv_heads group dim block_size top_k block_stride "
    "head_stride table_stride slot_stride query_stride out_stride",
)


def attend_slots(
    cache: Tensor,
    query: Tensor,
    output: Tensor,
    slots: Tensor | None,
    block_table: Tensor,
    lengths: Tensor,
    top_r: Tensor,
    *,
    layout: PageLayout,
    top_k: int,
    scale: float,
    arrived: Tensor | None = None,
    scales: Scales = UNSCALED,
    sinks: Tensor | None = None,
) -> None:
    """Exact attention over the selected tokens.

    Same contract as :func:`vllm_sparse.kernels.reference.attention.attend_slots`.

    Integer tensors must be int32, ``slots`` contiguous, and so the head and channel axes of all
    other tensors.

    Raises:
        ValueError: Unsupported dtype or head size.
    """
    del arrived
    tokens, heads, dim = query.shape
    kv_heads = cache.shape[1]
    target = output
    if cache.dtype == FP8:
        query = query.float()
        output = torch.empty_like(query)
    assert all(t.dtype == torch.int32 and t.stride(-1) == 1 for t in (block_table, lengths, top_r))
    assert slots is None or (slots.dtype == torch.int32 and slots.is_contiguous())
    assert query.stride(1) == output.stride(1) == dim
    assert cache.stride(-1) == 1
    assert sinks is None or sinks.is_contiguous()
    sizes = SlotSizes(
        tokens=tokens,
        kv_heads=kv_heads,
        group=heads // kv_heads,
        dim=dim,
        block_size=layout.block_size,
        top_k=top_k,
        block_stride=cache.stride(0),
        head_stride=cache.stride(1),
        table_stride=block_table.stride(0),
        slot_stride=0 if slots is None else slots.shape[-1],
        query_stride=query.stride(0),
        out_stride=output.stride(0),
    )
    own = None if sinks is None else sinks.float()
    tensors = cache, query, output, slots, block_table, lengths, top_r, own
    factors = scale, scales.key, scales.value
    build.call("attend_slots", tensors, sizes, *factors, dtype=cache.dtype)
    if output is not target:
        target.copy_(output)
