# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""SnapKV (arXiv 2404.14469): a prompt's last queries vote for what stays, all of which is read.

Votes are counted per KV head: per query head, as in the paper, a group's tokens would be stored
several times.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, PositiveInt, model_validator

from vllm_sparse.policies.protocol import Policy, PolicySettings, Retention
from vllm_sparse.policies.votes import select_prompt_tokens

if TYPE_CHECKING:
    from torch import Tensor


# Room in which the window's queries wait takes 1 / _PAGE_SIZE of the KV memory.
_PAGE_SIZE = 8


class SnapKVSettings(PolicySettings):
    """Settings of the SNAPKV backend."""

    algorithm: Literal["snapkv"] = "snapkv"
    token_budget: int = Field(1024, ge=16, description="Prompt tokens kept per KV head.")
    window: PositiveInt = Field(
        32, description="Last prompt tokens whose queries vote; always kept."
    )
    pool_kernel: PositiveInt = Field(7, description="Odd width of the max pool over votes.")
    skip_layers: Literal[0] = Field(0, description="Every layer reads all that it keeps.")

    @model_validator(mode="after")
    def _consistent(self) -> SnapKVSettings:
        if self.pool_kernel % 2 == 0:
            raise ValueError(f"pool_kernel={self.pool_kernel} is even; it needs a centre token")
        if self.token_budget <= self.window:
            raise ValueError(
                f"token_budget={self.token_budget} keeps nothing but the window of {self.window}; "
                "raise one or lower the other"
            )
        return self


class SnapKV(Policy):
    """Evicts once, after the prompt."""

    settings: SnapKVSettings
    Settings = SnapKVSettings
    moves = True

    @property
    def window(self) -> int:
        """The setting of that name."""
        return self.settings.window

    @property
    def page_sizes(self) -> tuple[int, ...]:
        """Nothing is scored; pages only make room in which the window's queries wait."""
        return (_PAGE_SIZE,)

    @property
    def index_width(self) -> int:
        """Room for two keys a page, or for queries of two heads."""
        return 2 * self.shape.head_dim

    def retention(self, prompt_len: int) -> Retention:
        """The budget rounded up to whole blocks stays."""
        size = self.shape.block_size
        blocks = prompt_len // size
        if prompt_len <= self.settings.min_context or blocks < self.room_for_window():
            return Retention(False, page_size=_PAGE_SIZE, reason="short_prompt")
        dropped = blocks - -(-self.settings.token_budget // size)
        if dropped < 1:
            return Retention(False, page_size=_PAGE_SIZE, reason="fits_budget")
        return Retention(True, dropped, page_size=_PAGE_SIZE)

    def keep(self, query_window: Tensor, keys: Tensor, count: int) -> Tensor:
        """The window and the most voted of the tokens before it."""
        return select_prompt_tokens(
            query_window,
            keys,
            count,
            self.settings.pool_kernel,
            self.shape.logit_scale,
            self.shape.learned_sinks,
        )
