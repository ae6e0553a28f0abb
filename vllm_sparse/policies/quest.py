# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Quest (arXiv 2406.10774): nothing is evicted, each step reads the pages that may matter most.

A page's elementwise key minima and maxima bound the logit of every key in it from above. The paper
bounds each query head by itself; here the heads of a KV group share what they read, so the bounds
of a group are added up, each head's as a share of its own softmax over pages and, if it has one,
its learned sink.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field, PositiveInt, model_validator

from vllm_sparse.policies.pages import extrema
from vllm_sparse.policies.protocol import Policy, PolicySettings, Retention
from vllm_sparse.policies.sinks import of_groups, softmax

if TYPE_CHECKING:
    from torch import Tensor


class QuestSettings(PolicySettings):
    """Settings of the QUEST backend."""

    algorithm: Literal["quest"] = "quest"
    page_size: PositiveInt = Field(
        16,
        description="Tokens per page, a power of two. Extrema take `1 / page_size` of the KV "
        "memory.",
    )
    skip_layers: int = Field(2, ge=0, description="First layers that read everything.")

    @model_validator(mode="after")
    def _consistent(self) -> QuestSettings:
        if self.page_size & (self.page_size - 1):
            raise ValueError(f"page_size={self.page_size} is not a power of two")
        if self.token_budget < 2 * self.page_size:
            raise ValueError(
                f"token_budget={self.token_budget} holds fewer than two pages of "
                f"page_size={self.page_size}; raise one or lower the other"
            )
        return self


class Quest(Policy):
    """Page bounds choose; the prefix cache stays whole."""

    settings: QuestSettings
    Settings = QuestSettings

    @property
    def top_k(self) -> int:
        """The budget."""
        return self.settings.token_budget

    @property
    def page_sizes(self) -> tuple[int, ...]:
        """One size."""
        return (self.settings.page_size,)

    @property
    def index_width(self) -> int:
        """Minima and maxima."""
        return 2 * self.shape.head_dim

    def retention(self, prompt_len: int) -> Retention:
        """Long prompts are served sparsely, whole."""
        size = self.settings.page_size
        if prompt_len <= self.settings.min_context:
            return Retention(False, page_size=size, reason="short_prompt")
        return Retention(True, page_size=size)

    def index(self, keys: Tensor, present: Tensor) -> Tensor:
        """Extrema of the page's keys."""
        return extrema(keys, present)

    def score(self, query: Tensor, index: Tensor, num_tokens: Tensor, page_size: int) -> Tensor:
        """Upper bounds of logits (section 3.3), per head as a softmax, summed over the group."""
        low, high = index.float().chunk(2, -1)
        query = query.float() * self.shape.logit_scale
        # max(q * low, q * high) is q * high where q > 0, else q * low.
        bound = query.clamp(min=0) @ high.transpose(-1, -2)
        bound += query.clamp(max=0) @ low.transpose(-1, -2)
        page = torch.arange(index.shape[2], device=query.device) * page_size
        bound = bound.masked_fill((page >= num_tokens[:, None])[:, None, None], -torch.inf)
        return softmax(bound, of_groups(self.shape.learned_sinks, query.shape[1])).sum(2)
