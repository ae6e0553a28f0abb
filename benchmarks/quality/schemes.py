# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Ways to keep prompt tokens and ways to read them, as functions of one prompt's keys and queries.

A :class:`Scheme` is a pair of them. What the served policies do is taken from the policies; oracles
and candidates are written out here.

Notation: H query heads, G KV heads, D head size, n prompt tokens, m tokens held.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from vllm_sparse.policies import windows
from vllm_sparse.policies.pages import page_extrema, page_probabilities, page_tokens, select_pages
from vllm_sparse.policies.votes import pooled, top_indices
from vllm_sparse.training.geometry import BlockGeometry
from vllm_sparse.training.objective import best_free_blocks

if TYPE_CHECKING:
    from collections.abc import Callable


class Layer(NamedTuple):
    """What one layer leaves of a dense prompt, in float32.

    Attributes:
        keys: ``[G, n, D]``.
        values: ``[G, n, D]``.
        last: Queries of the last tokens, ``[H, w, D]``.
        ideal: Queries of the dense answer, ``[H, s, D]``.
        memo: Votes that several schemes use.
        scale: What the layer multiplies its logits by.
    """

    keys: Tensor
    values: Tensor
    last: Tensor
    ideal: Tensor
    memo: dict
    scale: float


# --- what stays of a prompt ---------------------------------------------------------------------


def attention(query: Tensor, positions: Tensor, layer: Layer) -> Tensor:
    """Causal attention probabilities: query [H, q, D], positions [q] -> [G, H / G, q, n]."""
    groups, tokens, size = layer.keys.shape
    logits = query.reshape(groups, -1, size) @ layer.keys.mT * layer.scale
    logits = logits.view(groups, -1, len(positions), tokens)
    hidden = torch.arange(tokens) > positions[:, None]
    return logits.masked_fill_(hidden, -torch.inf).softmax(-1)


def ideal_votes(layer: Layer) -> Tensor:
    """What the dense answer's queries give each prompt token: [G, n]."""

    def vote() -> Tensor:
        size = layer.keys.shape[1]
        positions = torch.full((layer.ideal.shape[1],), size)
        return attention(layer.ideal.contiguous(), positions, layer).sum((1, 2))

    return _memo(layer, ("ideal",), vote)


def _memo(layer: Layer, name: tuple, make: Callable[[], Tensor]) -> Tensor:
    if name not in layer.memo:
        layer.memo[name] = make()
    return layer.memo[name]


@dataclass(frozen=True)
class KeepIdeal:
    """What the dense answer votes for, and the last tokens.

    Attributes:
        window: Tokens at the end that stay.
        pool: Width of the max pool of the votes.
    """

    window: int = 32
    pool: int = 63

    def __call__(self, layer: Layer, count: int) -> Tensor:
        """Positions that stay, ascending: [G, count]."""
        votes = ideal_votes(layer)
        groups, tokens = votes.shape
        # As the policy does: only tokens before the window are pooled.
        votes = pooled(votes[:, : -self.window], self.pool)
        last = torch.arange(tokens - self.window, tokens).expand(groups, -1)
        return torch.cat((top_indices(votes, count - self.window), last), -1)


# --- what a step reads of it --------------------------------------------------------------------


class Held:
    """Tokens that one KV cache holds: kept prompt tokens, then generated ones.

    Attributes:
        keys: ``[G, m, D]``, with room behind.
        values: ``[G, m, D]``.
        positions: Of the kept prompt tokens in the text, ``[G, m]``.
        count: m.
        scale: As of `Layer`.
        last: Queries of the prompt's last token, ``[G, H / G, D]``.
        forecast: What the layer before says of the current token's reads, ``[G, D]``, if anything.
    """

    forecast: Tensor | None = None

    def __init__(self, layer: Layer, kept: Tensor | None, room: int) -> None:
        groups, tokens, size = layer.keys.shape
        if kept is None:
            kept = torch.arange(tokens).expand(groups, -1)
        index = kept[..., None].expand(-1, -1, size)
        pad = (0, 0, 0, room)
        self.keys = functional.pad(layer.keys.gather(1, index), pad)
        self.values = functional.pad(layer.values.gather(1, index), pad)
        self.positions, self.count, self.scale = kept, kept.shape[1], layer.scale
        self.last = layer.last[:, -1].view(groups, -1, size)

    def append(self, key: Tensor, value: Tensor) -> None:
        """Takes a generated token's key and value, [G, D] each."""
        self.keys[:, self.count] = key
        self.values[:, self.count] = value
        self.count += 1

    def probabilities(self, query: Tensor) -> Tensor:
        """Of each held token, summed over the group: query [G, H / G, D] -> [G, m]."""
        return (query @ self.keys[:, : self.count].mT * self.scale).softmax(-1).sum(1)


