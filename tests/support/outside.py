# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""A policy of another package, as its entry point would name it: large keys stay, means choose."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_sparse.policies.protocol import Policy, PolicySettings, Retention

if TYPE_CHECKING:
    import torch


class LargeKeysSettings(PolicySettings):
    """Nothing of its own."""


class LargeKeys(Policy):
    """Keeps the tokens with the largest keys, reads the pages whose mean key fits the query."""

    Settings = LargeKeysSettings
    moves = True
    page_sizes = (4,)

    @property
    def top_k(self) -> int:
        """A quarter of what is kept."""
        return self.settings.token_budget // 4

    @property
    def index_width(self) -> int:
        """One key."""
        return self.shape.head_dim

    def retention(self, prompt_len: int) -> Retention:
        """The budget stays."""
        dropped = (prompt_len - self.settings.token_budget) // self.shape.block_size
        if prompt_len <= self.settings.min_context or dropped < 1:
            return Retention(False, page_size=4, reason="short_prompt")
        return Retention(True, dropped, page_size=4)

    def keep(self, query_window: torch.Tensor, keys: torch.Tensor, count: int) -> torch.Tensor:
        """By the norm of keys."""
        order = keys.norm(dim=-1).sort(dim=-1, descending=True, stable=True).indices
        return order[:, :count].sort(-1).values

    def index(self, keys: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        """Mean keys."""
        present = present.unsqueeze(-1)
        return keys.masked_fill(~present, 0.0).sum(-2) / present.sum(-2).clamp(min=1)

    def score(
        self, query: torch.Tensor, index: torch.Tensor, num_tokens: torch.Tensor, page_size: int
    ) -> torch.Tensor:
        """Of the group's sum."""
        return (query.float().sum(2, keepdim=True) @ index.float().transpose(-1, -2)).squeeze(2)
