# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""How one (block, KV head) page of a cache with a page index is laid out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class PageLayout:
    """Views of a paged cache ``[blocks, G, block_size, C]`` that holds tokens and an index.

    A block of a KV head is a contiguous run of ``block_size * C`` elements: first ``block_size``
    token rows of ``2 * D`` (key, then value), then the index, channel by channel: each has a number
    for every page of ``page_size`` tokens, so that reading ``r`` channels moves only their bytes.
    RocketKV's channels are D minima and D maxima of keys.

    Attributes:
        block_size: Tokens per block.
        head_dim: D.
        page_size: Tokens per page of the index; a power of two that divides ``block_size``.
        index_width: Channels of the index; ``None``: ``2 * D``.
    """

    block_size: int
    head_dim: int
    page_size: int
    index_width: int | None = None

    @property
    def pages_per_block(self) -> int:
        """Pages in a block."""
        return self.block_size // self.page_size

    @property
    def token_elements(self) -> int:
        """Elements of a page that hold keys and values."""
        return self.block_size * 2 * self.head_dim

    def tokens(self, cache: Tensor) -> Tensor:
        """Token rows ``[blocks, G, block_size, 2 * D]``, a view."""
        flat = cache.flatten(2)[..., : self.token_elements]
        return flat.unflatten(2, (self.block_size, 2 * self.head_dim))

    @property
    def channels(self) -> int:
        """Channels of the index."""
        return 2 * self.head_dim if self.index_width is None else self.index_width

    def index(self, cache: Tensor) -> Tensor:
        """Index ``[blocks, G, channels, pages_per_block]``, a view."""
        size = self.channels * self.pages_per_block
        flat = cache.flatten(2)[..., self.token_elements : self.token_elements + size]
        return flat.unflatten(2, (self.channels, self.pages_per_block))
