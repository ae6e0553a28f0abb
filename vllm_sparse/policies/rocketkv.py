# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""RocketKV (arXiv 2502.14051): which prompt tokens to keep, which kept tokens to read.

Notation: H query heads, G KV heads, D head size, n tokens, w observation window.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from pydantic import Field, PositiveInt, field_validator, model_validator

from vllm_sparse.policies.pages import (
    extrema,
    page_extrema,
    page_probabilities,
    page_tokens,
    select_pages,
)
from vllm_sparse.policies.protocol import Policy, PolicySettings, Retention
from vllm_sparse.policies.sinks import of_groups
from vllm_sparse.policies.votes import select_prompt_tokens

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = [
    "RocketKV",
    "RocketKVPlan",
    "RocketKVSettings",
    "page_extrema",
    "page_probabilities",
    "plan",
    "select_decode_tokens",
    "select_pages",
    "select_prompt_tokens",
    "stage2_geometry",
]


class RocketKVPlan(NamedTuple):
    """How one request's token budget is split between the two stages.

    Attributes:
        capacity: Tokens held after stage 1, the tokens still to be generated included.
        prompt_budget: Tokens kept from the prompt.
        page_size: Consecutive kept tokens that share one pair of key extrema.
        top_r: Channels of the head that stage 2 reads.
        top_k: Tokens that each KV head attends to in a decode step.
        dense: Nothing to evict: the prompt fits its budget.
    """

    capacity: int
    prompt_budget: int
    page_size: int
    top_r: int
    top_k: int
    dense: bool


def plan(
    prompt_len: int,
    max_new_tokens: int,
    token_budget: int,
    head_dim: int,
    window: int = 32,
    page_sizes: Sequence[int] | None = None,
) -> RocketKVPlan:
    """Split a token budget between the stages (section 3.5, "adaptive compression decomposition").

    With ``S`` planned tokens and ratio ``c = S / token_budget``, stage 1 compresses by
    ``c ** rho``, ``rho = min(0.2 + 0.06 * log2(c), 0.8)``, and stage 2 by the rest.

    Args:
        prompt_len: Prompt tokens.
        max_new_tokens: Tokens reserved for generation; they count towards the capacity.
        token_budget: KV pairs read per KV head and decode step, half of them as estimates.
        head_dim: D.
        window: Observation window, always kept.
        page_sizes: Allowed page sizes, ascending. The paper's page size is rounded up to one of
            them (the largest if none is as large) and ``top_r`` is recomputed so that the
            estimate still reads ``token_budget / 2`` pairs. ``None`` uses the paper's value.

    Returns:
        The plan. ``top_k`` is ``token_budget // 2``.
    """
    planned = prompt_len + max_new_tokens
    ratio = max(1.0, planned / token_budget)
    rho = min(0.2 + 0.06 * math.log2(ratio), 0.8)
    capacity = max(math.floor(planned / ratio**rho), min(2 * max_new_tokens, planned))
    prompt_budget = min(max(capacity - max_new_tokens, window), prompt_len)
    return RocketKVPlan(
        capacity,
        prompt_budget,
        *stage2_geometry(capacity, token_budget, head_dim, page_sizes),
        top_k=token_budget // 2,
        dense=prompt_budget >= prompt_len,
    )


def stage2_geometry(
    held_tokens: int, token_budget: int, head_dim: int, page_sizes: Sequence[int] | None = None
) -> tuple[int, int]:
    """Page size and channel count with which stage 2 reads ``token_budget / 2`` pairs.

    Args:
        held_tokens: Tokens that stage 2 scores.
        token_budget: Pairs read per step and KV head, half of them while scoring.
        head_dim: D.
        page_sizes: Page sizes to round up to, ascending; the paper's if omitted.

    Returns:
        ``(page_size, top_r)``.
    """
    ratio = max(1.0, held_tokens / token_budget)
    page_size = math.ceil(math.sqrt(ratio))
    if page_size > ratio:
        page_size = 1
    if page_sizes is not None:
        page_size = next((size for size in page_sizes if size >= page_size), max(page_sizes))
    return page_size, min(max(math.floor(head_dim * page_size / ratio), 1), head_dim)


