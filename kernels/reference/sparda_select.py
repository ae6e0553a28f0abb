# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""SparDA's block selection for decode rows over paged compressed keys, in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from vllm_sparse.kernels.types import Blocks, Ranking, Rotary, Selected

from vllm_sparse.policies import windows


def gather_windows(compressed: Tensor, table: Tensor) -> Tensor:
    """Compressed keys of requests.

    A window is stored with the block of its last token, so the first slot of a request's first
    block is none and is left out.

    Args:
        compressed: ``[blocks, G, windows per block, D]``.
        table: Physical blocks, int64 ``[..., blocks]``.

    Returns:
        ``[..., G, windows, D]``; windows that are not complete yet hold anything.
    """
    return compressed[table].transpose(-3, -4).flatten(-3, -2)[..., 1:, :]


def select_blocks(
    compressed: Tensor,
    vectors: Tensor | None,
    block_table: Tensor,
    positions: Tensor,
    ranking: Ranking,
    blocks: Blocks,
    *,
    dense_len: int = 0,
) -> Selected:
    """The blocks that each decode row reads: the best ones, or all if they are few.

    Args:
        compressed: ``[blocks, G, windows per block, D]``.
        vectors: ``[R, H, D]`` for a softmax, else ``[R, G, D]``; ``None`` if no row has more
            blocks than it reads.
        block_table: Physical blocks of each row, int32 ``[R, blocks]``; anything beyond its last.
        positions: Position of each row's token ``[R]``; negative for padding, which reads nothing.
        ranking: How to score.
        blocks: What to take.
        dense_len: Rows of at most so many tokens read all their blocks.

    Returns:
        Logical blocks, pieces and lengths, as wide as the most that one row may read.
    """
    rows, width = block_table.shape
    kv_heads, size = compressed.shape[1], blocks.block_size
    if vectors is not None and ranking.rotary is not None:
        vectors = rotate(vectors, positions.clamp(min=0), ranking.rotary)
    capacity = min(max(blocks.top_k, -(-dense_len // size)), width)
    logical = torch.full((rows, kv_heads, capacity), -1)
    pieces = logical.clone()
    lengths = torch.zeros(rows, dtype=torch.int32)
    for row, position in enumerate(positions.tolist()):
        if position < 0:
            continue
        count = position // size + 1
        table = block_table[row, :count].cpu().long()
        if count <= blocks.top_k or position < dense_len:
            chosen = torch.arange(count).expand(kv_heads, -1)
        else:
            assert vectors is not None, "a row has more blocks than it reads"
            keys = gather_windows(compressed, table.to(compressed.device))
            at = positions[row : row + 1].long()
            scores = window_scores(
                vectors[row].unsqueeze(1), keys, at - ranking.lag, ranking, blocks
            )
            chosen = windows.select_blocks(scores, at, **blocks._asdict())[:, 0].cpu()
        reads = chosen.shape[1]
        logical[row, :, :reads] = chosen
        pieces[row, :, :reads] = table[chosen] * kv_heads + torch.arange(kv_heads)[:, None]
        lengths[row] = (reads - 1) * size + position % size + 1
    return Selected(*(part.int().to(compressed.device) for part in (logical, pieces, lengths)))


def rotate(vectors: Tensor, positions: Tensor, rotary: Rotary) -> Tensor:
    """Vectors turned by their positions.

    Args:
        vectors: ``[R, G, D]``.
        positions: ``[R]``, none negative.
        rotary: The embedding; channels beyond those that turn stay.

    Returns:
        ``[R, G, D]`` in the dtype of ``vectors``.
    """
    cos, sin = rotary.cache[positions.long()].float()[:, None].chunk(2, -1)
    wide = vectors.float()
    turning, rest = wide.tensor_split([2 * cos.shape[-1]], -1)
    first, second = (
        turning.chunk(2, -1) if rotary.halves else (turning[..., ::2], turning[..., 1::2])
    )
    turned = first * cos - second * sin, second * cos + first * sin
    joined = torch.cat(turned, -1) if rotary.halves else torch.stack(turned, -1).flatten(-2)
    return torch.cat((joined, rest), -1).to(vectors.dtype)


def window_scores(
    vectors: Tensor, keys: Tensor, at: Tensor, ranking: Ranking, blocks: Blocks
) -> Tensor:
    """Scores of the windows that are complete at a position.

    Args:
        vectors: ``[H, T, D]`` for a softmax, else ``[G, T, D]``.
        keys: Compressed keys ``[G, windows, D]``.
        at: Positions, int64 ``[T]``.
        ranking: How to score.
        blocks: Says how long windows are.

    Returns:
        float32 ``[G, T, windows]``.
    """
    stride = blocks.kernel_stride
    if ranking.softmax:
        return windows.query_scores(
            vectors, keys, at, kernel_size=2 * stride, kernel_stride=stride, scale=ranking.scale
        )
    # A complete window never depends on a later token; others may hold anything.
    ends = torch.arange(keys.shape[1], device=keys.device) + 2
    hidden = ends * stride > at[:, None] + 1
    return windows.forecast_scores(vectors, keys).masked_fill(hidden, float("-inf"))
