# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Stage 1 of RocketKV on a paged cache, in PyTorch, one prompt after the other.

Keys and values are read through views ``[blocks, G, block_size, D]`` with any strides, so that
they may lie in the cache in the stock kernel's layout. Keys that are already gathered,
``[G, n, D]``, are one block of ``n`` tokens: ``keys[None]`` with a block table of zero.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vllm_sparse.policies import rocketkv as policy

if TYPE_CHECKING:
    from vllm_sparse.kernels.layout import PageLayout


def score_prompt(
    query_window: Tensor,
    keys: Tensor,
    block_table: Tensor,
    prompt_lens: Tensor,
    *,
    pool_kernel: int,
) -> Tensor:
    """What :func:`vllm_sparse.policies.rocketkv.select_prompt_tokens` ranks tokens by.

    Args:
        query_window: Post-RoPE queries of each prompt's last ``w`` positions, ``[R, H, w, D]``.
        keys: ``[blocks, G, block_size, D]``.
        block_table: Each prompt's blocks, int32 ``[R, max_blocks]``.
        prompt_lens: int32 ``[R]``; 0 marks a padding row, else more than ``w``.
        pool_kernel: Odd width of the max pool.

    Returns:
        Pooled scores of the tokens before the window, float32 ``[R, G, max_blocks * block_size]``;
        zero from there on.
    """
    requests, heads, window, dim = query_window.shape
    kv_heads, block_size = keys.shape[1:3]
    width = block_table.shape[1] * block_size
    pooled = torch.zeros(requests, kv_heads, width, device=keys.device)
    future = torch.ones(window, window, dtype=torch.bool, device=keys.device).triu(1)
    for request, length in enumerate(prompt_lens.tolist()):
        if length <= 0:
            continue
        held = _tokens(keys, block_table[request], length).float()
        queries = query_window[request].float().view(kv_heads, heads // kv_heads, window, dim)
        logits = queries @ held.transpose(-1, -2).unsqueeze(1) * dim**-0.5
        logits[..., length - window :].masked_fill_(future, -torch.inf)
        score = logits.softmax(-1)[..., : length - window].sum((1, 2))
        pooled[request, :, : length - window] = torch.nn.functional.max_pool1d(
            score.unsqueeze(1), pool_kernel, stride=1, padding=pool_kernel // 2
        ).squeeze(1)
    return pooled


def top_indices(score: Tensor, sizes: Tensor, counts: Tensor, max_count: int) -> Tensor:
    """Indices of the largest scores per row, ties to the lower index.

    Args:
        score: float32 ``[R, G, n]``, free of NaN.
        sizes: Entries of each row that exist, int32 ``[R]``.
        counts: How many to take, at most ``sizes``; int32 ``[R]``.
        max_count: Width of the result.

    Returns:
        Ascending, int32 ``[R, G, max_count]``; -1 from ``counts`` on.
    """
    index = torch.full((*score.shape[:2], max_count), -1, dtype=torch.int32, device=score.device)
    for row, (size, count) in enumerate(zip(sizes.tolist(), counts.tolist(), strict=True)):
        if count > 0:
            index[row, :, :count] = policy.top_indices(score[row, :, :size], count).int()
    return index


def compact_tokens(
    cache: Tensor,
    keys: Tensor,
    values: Tensor,
    block_table: Tensor,
    prompt_lens: Tensor,
    dropped_blocks: Tensor,
    chosen: Tensor,
    *,
    layout: PageLayout,
    window: int,
) -> None:
    """Write the chosen tokens and the window into the blocks behind the dropped ones.

    Tail blocks hold plain token rows and page extrema; unused slots and pages become zero.

    Args:
        cache: ``[blocks, G, block_size, C]``, modified in the prompts' tails only.
        keys: ``[blocks, G, block_size, D]``; may be a view of ``cache``.
        values: Likewise.
        block_table: Each prompt's blocks, int32 ``[R, max_blocks]``.
        prompt_lens: P, int32 ``[R]``; 0 marks a padding row.
        dropped_blocks: int32 ``[R]``.
        chosen: Ascending tokens before the window, int32 ``[R, G, max_count]``, of which the first
            ``P - dropped_blocks * block_size - window`` count.
        layout: Page geometry.
        window: Tokens at the end of each prompt that are always kept.
    """
    table = block_table.long()
    lengths, gone = prompt_lens.tolist(), dropped_blocks.tolist()
    for request, (length, dropped) in enumerate(zip(lengths, gone, strict=True)):
        if length <= 0:
            continue
        kept = length - dropped * layout.block_size
        end = torch.arange(length - window, length, device=cache.device)
        index = chosen[request, :, : kept - window].long()
        index = torch.cat((index, end.expand(len(index), -1)), -1).unsqueeze(-1)
        both = (_tokens(part, table[request], length) for part in (keys, values))
        rows = torch.cat(
            [part.gather(1, index.expand(-1, -1, layout.head_dim)) for part in both], 2
        )
        bounds = torch.cat(policy.page_extrema(rows[..., : layout.head_dim], layout.page_size), -1)
        tail = table[request, dropped : -(-length // layout.block_size)]
        padding = len(tail) * layout.block_size - kept
        rows = torch.nn.functional.pad(rows, (0, 0, 0, padding))
        padding = len(tail) * layout.pages_per_block - bounds.shape[1]
        bounds = torch.nn.functional.pad(bounds, (0, 0, 0, padding))
        layout.tokens(cache)[tail] = rows.unflatten(1, (len(tail), -1)).transpose(0, 1)
        layout.extrema(cache)[tail] = bounds.unflatten(1, (len(tail), -1)).permute(1, 0, 3, 2)


def compact_prompts(
    cache: Tensor,
    keys: Tensor,
    values: Tensor,
    query_window: Tensor,
    block_table: Tensor,
    prompt_lens: Tensor,
    dropped_blocks: Tensor,
    *,
    layout: PageLayout,
    pool_kernel: int,
    max_kept: int,
) -> None:
    """Stage 1 of every prompt that ends in a step: score, select, move.

    Args:
        cache: ``[blocks, G, block_size, C]``, modified in the prompts' tails only.
        keys: ``[blocks, G, block_size, D]``; may be a view of ``cache``.
        values: Likewise.
        query_window: Post-RoPE queries of each prompt's last ``w`` positions, ``[R, H, w, D]``.
        block_table: Each prompt's blocks, int32 ``[R, max_blocks]``.
        prompt_lens: P, int32 ``[R]``; 0 marks a padding row.
        dropped_blocks: Leading blocks that leave, int32 ``[R]``; at least ``w`` tokens must stay.
        layout: Page geometry.
        pool_kernel: Odd width of the max pool.
        max_kept: At least ``P - dropped_blocks * block_size`` of every prompt.
    """
    window = query_window.shape[2]
    score = score_prompt(query_window, keys, block_table, prompt_lens, pool_kernel=pool_kernel)
    sizes = prompt_lens - window
    counts = sizes - dropped_blocks * layout.block_size
    chosen = top_indices(score, sizes, counts, max_kept - window)
    compact_tokens(
        cache,
        keys,
        values,
        block_table,
        prompt_lens,
        dropped_blocks,
        chosen,
        layout=layout,
        window=window,
    )


def _tokens(pages: Tensor, blocks: Tensor, length: int) -> Tensor:
    return pages[blocks.long()].transpose(0, 1).flatten(1, 2)[:, :length]
