# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What chooses a layer's blocks: one interface over the trained and the training-free selectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from vllm_sparse.kernels.types import Ranking

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


@dataclass(frozen=True)
class Tokens:
    """Query tokens of a step.

    Attributes:
        index: Positions in the batch, int64 ``[n]``.
        positions: Positions in their requests, int64 ``[n]``.
        previous_blocks: Physical block of the token before each, int64 ``[n]``.
        previous_index: Batch position of the token before each if it is in this step, else -1.
    """

    index: Tensor
    positions: Tensor
    previous_blocks: Tensor
    previous_index: Tensor

    def __getitem__(self, part: slice | Tensor) -> Tokens:
        return Tokens(
            self.index[part],
            self.positions[part],
            self.previous_blocks[part],
            self.previous_index[part],
        )


class Selector(Protocol):
    """What ranks the windows of a layer's compressed keys.

    Attributes:
        ahead: It is known while the layer before is computed.
        ranking: How kernels score with it.
    """

    ahead: bool
    ranking: Ranking

    def vectors(self, layer: int, tokens: Tokens, query: Tensor | None) -> Tensor:
        """What to compare a layer's compressed keys with.

        Args:
            layer: The layer.
            tokens: For which tokens.
            query: The layer's post-RoPE queries of the whole batch, ``[T, H, D]``; ``None`` while
                the layer before is computed.

        Returns:
            ``[n, G or H, D]``.
        """
        ...

    def record(self, layer: int, query: Tensor, slots: Tensor, last: Tensor) -> None:
        """Called once per layer and step, after the layer's selection.

        Args:
            layer: The layer.
            query: Its post-RoPE queries, ``[T, H, D]``.
            slots: ``block * block_size + offset`` of each token, int64 ``[T]``.
            last: Batch positions of the last token that this step writes to each block, int64.
        """
        ...


class ForecastSelector:
    """A projection of the previous layer's input: the trained Forecast, or layer l's own query
    projection (averaged over the heads of a group) where there is none.

    Args:
        taps: Of every layer but the last: recorded projections ``values`` ``[T, parts, G, D]``
            before RoPE, and ``rotate``. Layer 0's first part is for itself.
    """

    ahead = True
    ranking = Ranking(softmax=False)

    def __init__(self, taps: Sequence[Any]) -> None:
        self._taps = taps

    def vectors(self, layer: int, tokens: Tokens, query: Tensor | None) -> Tensor:
        """See :class:`Selector`; needs no query."""
        tap = self._taps[max(layer - 1, 0)]
        part = 1 if layer == 1 else 0
        rotated: Tensor = tap.rotate(tokens.positions, tap.values[tokens.index, part])
        return rotated

    def record(self, layer: int, query: Tensor, slots: Tensor, last: Tensor) -> None:
        """Nothing to keep."""


class QuerySelector:
    """The layer's own queries (InfLLM-v2): the best choice, known only when the layer runs.

    Args:
        scale: Logit scale.
    """

    ahead = False

    def __init__(self, scale: float) -> None:
        self.ranking = Ranking(softmax=True, scale=scale)

    def vectors(self, layer: int, tokens: Tokens, query: Tensor | None) -> Tensor:
        """See :class:`Selector`."""
        assert query is not None
        return query[tokens.index]

    def record(self, layer: int, query: Tensor, slots: Tensor, last: Tensor) -> None:
        """Nothing to keep."""


class PreviousSelector(QuerySelector):
    """The queries of the token before: free to know ahead, and what a Forecast has to beat.

    The queries are kept under the id of the block that holds their token. So they follow the
    request through reordering, and survive preemption and prefix sharing as the block does.

    Args:
        scale: Logit scale.
        kept: Where they are kept, ``[layers, blocks, H, D]``: host memory, a small part of the
            pool of keys and values, of which only blocks in use take memory unless it is pinned.
        block_size: Tokens per block.
        record: See :func:`vllm_sparse.kernels.reference.sparda_tokens.record_queries`.
    """

    ahead = True

    def __init__(
        self,
        scale: float,
        kept: Tensor,
        block_size: int,
        record: Callable[..., None],
    ) -> None:
        super().__init__(scale)
        self.ranking = Ranking(softmax=True, scale=scale, lag=1)
        self._kept = kept
        self._block_size = block_size
        self._record = record

    def vectors(self, layer: int, tokens: Tokens, query: Tensor | None) -> Tensor:
        """See :class:`Selector`."""
        kept = self._kept[layer].index_select(0, tokens.previous_blocks)
        if query is None:  # decode: the token before belongs to an earlier step
            return kept
        here = tokens.previous_index
        return torch.where((here >= 0)[:, None, None], query[here.clamp(min=0)], kept)

    def record(self, layer: int, query: Tensor, slots: Tensor, last: Tensor) -> None:
        """See :class:`Selector`."""
        self._record(self._kept[layer], query, slots, last, self._block_size)