def summed(weights: Tensor, size: int) -> Tensor:
    """Sums over runs of so many tokens, of which the last may be shorter: [G, m] -> [G, runs]."""
    return functional.pad(weights, (0, -weights.shape[-1] % size)).unflatten(-1, (-1, size)).sum(-1)


class ReadTokens:
    """Exact top-k tokens by the group's summed probabilities.

    Attributes:
        most: Tokens up to which everything is read; all readers that choose have it.
    """

    def __init__(self, top_k: int) -> None:
        self.most = top_k

    def __call__(self, query: Tensor, held: Held) -> Tensor | None:
        """Slots to read for queries [G, H / G, D], the current token held already: [G, k]."""
        if held.count <= self.most:
            return None
        return held.probabilities(query).topk(self.most).indices


class ReadPages:
    """Top-k tokens as pages of the held tokens.

    Args:
        page: Tokens per page.
        top_r: Channels that scores read.
        top_k: Tokens to read.
        score: ``extrema``, ``mean``, ``moments`` (mean and deviation) or ``exact`` (the page's
            true probability).
        spread: Deviations that ``moments`` adds to the mean.
    """

    def __init__(
        self, page: int, top_r: int, top_k: int, score: str = "extrema", spread: float = 1.0
    ) -> None:
        self.page, self.top_r, self.most, self.score, self.spread = (
            page, top_r, top_k, score, spread,
        )  # fmt: skip
        self._index: tuple[Tensor, Tensor] | None = None

    def __call__(self, query: Tensor, held: Held) -> Tensor | None:
        """As `ReadTokens`."""
        if held.count <= self.most:
            return None
        count = torch.tensor(held.count)
        if self.score == "exact":
            chance = summed(held.probabilities(query), self.page)
        else:
            low, high = self._pages(held)
            if self.score == "extrema":
                chance = page_probabilities(
                    query, low, high, count, self.page, torch.tensor(self.top_r), held.scale
                )
            else:
                chance = self._moments(query, low, high, held)
        pages, taken = select_pages(chance, count, self.page, self.most)
        return page_tokens(pages, taken, self.page)[:, : self.most]

    def _pages(self, held: Held) -> tuple[Tensor, Tensor]:
        page, count = self.page, held.count
        make = page_extrema if self.score == "extrema" else page_moments
        if self._index is None:
            room = -(-held.keys.shape[1] // page)
            shape = (held.keys.shape[0], room, held.keys.shape[2])
            self._index = (torch.zeros(shape), torch.zeros(shape))
            fresh = 0
        else:
            fresh = (count - 1) // page
        for whole, part in zip(
            self._index, make(held.keys[:, fresh * page : count], page), strict=True
        ):
            whole[:, fresh : fresh + part.shape[1]] = part
        pages = -(-count // page)
        return self._index[0][:, :pages], self._index[1][:, :pages]

    def _moments(self, query: Tensor, mean: Tensor, deviation: Tensor, held: Held) -> Tensor:
        if self.top_r < query.shape[-1]:
            rank = query.abs().sum(-2).argsort(-1, descending=True).argsort(-1)
            query = query * (rank < self.top_r)[:, None]
        logits = query @ mean.mT
        logits = logits + self.spread * (query.square() @ deviation.square().mT).sqrt()
        tokens = (held.count - torch.arange(mean.shape[1]) * self.page).clamp(0, self.page)
        weight = (logits * held.scale).softmax(-1)  # of pages
        return (weight / (weight * tokens).sum(-1, keepdim=True)).sum(-2)


def page_moments(keys: Tensor, page: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each page of keys: [G, pages, D] each."""
    groups, tokens, size = keys.shape
    pages = -(-tokens // page)
    padded = functional.pad(keys, (0, 0, 0, pages * page - tokens)).view(groups, pages, page, size)
    there = (torch.arange(pages * page) < tokens).view(pages, page, 1)
    held = there.sum(1)
    mean = padded.sum(2) / held
    variance = ((padded - mean[:, :, None]).square() * there).sum(2) / held
    return mean, variance.sqrt()


# As few forced blocks as SPARDA allows, so that the selection has to find what is asked.
FEW_FORCED = BlockGeometry(init_blocks=1, local_blocks=2, top_k=8)


def tokens_of_best_blocks(scores: Tensor, count: int, sizes: BlockGeometry) -> Tensor:
    """Tokens of the best blocks and of those that are always read.

    Args:
        scores: Of the blocks of ``count`` tokens, ``[G, B]``.
        count: Tokens that the newest one sees, itself included.
        sizes: Block sizes and counts.

    Returns:
        bool ``[G, count]``.
    """
    newest = torch.tensor([count - 1])
    blocks = best_free_blocks(scores.unsqueeze(1), newest, sizes)[:, 0]
    blocks = blocks | ~sizes.free(newest, blocks.shape[-1])
    return blocks.repeat_interleave(sizes.block_size, -1)[:, :count]


class ReadBlocks:
    """SPARDA: blocks by the scores of windows of compressed keys.

    Args:
        top_k: Blocks in all.
        how: ``query``, ``previous`` (queries of the token before, at first of the prompt's last),
            ``forecast`` (of the layer before), ``exact`` (mass of blocks).
        union: What the step before read is read as well.
        sizes: Of blocks, but for ``top_k``.
    """

    def __init__(
        self,
        top_k: int,
        how: str = "query",
        *,
        union: bool = False,
        sizes: BlockGeometry = FEW_FORCED,
    ) -> None:
        self._sizes, self._how, self._union = replace(sizes, top_k=top_k), how, union
        self.most = top_k * sizes.block_size
        self._query: Tensor | None = None
        self._read: Tensor | None = None
        self._means: Tensor | None = None

    def __call__(self, query: Tensor, held: Held) -> Tensor | None:
        """As `ReadTokens`; -1 for none."""
        sizes, count = self._sizes, held.count
        before, self._query = held.last if self._query is None else self._query, query
        if count <= self.most:
            return None
        if self._how == "exact":
            scores = summed(held.probabilities(query), sizes.block_size)
        elif self._how == "previous":
            scores = self._scores(before, held, count - 2)
        else:
            scores = self._scores(query, held, count - 1)
        tokens = read = tokens_of_best_blocks(scores, count, sizes)
        if self._union and self._read is not None:
            tokens = read | functional.pad(self._read, (0, count - self._read.shape[1]))
        self._read = read
        most = int(tokens.sum(1).max())
        slots = tokens.byte().sort(dim=1, descending=True, stable=True).indices[:, :most]
        return slots.masked_fill(~tokens.gather(1, slots), -1)

    def _scores(self, query: Tensor, held: Held, position: int) -> Tensor:
        sizes = self._sizes
        known = 0 if self._means is None else self._means.shape[1]
        rest = held.keys[:, known * sizes.kernel_stride : held.count]
        fresh = windows.compress_keys(rest, sizes.kernel_size, sizes.kernel_stride)
        self._means = fresh if self._means is None else torch.cat((self._means, fresh), 1)
        if self._how == "forecast":
            assert held.forecast is not None, "the network has a Forecast"
            scores = windows.forecast_scores(held.forecast[:, None], self._means)
        else:
            scores = windows.query_scores(
                query.flatten(0, 1)[:, None], self._means, torch.tensor([position]),
                kernel_size=sizes.kernel_size, kernel_stride=sizes.kernel_stride, scale=held.scale,
            )  # fmt: skip
        return windows.block_scores(scores, sizes.num_blocks(held.count), sizes.windows_per_block)[
            :, 0
        ]


# --- pairs --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scheme:
    """One arm.

    Attributes:
        count: Prompt tokens that stay, of the prompt's length; None: all.
        keep: Chooses them.
        read: Makes what chooses the tokens that a step reads, of the prompt's length; None: all.
        skip: First layers that read everything they hold.
    """

    count: Callable[[int], int | None] = field(default=lambda _: None)
    keep: Callable[[Layer, int], Tensor] | None = None
    read: Callable[[int], Callable[[Tensor, Held], Tensor | None]] | None = None
    skip: int = 0

    def leaves_out(self, tokens: int, generated: int) -> bool:
        """Whether it evicts or does not read some token; else its reply is the dense one.

        Args:
            tokens: Length of the prompt.
            generated: Most tokens of the reply.
        """
        kept = self.count(tokens)
        if kept is not None and kept < tokens:
            return True
        most = getattr(self.read(tokens), "most", None) if self.read else None
        return most is not None and tokens + generated - 1 > most
