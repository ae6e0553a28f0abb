# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Stage 1 on a paged cache: gather the kept tokens of a finished prompt into its private tail."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vllm_sparse.policies.rocketkv import page_extrema, select_prompt_tokens

if TYPE_CHECKING:
    from vllm_sparse.kernels.layout import PageLayout
    from vllm_sparse.kv.tail.codec import PageCodec


def compact_prompt(
    cache: Tensor,
    blocks: Tensor,
    prompt_len: int,
    dropped_blocks: int,
    query_window: Tensor,
    *,
    codec: PageCodec,
    layout: PageLayout,
    pool_kernel: int,
) -> None:
    """Keep what each KV head needs; the first ``dropped_blocks`` blocks become free to reuse.

    The kept tokens fill slots ``[dropped_blocks * block_size, prompt_len)`` of the request, in
    ascending order, as plain token rows with their page extrema; so a later token's physical slot
    is its position minus the dropped ones.

    Args:
        cache: ``[blocks, G, block_size, C]``, modified in the request's tail blocks only.
        blocks: The request's blocks up to the end of the prompt, ``[ceil(P / block_size)]``.
        prompt_len: P.
        dropped_blocks: Leading blocks that leave.
        query_window: Post-RoPE queries of the last prompt tokens, ``[H, w, D]``.
        codec: Reads the stock pages.
        layout: Page geometry.
        pool_kernel: Width of stage 1's max pool.
    """
    pages = cache[blocks.long()]
    keys = codec.keys(pages)
    kept = prompt_len - dropped_blocks * layout.block_size
    index = select_prompt_tokens(query_window, keys[:, :prompt_len], kept, pool_kernel)
    kv_heads = cache.shape[1]
    kept_keys = _take_rows(keys, index)
    kept_values = _take_rows(codec.values(pages), index)

    tail = blocks[dropped_blocks:].long()
    padded = len(tail) * layout.block_size
    rows = torch.zeros(
        kv_heads, padded, 2 * layout.head_dim, dtype=cache.dtype, device=cache.device
    )
    rows[:, :kept] = torch.cat((kept_keys, kept_values), -1)
    layout.tokens(cache)[tail] = rows.unflatten(1, (len(tail), -1)).transpose(0, 1)

    bounds = torch.cat(page_extrema(kept_keys, layout.page_size), -1)
    channels = rows.new_zeros(kv_heads, len(tail) * layout.pages_per_block, 2 * layout.head_dim)
    channels[:, : bounds.shape[1]] = bounds
    layout.extrema(cache)[tail] = channels.unflatten(1, (len(tail), -1)).permute(1, 0, 3, 2)


def _take_rows(rows: Tensor, index: Tensor) -> Tensor:
    """``rows [G, n, D]`` at ``index [G, k]``; copies whole rows, unlike ``gather``."""
    heads, tokens, dim = rows.shape
    offset = torch.arange(heads, device=rows.device).unsqueeze(1) * tokens
    return rows.reshape(-1, dim).index_select(0, (index + offset).flatten()).view(heads, -1, dim)


class QueryParking:
    """Window queries of a prompt whose window straddles two chunks.

    They wait in the extrema area of the request's own tail blocks, which is private and unused
    until compaction: no state per request, nothing to clean up on abort or preemption.

    Args:
        layout: Page geometry; the area holds ``2 * D * pages_per_block`` elements per KV head.
        group_size: Query heads per KV head.
    """

    def __init__(self, layout: PageLayout, group_size: int) -> None:
        self._layout = layout
        self._group = group_size
        self.per_block = 2 * layout.pages_per_block // group_size

    def _area(self, cache: Tensor) -> Tensor:
        used = self.per_block * self._group * self._layout.head_dim
        area = self._layout.extrema(cache).flatten(2)[..., :used]
        return area.unflatten(2, (self.per_block, self._group, self._layout.head_dim))

    def store(self, cache: Tensor, tail: Tensor, first: int, queries: Tensor) -> None:
        """Park queries of window positions ``first, first + 1, ...``.

        Args:
            cache: The layer's cache.
            tail: The request's blocks from the first kept one, ``[blocks]``.
            first: Index of the first query within the window.
            queries: ``[n, H, D]``.
        """
        index = torch.arange(first, first + len(queries), device=cache.device)
        grouped = queries.unflatten(1, (cache.shape[1], self._group))
        block = tail.long()[index // self.per_block]
        self._area(cache)[block, :, index % self.per_block] = grouped.to(cache.dtype)

    def load(self, cache: Tensor, tail: Tensor, count: int) -> Tensor:
        """The first ``count`` parked window queries, ``[count, H, D]``."""
        index = torch.arange(count, device=cache.device)
        block = tail.long()[index // self.per_block]
        return self._area(cache)[block, :, index % self.per_block].flatten(1, 2)
