# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Attention of prompt rows: over streamed tiles of earlier tokens, then over the row's own."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from vllm_sparse.kernels.reference.sparda_prefill import merge_parts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from vllm_sparse.prefetch.stream import Tile


class _Sum(NamedTuple):
    output: Tensor
    lse: Tensor

    def add(self, part: tuple[Tensor, Tensor]) -> _Sum:
        return _Sum(*merge_parts(self.output, self.lse, *part))


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
) -> Tensor:
    """Exact attention of one row's tokens over what each may see.

    Memory is bounded by the chunk and the tile, not by the context: parts are merged by their
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
        tile_tokens: Own tokens per part for sparse tokens.
        attend_part: The kernel of that name: attention over some keys, and its log-sum-exp.
        scale: Logit scale.

    Returns:
        ``[T, H, D]``.
    """
    tokens, heads, dim = query.shape
    kv_heads = rows.shape[1]
    grouped = query.view(tokens, kv_heads, heads // kv_heads, dim).permute(1, 2, 0, 3)
    own = rows.transpose(0, 1)
    keys, values = own[..., :dim], own[..., dim:]
    dense, sparse = grouped[:, :, :sparse_from], grouped[:, :, sparse_from:]

    attend_dense = partial(attend_part, dense, chosen=None, scale=scale)
    attend_sparse = partial(
        attend_part, sparse, chosen=chosen, causal=False, scale=scale, block_size=block_size
    )

    dense_sum = None
    if sparse_from:
        dense_sum = _Sum(*attend_dense(keys[:, :sparse_from], values[:, :sparse_from], causal=True))
    sparse_sum = _Sum(
        torch.zeros(sparse.shape, device=query.device),
        torch.full(sparse.shape[:3], -torch.inf, device=query.device),
    )

    for tile, staged in tiles:
        rows_of_tile = staged[:, : tile.tokens].split(dim, -1)
        if dense_sum is not None:
            dense_sum = dense_sum.add(attend_dense(*rows_of_tile, causal=False))
        if chosen is not None:
            first = tile.first_block * block_size
            sparse_sum = sparse_sum.add(attend_sparse(*rows_of_tile, first_position=first))
    if chosen is not None:
        for begin in range(0, tokens, tile_tokens):
            part = (x[:, begin : begin + tile_tokens] for x in (keys, values))
            where = {"first_position": start + begin, "past_from": start + sparse_from}
            sparse_sum = sparse_sum.add(attend_sparse(*part, **where))
    parts = [part.output for part in (dense_sum, sparse_sum) if part is not None]
    return torch.cat(parts, 2).permute(2, 0, 1, 3).reshape(tokens, heads, dim).to(query.dtype)
