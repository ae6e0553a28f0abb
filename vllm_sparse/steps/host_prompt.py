# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Attention of prompt rows: over streamed tiles of earlier tokens, then over the row's own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from vllm_sparse.prefetch.stream import Tile


def attend_prompt(
    query: Tensor,
    rows: Tensor,
    tiles: Iterable[tuple[Tile, Tensor]],
    start: int,
    sparse_from: int,
    chosen: Tensor | None,
    *,
    block_size: int,
    tile_tokens: int,
    attend_part: Callable[..., tuple[Tensor, Tensor]],
    scale: float,
    value_scale: float = 1.0,
) -> Tensor:
    """Exact attention of one row's tokens over what each may see.

    Memory is bounded by the chunk and the tile, not by the context: kernels merge parts by their
    log-sum-exp.

    Args:
        query: ``[T, H, D]``.
        rows: The row's own keys and values, ``[T, G, 2 * D]``.
        tiles: Earlier tokens in order, each tile with its rows ``[G, tile tokens, 2 * D]``, which
            may be overwritten once the next one is asked for.
        start: Position of the first token.
        sparse_from: Tokens before the first sparse one.
        chosen: Blocks that each sparse token reads, bool ``[G, T - sparse_from, blocks]``;
            ``None`` if there are no sparse tokens.
        block_size: Tokens per block.
        tile_tokens: Own tokens per part.
        attend_part: The kernel of that name: attention over some keys, and its log-sum-exp.
        scale: Logit scale, that of stored keys included.
        value_scale: What stored values are multiplied with.

    Returns:
        ``[T, H, D]``.
    """
    tokens, heads, dim = query.shape
    kv_heads = rows.shape[1]
    shape = (tokens, kv_heads, heads // kv_heads, dim)
    grouped = query.view(shape).permute(1, 2, 0, 3)
    output = torch.zeros(shape, device=query.device)
    lse = torch.full(shape[:3], -torch.inf, device=query.device)
    sums = output.permute(1, 2, 0, 3), lse.permute(1, 2, 0)
    dense, sparse = (
        (grouped[:, :, part], (sums[0][:, :, part], sums[1][..., part]))
        for part in (slice(sparse_from), slice(sparse_from, None))
    )

    def attend(part: Tensor, first: int, past_from: int | None) -> None:
        """All tokens over keys and values ``[G, n, 2 * D]`` from a position on."""
        keys, values = part.split(dim, -1)
        options = {"first_position": first, "block_size": block_size}
        for (mine, total), choice, ahead in ((dense, None, 0), (sparse, chosen, sparse_from)):
            past = None if past_from is None else past_from + ahead
            if mine.shape[2]:
                attend_part(
                    mine, keys, values, choice, scale, **options, past_from=past, total=total
                )

    for tile, staged in tiles:
        attend(staged[:, : tile.tokens], tile.first_block * block_size, None)
    own = rows.transpose(0, 1)
    for begin in range(0, tokens, tile_tokens):
        attend(own[:, begin : begin + tile_tokens], start + begin, start)
    if value_scale != 1.0:  # the same for all parts
        output *= value_scale
    return output.reshape(tokens, heads, dim).to(query.dtype)
