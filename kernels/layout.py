# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""How one (block, KV head) page of a RocketKV cache is laid out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class PageLayout:
    """Views of a paged cache ``[blocks, G, block_size, C]`` that holds tokens and key extrema.

    A page is a contiguous run of ``block_size * C`` elements: first ``block_size`` token rows of
    ``2 * D`` (key, then value), then ``2 * D`` channel rows (D minima, D maxima) of
    ``block_size / page_size`` pages each, so that reading ``r`` channels moves only their bytes.

    Attributes:
        block_size: Tokens per block.
        head_dim: D.
        page_size: Tokens per page of extrema; a power of two that divides ``block_size``.
    """

    block_size: int
    head_dim: int
    page_size: int

    @property
    def pages_per_block(self) -> int:
        """Pages of extrema in a block."""
        return self.block_size // self.page_size

    @property
    def token_elements(self) -> int:
        """Elements of a page that hold keys and values."""
        return self.block_size * 2 * self.head_dim

    def tokens(self, cache: Tensor) -> Tensor:
        """Token rows ``[blocks, G, block_size, 2 * D]``, a view."""
        flat = cache.flatten(2)[..., : self.token_elements]
        return flat.unflatten(2, (self.block_size, 2 * self.head_dim))

    def extrema(self, cache: Tensor) -> Tensor:
        """Channel rows ``[blocks, G, 2 * D, pages_per_block]``, a view."""
        size = 2 * self.head_dim * self.pages_per_block
        flat = cache.flatten(2)[..., self.token_elements : self.token_elements + size]
        return flat.unflatten(2, (2 * self.head_dim, self.pages_per_block))
