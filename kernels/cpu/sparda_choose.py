# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Which blocks the tokens of a prompt read, in C++."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from vllm_sparse.kernels.cpu import build

if TYPE_CHECKING:
    from torch import Tensor
    from vllm_sparse.kernels.types import Blocks, Ranking

ChooseSizes = build.sizes(
    "ChooseSizes",
    "tokens kv_heads group dim windows stride table_blocks "
    "init_blocks local_blocks top_k lag softmax "
    "vector_token vector_head compressed_block compressed_head compressed_window",
)


def choose_blocks(
    compressed: Tensor, vectors: Tensor, table: Tensor, positions: Tensor, ranking: Ranking,
    blocks: Blocks,
) -> Tensor:  # fmt: skip
    """Marks the blocks that each token reads.

    Same contract as :func:`vllm_sparse.kernels.reference.sparda_choose.choose_blocks`.

    Channels of ``compressed`` and ``vectors`` are contiguous. Vectors are rounded to the dtype of
    the compressed keys.

    Raises:
        ValueError: Unsupported dtype.
    """
    _, kv_heads, windows, dim = compressed.shape
    vectors = vectors.to(compressed.dtype)
    table, positions = table.to(torch.int32).contiguous(), positions.long().contiguous()
    assert vectors.stride(-1) == compressed.stride(-1) == 1
    assert blocks.top_k > blocks.init_blocks + blocks.local_blocks
    assert windows * blocks.kernel_stride == blocks.block_size
    chosen = torch.zeros(kv_heads, len(positions), len(table), dtype=torch.bool)
    sizes = ChooseSizes(
        len(positions), kv_heads, vectors.shape[1] // kv_heads, dim, windows,
        blocks.kernel_stride, len(table), blocks.init_blocks, blocks.local_blocks, blocks.top_k,
        ranking.lag, ranking.softmax, *vectors.stride()[:2], *compressed.stride()[:3],
    )  # fmt: skip
    tensors = compressed, vectors, table, positions, chosen
    build.call("choose_blocks", tensors, sizes, ranking.scale, dtype=compressed.dtype)
    return chosen
