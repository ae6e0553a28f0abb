# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""StreamingLLM (arXiv 2309.17453): the first tokens and a window are read, all between is freed.

Positions stay those of the text, and prompts are read densely; the paper renumbers positions inside
the cache and streams prompts, too. So what the first tokens are worth differs as soon as a text is
longer than the budget.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field, PositiveInt, model_validator

from vllm_sparse.policies.protocol import Policy, PolicySettings, Retention

if TYPE_CHECKING:
    from torch import Tensor


class StreamingLLMSettings(PolicySettings):
    """Settings of the STREAMINGLLM backend."""

    algorithm: Literal["streamingllm"] = "streamingllm"
    token_budget: int = Field(1024, ge=16, description="Tokens read: sinks and window together.")
    sinks: PositiveInt = Field(4, description="First tokens that are always read.")
    skip_layers: Literal[0] = Field(0, description="What is freed is freed in every layer.")

    @model_validator(mode="after")
    def _consistent(self) -> StreamingLLMSettings:
        if self.sinks >= self.token_budget:
            raise ValueError(
                f"sinks={self.sinks} leave no window in token_budget={self.token_budget}; "
                "raise one or lower the other"
            )
        return self


class StreamingLLM(Policy):
    """Reads by position; the window moves on as tokens are generated."""

    settings: StreamingLLMSettings
    Settings = StreamingLLMSettings

    @property
    def top_k(self) -> int:
        """Sinks and window."""
        return self.settings.token_budget

    def retention(self, prompt_len: int) -> Retention:
        """Prompts beyond the budget lose their middle."""
        if prompt_len <= max(self.settings.min_context, self.top_k):
            short = prompt_len <= self.settings.min_context
            return Retention(False, reason="short_prompt" if short else "fits_budget")
        return Retention(True)

    def freed_blocks(self, prompt_len: int, num_tokens: int) -> tuple[int, int]:
        """Whole blocks between the sinks and the window of the next token."""
        if not self.retention(prompt_len).sparse:
            return 0, 0
        size = self.shape.block_size
        oldest = num_tokens + 1 - (self.top_k - self.settings.sinks)
        return -(-self.settings.sinks // size), oldest // size

    def select(
        self, query: Tensor, index: Tensor | None, num_tokens: Tensor, page_size: int, width: int
    ) -> Tensor:
        """Sinks, then the newest tokens."""
        place = torch.arange(width, device=query.device)
        gap = (num_tokens[:, None] - width).clamp(min=0)
        token = torch.where(place < self.settings.sinks, place, place + gap)
        return token[:, None].expand(-1, query.shape[1], -1)

    def describe(self) -> str:
        """Sinks and window."""
        return f"{self.settings.sinks} first and {self.top_k - self.settings.sinks} last tokens"
