# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Gathers the kept tokens of a finished prompt into its private tail, on a paged cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vllm_sparse.kernels.fp8 import FP8, as_slots, readable

if TYPE_CHECKING:
    from vllm_sparse.kernels.layout import PageLayout
    from vllm_sparse.kv.tail.codec import Reader
    from vllm_sparse.policies.protocol import Policy


def compact_prompt(
    cache: Tensor,
    blocks: Tensor,
    prompt_len: int,
    dropped_blocks: int,
    query_window: Tensor,
    *,
    policy: Policy,
    reader: Reader,
    layout: PageLayout,
    key_scale: float = 1.0,
) -> None:
    """Keep what each KV head needs; the first ``dropped_blocks`` blocks become free to reuse.

    The kept tokens fill slots ``[dropped_blocks * block_size, prompt_len)`` of the request, in
    ascending order, as plain token rows with their page index; so a later token's physical slot
    is its position minus the dropped ones.

    Args:
        cache: ``[blocks, G, block_size, C]``, modified in the request's tail blocks only.
        blocks: The request's blocks up to the end of the prompt, ``[ceil(P / block_size)]``.
        prompt_len: P.
        dropped_blocks: Leading blocks that leave.
        query_window: Post-RoPE queries of the last prompt tokens, ``[H, w, D]``.
        policy: Says what is kept.
        reader: Reads the prompt's pages.
        layout: Page geometry.
        key_scale: What stored keys of an fp8 cache are multiplied with.
    """
    pages = cache[blocks.long()]
    keys = reader.keys(pages)
    kept = prompt_len - dropped_blocks * layout.block_size
    if cache.dtype == FP8:
        query_window = query_window.float() * key_scale
    index = policy.keep(query_window, readable(keys[:, :prompt_len]), kept)
    kv_heads = cache.shape[1]
    kept_keys = _take_rows(keys, index)
    kept_values = _take_rows(reader.values(pages), index)

    tail = blocks[dropped_blocks:].long()
    padded = len(tail) * layout.block_size
    rows = torch.zeros(
        kv_heads, padded, 2 * layout.head_dim, dtype=cache.dtype, device=cache.device
    )
    rows[:, :kept] = torch.cat((kept_keys, kept_values), -1)
    layout.tokens(cache)[tail] = rows.unflatten(1, (len(tail), -1)).transpose(0, 1)

    if policy.index_width and policy.top_k is not None:
        present = (torch.arange(padded, device=cache.device) < kept).view(-1, layout.page_size)
        paged = rows[..., : layout.head_dim].unflatten(1, present.shape)
        built = policy.index(readable(paged), present)
        channels = torch.where(present.any(-1, keepdim=True), built, 0.0)
        channels = channels.unflatten(1, (len(tail), -1)).permute(1, 0, 3, 2)
        layout.index(cache)[tail] = channels.to(cache.dtype)


def compaction_bytes(
    prompt_len: int, layout: PageLayout, policy: Policy, kv_heads: int, dtype: torch.dtype
) -> int:
    """Bytes that :func:`compact_prompt` may hold at once, beside the cache.

    The prompt's pages, its keys and its values; and of one KV head keys in float32 and three times
    as many logits as the window has of it, which is what votes take.

    Args:
        prompt_len: P.
        layout: Page geometry.
        policy: Whose window votes.
        kv_heads: G.
        dtype: Of the cache.
    """
    dim, index = layout.head_dim, layout.channels // layout.page_size
    numbers = kv_heads * (2 * dim + index + 2 * dim) * dtype.itemsize
    if dtype.itemsize == 1:  # keys that can be computed with
        numbers += kv_heads * dim * torch.bfloat16.itemsize
    logits = max(policy.window, 1) * policy.shape.group_size
    blocks = -(-prompt_len // layout.block_size) + 1
    return blocks * layout.block_size * (numbers + 4 * (3 * logits + dim))


def _take_rows(rows: Tensor, index: Tensor) -> Tensor:
    """``rows [G, n, D]`` at ``index [G, k]``; copies whole rows, unlike ``gather``."""
    heads, tokens, dim = rows.shape
    offset = torch.arange(heads, device=rows.device).unsqueeze(1) * tokens
    return rows.reshape(-1, dim).index_select(0, (index + offset).flatten()).view(heads, -1, dim)


class QueryParking:
    """Window queries of a prompt whose window straddles two chunks.

    They wait in the index area of the request's own tail blocks, which is private and unused
    until compaction: no state per request, nothing to clean up on abort or preemption.

    Args:
        layout: Page geometry; the area holds ``channels * pages_per_block`` elements per KV head.
        group_size: Query heads per KV head.
        dtype: Of the queries, where the cache is fp8; else they are rounded to the cache's.
    """

    def __init__(
        self, layout: PageLayout, group_size: int, dtype: torch.dtype | None = None
    ) -> None:
        self._layout = layout
        self._group = group_size
        self._dtype = dtype
        self._width = layout.head_dim * (dtype.itemsize if dtype else 1)
        room = layout.channels * layout.pages_per_block
        self.per_block = room // (group_size * self._width)

    def _area(self, cache: Tensor) -> Tensor:
        used = self.per_block * self._group * self._width
        area = self._layout.index(cache).flatten(2)[..., :used]
        return area.unflatten(2, (self.per_block, self._group, self._width))

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
        self._area(cache)[block, :, index % self.per_block] = as_slots(grouped, cache.dtype)

    def store_at(self, cache: Tensor, query: Tensor, places: Tensor) -> None:
        """Park single queries, in fixed shapes.

        Args:
            cache: The layer's cache.
            query: ``[R, H, D]``.
            places: ``block * per_block + place`` of each, int32 ``[R]``; those below zero go to
                vLLM's null block, which nobody reads.
        """
        place = places.clamp(min=0).long()
        grouped = as_slots(query.unflatten(1, (cache.shape[1], self._group)), cache.dtype)
        self._area(cache)[place // self.per_block, :, place % self.per_block] = grouped

    def load(self, cache: Tensor, tail: Tensor, count: int) -> Tensor:
        """The first ``count`` parked window queries, ``[count, H, D]``."""
        return self.load_all(cache, tail[None, : -(-count // self.per_block)], count)[0]

    def load_all(self, cache: Tensor, tails: Tensor, count: int) -> Tensor:
        """The first ``count`` parked window queries of several prompts, ``[R, count, H, D]``.

        Args:
            cache: The layer's cache.
            tails: The blocks they wait in, ``[R, ceil(count / per_block)]``.
            count: Of each prompt.
        """
        # Whole blocks, so that a layer launches twice for it and not six times.
        blocks = self._area(cache).index_select(0, tails.flatten()).unflatten(0, tails.shape)
        stored = blocks.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :count]
        return stored.view(self._dtype) if self._dtype else stored
