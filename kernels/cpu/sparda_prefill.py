# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Attention of prompts over a part of the keys, in C++."""

from __future__ import annotations

import torch
from torch import Tensor
from vllm_sparse.kernels.cpu import build
from vllm_sparse.kernels.fp8 import FP8

PartSizes = build.sizes(
    "PartSizes",
    "kv_heads group tokens dim keys first_position block_size past_from past merge fp8 "
    "query_head query_member query_token key_head key_token value_head value_token "
    "chosen_head chosen_token out_head out_member out_token lse_head lse_member lse_token",
)


def attend_part(
    query: Tensor, keys: Tensor, values: Tensor, chosen: Tensor | None, scale: float, *,
    first_position: int = 0, block_size: int = 0, past_from: int | None = None,
    total: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Softmax attention over some of the keys.

    Same contract as :func:`vllm_sparse.kernels.reference.sparda_prefill.attend_part`.

    Queries are rounded to the dtype of the keys, unless that is fp8. Channels of all tensors and
    blocks of ``chosen`` are contiguous.

    Raises:
        ValueError: Unsupported dtype.
    """
    merge = total is not None
    if total is None:
        total = torch.empty(query.shape), torch.empty(query.shape[:3])
    output, lse = total
    fp8 = keys.dtype == FP8
    query = query if fp8 else query.to(keys.dtype)
    strides: tuple[int, ...] = (0, 0)
    marks = None
    if chosen is not None:
        assert chosen.stride(-1) == 1
        assert chosen.shape[2] * block_size >= first_position + keys.shape[1]
        strides, marks = chosen.stride()[:2], chosen.view(torch.uint8)
    assert query.stride(-1) == keys.stride(-1) == values.stride(-1) == output.stride(-1) == 1
    assert output.dtype == lse.dtype == torch.float32
    kv_heads, group, tokens, dim = query.shape
    sizes = PartSizes(
        kv_heads, group, tokens, dim, keys.shape[1], first_position, block_size, past_from or 0,
        past_from is not None, merge, fp8, *query.stride()[:3], *keys.stride()[:2],
        *values.stride()[:2], *strides, *output.stride()[:3], *lse.stride(),
    )  # fmt: skip
    tensors = query, keys, values, marks, output, lse
    build.call("attend_part", tensors, sizes, scale, dtype=query.dtype)
    return output, lse
