# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The fused CPU decode kernel behind the reference's interface."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from vllm_sparse.kernels.cpu import build
from vllm_sparse.kernels.fp8 import FP8, UNSCALED, Scales

if TYPE_CHECKING:
    from vllm_sparse.kernels.layout import PageLayout

DecodeSizes = build.sizes(
    "DecodeSizes",
    "tokens kv_heads group dim block_size page_size top_k "
    "block_stride head_stride table_stride query_stride out_stride key_stride",
)


def decode_attention(
    cache: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    final_lengths: Tensor,
    top_r: Tensor,
    *,
    layout: PageLayout,
    top_k: int,
    scale: float,
    read_all: bool = False,
    replays: bool = True,
    most_rows: int | None = None,
    parked: Tensor | None = None,
    per_block: int = 0,
    scales: Scales = UNSCALED,
    sinks: Tensor | None = None,
) -> None:
    """Append, select and attend in one pass.

    Same contract as :func:`vllm_sparse.kernels.reference.decode.decode_attention`.

    Integer tensors must be int32; head and channel axes of all tensors must be contiguous.

    Raises:
        ValueError: Unsupported dtype or head size, or queries that wait: only a captured batch,
            which a CPU has not, holds a prompt's token beside decode rows.
    """
    del replays, most_rows, per_block
    if parked is not None:
        raise ValueError("the CPU decode kernel lets no queries wait for their prompt's end")
    tokens, heads, dim = query.shape
    kv_heads = cache.shape[1]
    target = output
    if cache.dtype == FP8:
        assert scales.truncates
        query, key, value = query.float(), key.float(), value.float()
        output = torch.empty_like(query)
    if key.stride(0) != value.stride(0):
        value = value.contiguous()
        key = key.contiguous()
    integers = (block_table, lengths, final_lengths, top_r)
    assert all(t.dtype == torch.int32 and t.stride(-1) == 1 for t in integers)
    assert query.stride(1) == dim
    assert key.stride(1) == dim
    assert output.stride(1) == dim
    assert cache.stride(-1) == 1
    assert cache.stride(-2) == cache.shape[-1]
    assert sinks is None or sinks.is_contiguous()
    sizes = DecodeSizes(
        tokens=tokens,
        kv_heads=kv_heads,
        group=heads // kv_heads,
        dim=dim,
        block_size=layout.block_size,
        page_size=layout.page_size,
        top_k=top_k,
        block_stride=cache.stride(0),
        head_stride=cache.stride(1),
        table_stride=block_table.stride(0),
        query_stride=query.stride(0),
        out_stride=output.stride(0),
        key_stride=key.stride(0),
    )
    own = None if sinks is None else sinks.float()
    tensors = cache, query, key, value, output, *integers, own
    factors = scale, scales.key, scales.value
    build.call("decode", tensors, sizes, *factors, int(read_all), dtype=cache.dtype)
    if output is not target:
        target.copy_(output)
