# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The two operations of the ROCKETKV backend, composed of Triton kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_sparse.kernels.triton.append import append_tokens
from vllm_sparse.kernels.triton.attention import attend_slots
from vllm_sparse.kernels.triton.compaction import compact_tokens
from vllm_sparse.kernels.triton.pages import score_pages, select_slots
from vllm_sparse.kernels.triton.prompt import score_prompt
from vllm_sparse.kernels.triton.topk import top_indices

if TYPE_CHECKING:
    from torch import Tensor
    from vllm_sparse.kernels.layout import PageLayout


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
    parked: Tensor | None = None,
    per_block: int = 0,
) -> None:
    """Same contract as :func:`vllm_sparse.kernels.reference.rocketkv.decode_attention`.

    Capturable: grids and scratch depend on shapes only. The channel axes must be contiguous and
    so must a page of the cache; other strides are free. Integer tensors are int32. Queries are
    rounded to the cache's dtype. Scratch: ``4 * T * pages * (H + G)`` bytes for page scores,
    ``pages = max_blocks * pages_per_block``.

    Args:
        cache: See there, as for the others.
        query: ``[T, H, D]``.
        key: ``[T, G, D]``.
        value: ``[T, G, D]``.
        output: ``[T, H, D]``.
        block_table: ``[T, max_blocks]``.
        lengths: ``[T]``.
        final_lengths: ``[T]``.
        top_r: ``[T]``.
        layout: Page geometry.
        top_k: Tokens to attend to per KV head.
        scale: Logit scale.
        read_all: Attend to every token.
        replays: See :func:`.append.append_tokens`; false saves a launch.
        parked: See :func:`.append.append_tokens`.
        per_block: Likewise.
    """
    append_tokens(
        cache,
        key,
        value,
        block_table,
        lengths,
        final_lengths,
        top_r,
        layout,
        replays=replays,
        query=query,
        parked=parked,
        per_block=per_block,
    )
    slots = None
    if not read_all:
        scores = score_pages(cache, query, block_table, lengths, top_r, layout=layout, top_k=top_k)
        slots = select_slots(
            scores,
            block_table,
            lengths,
            top_r,
            layout=layout,
            top_k=top_k,
            kv_heads=cache.shape[1],
        )
    attend_slots(
        cache,
        query,
        output,
        slots,
        block_table,
        lengths,
        top_r,
        layout=layout,
        top_k=top_k,
        scale=scale,
    )


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
    """Same contract as :func:`vllm_sparse.kernels.reference.prompt.compact_prompts`."""
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