def select_decode_tokens(
    query: Tensor,
    key_min: Tensor,
    key_max: Tensor,
    num_tokens: int,
    page_size: int,
    top_r: int,
    top_k: int,
    *,
    force_newest: bool = True,
    scale: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Stage 2: the tokens that each KV head attends to in one step (section 3.4, HSA).

    Args:
        query: Post-RoPE queries of one position, ``[H, D]``.
        key_min: Page minima in kept order, ``[G, pages, D]``.
        key_max: Page maxima, ``[G, pages, D]``.
        num_tokens: Kept tokens, the current one included.
        page_size: Tokens per page.
        top_r: Channels to read.
        top_k: Tokens to select.
        force_newest: Rank the page of the newest token first.
        scale: Logit scale, ``1 / sqrt(D)`` if omitted.
        sinks: Learned attention sinks, ``[H]``.

    Returns:
        ``[G, min(top_k, num_tokens)]`` int64, ascending.
    """
    kv_heads, _, dim = key_min.shape
    count = min(top_k, num_tokens)
    tokens = torch.tensor(num_tokens, device=query.device)
    probability = page_probabilities(
        query.view(kv_heads, -1, dim),
        key_min,
        key_max,
        tokens,
        page_size,
        torch.tensor(top_r, device=query.device),
        scale,
        of_groups(sinks, kv_heads),
    )
    pages, taken = select_pages(probability, tokens, page_size, count, force_newest=force_newest)
    return page_tokens(pages, taken, page_size)[:, :count]


class RocketKVSettings(PolicySettings):
    """Settings of the ROCKETKV backend; defaults follow the paper where it has a value.

    Except for ``window``, which is 32 in the paper: see ``docs/quality.md``.
    """

    algorithm: Literal["rocketkv"] = "rocketkv"
    token_budget: int = Field(
        1024,
        ge=16,
        description="KV pairs read per KV head and decode step (the paper's t), half of them as "
        "estimates. Also sets how much stage 1 keeps.",
    )
    window: PositiveInt = Field(
        16,
        description="Last prompt tokens whose queries score the prompt; always kept. The paper has "
        "32, as the preset `paper` does.",
    )
    pool_kernel: PositiveInt = Field(63, description="Odd width of stage 1's max pool, in tokens.")
    page_sizes: tuple[PositiveInt, ...] = Field(
        (4,),
        min_length=1,
        description="Allowed page sizes of stage 2, powers of two; on GPUs one. The paper's value "
        "is rounded up to one of them. Key extrema take `1 / min(page_sizes)` of the KV memory.",
    )
    generation_reserve: int = Field(
        256, ge=0, description="Tokens planned for generation when the budget is split."
    )
    stage1: bool = Field(
        True,
        description="Evict prompt tokens after prefill. Off, for ablations: nothing is evicted, "
        "and prompts above `min_context` are copied to and from the prefix cache whole, as far as "
        "a step and the pool have room for it.",
    )
    stage2: bool = Field(True, description="Select tokens at decode. Off: for ablations.")

    @field_validator("page_sizes")
    @classmethod
    def _ascending_powers_of_two(cls, sizes: tuple[int, ...]) -> tuple[int, ...]:
        for size in sizes:
            if size & (size - 1):
                raise ValueError(f"{size} is not a power of two, so pages would straddle blocks")
        return tuple(sorted(set(sizes)))

    @field_validator("pool_kernel")
    @classmethod
    def _odd(cls, width: int) -> int:
        if width % 2 == 0:
            raise ValueError(f"{width} is even; the pool needs a centre token")
        return width

    @model_validator(mode="after")
    def _consistent(self) -> RocketKVSettings:
        if not (self.stage1 or self.stage2):
            raise ValueError(
                "stage1 and stage2 are both off, which is dense attention: leave out "
                "--attention-backend instead"
            )
        if self.token_budget < 4 * max(self.page_sizes):
            raise ValueError(
                f"token_budget={self.token_budget} holds fewer than two pages of "
                f"page_sizes={list(self.page_sizes)} after half of it pays for the estimate; "
                "raise token_budget or lower page_sizes"
            )
        return self


class RocketKV(Policy):
    """Stage 1 evicts after the prompt, stage 2 reads the best tokens of the rest."""

    settings: RocketKVSettings
    Settings = RocketKVSettings
    moves = True
    kernel = "rocketkv"

    @property
    def top_k(self) -> int | None:
        """Half the budget: the other half pays for the estimate."""
        return self.settings.token_budget // 2 if self.settings.stage2 else None

    @property
    def window(self) -> int:
        """The observation window; where everything is kept, one query tells the prompt's end."""
        return self.settings.window if self.settings.stage1 else 1

    @property
    def page_sizes(self) -> tuple[int, ...]:
        """The setting of that name."""
        return self.settings.page_sizes

    @property
    def index_width(self) -> int:
        """Minima and maxima."""
        return 2 * self.shape.head_dim

    def retention(self, prompt_len: int) -> Retention:
        """The paper's split with a configured generation reserve, in whole blocks."""
        own, shape = self.settings, self.shape
        reserve = max(0, min(own.generation_reserve, shape.max_model_len - prompt_len))
        if prompt_len <= max(own.min_context, own.window):
            return Retention(False, 0, max(own.page_sizes), shape.head_dim, "short_prompt")
        if not own.stage1:
            geometry = stage2_geometry(
                prompt_len + reserve, own.token_budget, shape.head_dim, own.page_sizes
            )
            return Retention(True, 0, *geometry)
        split = plan(
            prompt_len, reserve, own.token_budget, shape.head_dim, own.window, own.page_sizes
        )
        kept = max(-(-split.capacity // shape.block_size), self.room_for_window())
        dropped = prompt_len // shape.block_size - kept
        if dropped < 1:
            return Retention(False, 0, split.page_size, split.top_r, "fits_budget")
        return Retention(True, dropped, split.page_size, split.top_r)

    def keep(self, query_window: Tensor, keys: Tensor, count: int) -> Tensor:
        """Stage 1."""
        return select_prompt_tokens(
            query_window,
            keys,
            count,
            self.settings.pool_kernel,
            self.shape.logit_scale,
            self.shape.learned_sinks,
        )

    def index(self, keys: Tensor, present: Tensor) -> Tensor:
        """Extrema of the page's keys."""
        return extrema(keys, present)

    def describe(self) -> str:
        """Stages and budget."""
        own = self.settings
        stages = "+".join(name for name in ("stage1", "stage2") if getattr(own, name))
        return f"{stages}, token budget {own.token_budget}"
