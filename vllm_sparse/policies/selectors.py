# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What chooses a layer's blocks: one interface over the trained and the training-free selectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from vllm_sparse.kernels.types import NewQueries, Ranking, Rotary

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
        previous_rows: In a batch of single tokens that follows another one, the row of the token
            before each in that, else -1; ``None`` in other batches.
    """

    index: Tensor
    positions: Tensor
    previous_blocks: Tensor
    previous_index: Tensor
    previous_rows: Tensor | None = None

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
        ranking: How kernels score with it. If it turns vectors itself, decode rows give it those of
            :meth:`unrotated`.
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

    def unrotated(self, layer: int, rows: int, index: Tensor | None) -> Tensor:
        """What :meth:`vectors` gives, before the model's rotary embedding, ``[n, G, D]``.

        Args:
            layer: The layer.
            rows: How many.
            index: Their positions in the batch; ``None`` if they are the first ones, in order,
                which costs nothing.
        """
        ...

    def begin(self, tokens: Tokens | None) -> None:
        """Called once per step, before any layer keeps something of it.

        Args:
            tokens: Of a batch of single tokens that choose blocks; ``None`` in other steps.
        """
        ...

    def keeping(self, layer: int, query: Tensor) -> NewQueries | None:
        """What a batch of single tokens keeps as it is written, which is before it chooses.

        Args:
            layer: The layer.
            query: Its post-RoPE queries, ``[T, H, D]``.
        """
        ...

    def record(self, layer: int, query: Tensor, slots: Tensor, last: Tensor) -> None:
        """Called once per layer and step of any other batch, after the layer's selection.

        Args:
            layer: The layer.
            query: Its post-RoPE queries, ``[T, H, D]``.
            slots: ``block * block_size + offset`` of each token, int64 ``[T]``.
            last: Batch positions of the last token that this step writes to each block, int64.
        """
        ...


class _Forgets:
    """What a selector that keeps nothing of a step has to say."""

    def begin(self, tokens: Tokens | None) -> None:
        """Nothing was kept."""

    def keeping(self, layer: int, query: Tensor) -> NewQueries | None:
        """Nothing to keep."""
        return None

    def record(self, layer: int, query: Tensor, slots: Tensor, last: Tensor) -> None:
        """Nothing to keep."""


class ForecastSelector(_Forgets):
    """A projection of the previous layer's input: the trained Forecast, or layer l's own query
    projection (averaged over the heads of a group) where there is none.

    Args:
        taps: Of every layer but the last: recorded projections ``values`` ``[T, parts, G, D]``
            before RoPE, and ``rotate``. Layer 0's first part is for itself.
        rotary: What ``rotate`` does, where decode rows have the kernel do it.
    """

    ahead = True

    def __init__(self, taps: Sequence[Any], rotary: Rotary | None = None) -> None:
        self._taps = taps
        self.ranking = Ranking(softmax=False, rotary=rotary)

    def vectors(self, layer: int, tokens: Tokens, query: Tensor | None) -> Tensor:
        """What a tap recorded for the layer, rotated; needs no query, ``[n, G, D]``."""
        values = self.unrotated(layer, len(tokens.index), tokens.index)
        rotated: Tensor = self._taps[max(layer - 1, 0)].rotate(tokens.positions, values)
        return rotated

    def unrotated(self, layer: int, rows: int, index: Tensor | None) -> Tensor:
        """What a tap recorded for the layer, before its rotary embedding, ``[n, G, D]``."""
        part = 1 if layer == 1 else 0
        values: Tensor = self._taps[max(layer - 1, 0)].values
        return values[:rows, part] if index is None else values[index, part]


class QuerySelector(_Forgets):
    """The layer's own queries (InfLLM-v2): the best choice, known only when the layer runs.

    Args:
        scale: Logit scale.
    """

    ahead = False

    def __init__(self, scale: float) -> None:
        self.ranking = Ranking(softmax=True, scale=scale)

    def vectors(self, layer: int, tokens: Tokens, query: Tensor | None) -> Tensor:
        """The layer's queries of these tokens, ``[n, H, D]``."""
        assert query is not None
        return query[tokens.index]

    def unrotated(self, layer: int, rows: int, index: Tensor | None) -> Tensor:
        """Never asked for: queries come with their rotary embedding."""
        raise NotImplementedError


class PreviousSelector(QuerySelector):
    """The queries of the token before: free to know ahead, and what a Forecast has to beat.

    The queries are kept under the id of the block that holds their token. So they follow the
    request through reordering, and survive preemption and prefix sharing as the block does.

    Args:
        scale: Logit scale.
        kept: Where they are kept, ``[layers, blocks, H, D]``: host memory, a small part of the
            pool of keys and values, of which only blocks in use take memory unless it is pinned.
        block_size: Tokens per block.
        record: The kernel ``record_queries``, which keeps those of prompts.
        recall: The kernel ``recall_queries``, which finds them again.
        recent: Where those of the last batch of single tokens are kept on a device, ``[layers,
            rows, H, D]``, so that the host's are read only by rows that were not in it.

    A batch of single tokens finds those of all layers before it keeps its own, so that a layer may
    keep them as it writes its tokens, in the same launch.
    """

    ahead = True

    def __init__(
        self,
        scale: float,
        kept: Tensor,
        block_size: int,
        record: Callable[..., None],
        recall: Callable[..., None],
        recent: Tensor | None = None,
    ) -> None:
        super().__init__(scale)
        self.ranking = Ranking(softmax=True, scale=scale, lag=1)
        self._kept = kept
        self._block_size = block_size
        self._record = record
        self._recall = recall
        # What a step has found stays where it is while the layers keep theirs.
        self._recent = None if recent is None else (recent, torch.empty_like(recent))
        self._found: Sequence[Tensor] | None = None
        # Views of each layer, made once.
        recents = [None] * len(kept) if recent is None else recent.unbind()
        self._places = list(zip(kept.unbind(), recents, strict=True))

    def begin(self, tokens: Tokens | None) -> None:
        """Finds the queries of the tokens before these in all layers."""
        self._found = None
        if tokens is None:
            return
        rows, blocks = tokens.previous_rows, tokens.previous_blocks
        if self._recent is None or rows is None:
            found = self._kept.index_select(1, blocks)
        else:
            recent, room = self._recent
            self._recall(self._kept, recent, rows, blocks, room)
            found = room[:, : len(rows)]
        self._found = found.unbind()

    def vectors(self, layer: int, tokens: Tokens, query: Tensor | None) -> Tensor:
        """Queries of the tokens before: kept ones, or of this step, ``[n, H, D]``."""
        if self._found is not None:
            return self._found[layer]
        kept = self._places[layer][0].index_select(0, tokens.previous_blocks)
        if query is None:  # decode: the token before belongs to an earlier step
            return kept
        here = tokens.previous_index
        return torch.where((here >= 0)[:, None, None], query[here.clamp(min=0)], kept)

    def keeping(self, layer: int, query: Tensor) -> NewQueries:
        """The queries of each row, for the token that follows."""
        kept, recent = self._places[layer]
        return NewQueries(kept, query, recent)

    def record(self, layer: int, query: Tensor, slots: Tensor, last: Tensor) -> None:
        """Keeps the queries of the last token in each block, for the token that follows it."""
        self._record(self._places[layer][0], query, slots, last, self._block_size)
