# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Which prompt blocks leave after prefill: one pure rule for scheduler and worker.

RocketKV keeps its tokens in a *private tail*: the last full blocks of the prompt (and its partial
block). Block ids, slots and positions stay logical; the first ``dropped`` blocks are given back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from vllm_sparse.policies.rocketkv import plan, stage2_geometry


class Retention(NamedTuple):
    """What happens to a prompt of a given length.

    Attributes:
        sparse: The request is compressed; otherwise it is served densely.
        dropped_blocks: Leading prompt blocks given back once the prompt is complete.
        page_size: Tokens per page of key extrema.
        top_r: Channels stage 2 reads.
        reason: Why the request stays dense; empty when it does not.
    """

    sparse: bool
    dropped_blocks: int
    page_size: int
    top_r: int
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class RetentionRule:
    """Decides from the prompt length alone, so that no message has to travel.

    Attributes:
        token_budget: See :func:`vllm_sparse.policies.rocketkv.plan`.
        window: Observation window in tokens.
        page_sizes: Allowed page sizes, ascending.
        min_context: Prompts up to this many tokens stay dense.
        generation_reserve: Tokens planned for generation.
        stage1: Evict; if off, every prompt token is kept.
        stage2: Select at decode; if off, every kept token is read.
        head_dim: D.
        group_size: Query heads per KV head; window queries are parked in the tail's extrema area.
        block_size: Tokens per block.
        max_model_len: Longest request in tokens.
    """

    token_budget: int
    window: int
    page_sizes: tuple[int, ...]
    min_context: int
    generation_reserve: int
    stage1: bool
    stage2: bool
    head_dim: int
    group_size: int
    block_size: int
    max_model_len: int

    @property
    def queries_per_block(self) -> int:
        """Window queries of a whole group that fit in one tail block's extrema area."""
        return 2 * (self.block_size // min(self.page_sizes)) // self.group_size

    @property
    def min_kept_blocks(self) -> int:
        """Tail blocks needed so that parked window queries have room before the prompt ends."""
        parking = -(-self.window // self.queries_per_block)
        return parking + -(-self.window // self.block_size)

    def __call__(self, prompt_len: int) -> Retention:
        """Apply the rule.

        Args:
            prompt_len: Prompt tokens.

        Returns:
            The retention; pure, so scheduler and worker agree without talking.
        """
        reserve = max(0, min(self.generation_reserve, self.max_model_len - prompt_len))
        if prompt_len <= max(self.min_context, self.window):
            return Retention(False, 0, max(self.page_sizes), self.head_dim, "short_prompt")
        if not self.stage1:
            geometry = stage2_geometry(
                prompt_len + reserve, self.token_budget, self.head_dim, self.page_sizes
            )
            return Retention(True, 0, *geometry)
        split = plan(
            prompt_len, reserve, self.token_budget, self.head_dim, self.window, self.page_sizes
        )
        kept = max(-(-split.capacity // self.block_size), self.min_kept_blocks)
        dropped = prompt_len // self.block_size - kept
        if dropped < 1:
            return Retention(False, 0, split.page_size, split.top_r, "fits_budget")
        return Retention(True, dropped, split.page_size, split.top_r)

    def publishable_blocks(self, prompt_len: int) -> int | None:
        """Leading blocks that the prefix cache may share; ``None`` if all of them.

        The tail of a compressed request is overwritten, so it is never published, and a cache hit
        never reaches into it.
        """
        retention = self(prompt_len)
        return retention.dropped_blocks if retention.sparse else None
