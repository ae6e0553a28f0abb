# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""RocketKV's stage 1 as a chain of three kernels, whichever implementation's they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_sparse.kernels.fp8 import UNSCALED, Scales

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from vllm_sparse.kernels.layout import PageLayout


def chained(
    score_prompt: Callable[..., Tensor],
    top_indices: Callable[..., Tensor],
    compact_tokens: Callable[..., None],
) -> Callable[..., None]:
    """The stage that runs these kernels one after the other."""

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
        scale: float,
        max_kept: int,
        scales: Scales = UNSCALED,
        sinks: Tensor | None = None,
    ) -> None:
        """Stage 1 of every prompt that ends in a step: score, select, move.

        Args:
            cache: ``[blocks, G, block_size, C]``, modified in the prompts' tails only.
            keys: ``[blocks, G, block_size, D]``; may be a view of ``cache``.
            values: ``[blocks, G, block_size, D]``; may be a view of ``cache``.
            query_window: Post-RoPE queries of each prompt's last ``w`` positions, ``[R, H, w, D]``.
            block_table: Each prompt's blocks, int32 ``[R, max_blocks]``.
            prompt_lens: P, int32 ``[R]``; 0 marks a padding row.
            dropped_blocks: Leading blocks that leave, int32 ``[R]``; at least ``w`` tokens must
                stay.
            layout: Page geometry.
            pool_kernel: Odd width of the max pool.
            scale: Logit scale.
            max_kept: At least ``P - dropped_blocks * block_size`` of every prompt.
            scales: Of an fp8 cache.
            sinks: Learned attention sinks, a logit of each query head, any dtype ``[H]``.
        """
        window = query_window.shape[2]
        score = score_prompt(
            query_window,
            keys,
            block_table,
            prompt_lens,
            pool_kernel=pool_kernel,
            scale=scale * scales.key,
            sinks=sinks,
        )
        sizes = prompt_lens - window
        counts = sizes.sub(dropped_blocks, alpha=layout.block_size)
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

    return compact_prompts
