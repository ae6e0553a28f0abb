# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What each selector compares compressed keys with, token by token."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support.policies import tensors
from vllm_sparse.kernels.dispatch import implementation

from vllm_sparse.policies.selectors import (
    ForecastSelector,
    PreviousSelector,
    QuerySelector,
    Tokens,
)

LAYERS, BLOCKS, SIZE, HEADS, KV_HEADS, DIM = 3, 5, 4, 4, 2, 8


class Tap:
    """Records what layers project ahead; a rotation adds the position, to be told from none."""

    def __init__(self, layer: int) -> None:
        (self.values,) = tensors(layer, (6, 2, KV_HEADS, DIM))

    def rotate(self, positions, values):
        return values + positions[:, None, None]


def tokens_of(index, positions, blocks=None, here=None) -> Tokens:
    none = torch.full((len(index),), -1)
    return Tokens(
        torch.tensor(index),
        torch.tensor(positions),
        none if blocks is None else torch.tensor(blocks),
        none if here is None else torch.tensor(here),
    )


@pytest.mark.parametrize("layer", range(LAYERS))
def test_a_forecast_is_what_the_layer_before_recorded(layer):
    """Layer 0 has none before it: its own tap's first part is its own, the second layer 1's."""
    taps = [Tap(layer) for layer in range(LAYERS - 1)]
    selector = ForecastSelector(taps)
    tokens = tokens_of([4, 0, 2], [40, 7, 9])
    tap, part = [(taps[0], 0), (taps[0], 1), (taps[1], 0)][layer]
    expected = torch.stack([tap.values[i, part] for i in (4, 0, 2)])
    assert selector.unrotated(layer, 3, tokens.index).equal(expected)
    turned = torch.stack([x + p for x, p in zip(expected, (40, 7, 9), strict=True)])
    assert selector.vectors(layer, tokens, None).equal(turned)
    assert selector.unrotated(layer, 2, None).equal(tap.values[:2, part])
    assert selector.ahead


def test_queries_are_the_layer_s_own():
    (query,) = tensors(1, (5, HEADS, DIM))
    selector = QuerySelector(0.25)
    assert selector.vectors(1, tokens_of([3, 1], [8, 9]), query).equal(query[[3, 1]])
    assert not selector.ahead


def test_previous_follows_each_request_through_its_blocks():
    """Requests of three and of two tokens, in one step and then in steps of one token.

    The second is brought up again in other rows, as after it was reordered. What a step of single
    tokens has found stays what it is while it keeps its own.
    """
    kernels = (implementation("reference", name) for name in ("record_queries", "recall_queries"))
    kept = torch.full((LAYERS, BLOCKS, HEADS, DIM), torch.nan)
    selector = PreviousSelector(0.25, kept, SIZE, *kernels)
    layer, (first, second) = 1, tensors(2, (5, HEADS, DIM), (2, HEADS, DIM))
    # Tokens 3 to 5 of the first, in blocks 2 and 4; 0 and 1 of the second, in block 1.
    slots = torch.tensor([2 * SIZE + 3, 4 * SIZE, 4 * SIZE + 1, SIZE, SIZE + 1])
    last = torch.tensor([0, 2, 4])
    before = tokens_of([1, 2, 4], [4, 5, 1], [2, 4, 1], [0, 1, 3])
    assert selector.vectors(layer, before, first).equal(first[[0, 1, 3]])
    selector.record(layer, first, slots, last)
    assert kept[layer, [2, 4, 1]].equal(first[[0, 2, 4]])
    assert bool(kept[[0, 2]].isnan().all()), "another layer's"
    swapped = tokens_of([0, 1], [2, 6], [1, 4])
    assert selector.vectors(layer, swapped, None).equal(first[[4, 2]])
    selector.begin(swapped)
    keeps = selector.keeping(layer, second)
    assert keeps.query is second
    assert keeps.recent is None, "there is no device of its own"
    assert keeps.kept.data_ptr() == kept[layer].data_ptr()
    keeps.kept[[1, 4]] = second
    assert selector.vectors(layer, swapped, second).equal(first[[4, 2]])
    selector.begin(None)
    assert selector.vectors(layer, swapped, None).equal(second)
    assert selector.ranking.lag == 1


def test_previous_finds_recent_queries_on_the_device():
    kernels = (implementation("reference", name) for name in ("record_queries", "recall_queries"))
    kept, recent = tensors(3, (LAYERS, BLOCKS, HEADS, DIM), (LAYERS, 3, HEADS, DIM))
    selector = PreviousSelector(0.25, kept, SIZE, *kernels, recent)
    tokens = dataclasses.replace(
        tokens_of([0, 1], [2, 6], [1, 4]), previous_rows=torch.tensor([2, -1])
    )
    selector.begin(tokens)
    expected = torch.stack([recent[:, 2], kept[:, 4]], 1)
    for layer in range(LAYERS):
        keeps = selector.keeping(layer, recent[layer])
        keeps.recent.fill_(torch.nan)
        assert selector.vectors(layer, tokens, None).equal(expected[layer])
    assert bool(recent.isnan().all())
