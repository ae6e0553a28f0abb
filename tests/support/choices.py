# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Choices of blocks that SPARDA could make, at random."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from vllm_sparse.kernels.types import Ranking

if TYPE_CHECKING:
    import random


def any_choice(choice: random.Random, own: int, count: int) -> list[int]:
    """What a token of block ``own`` could read, of ``count`` blocks with one at either end."""
    if own < count:
        return list(range(own + 1))
    return sorted({0, own - 1, own, *choice.sample(range(1, own - 1), count - 3)})


class AnySelector:
    """Any scores: what is read is chosen elsewhere."""

    ranking = Ranking(False)

    def __init__(self, ahead: bool, heads: int, dim: int) -> None:
        self.ahead, self._shape = ahead, (heads, dim)

    def vectors(self, layer, tokens, query):
        return torch.zeros(len(tokens.index), *self._shape)

    def unrotated(self, *_):
        raise NotImplementedError

    def begin(self, *_) -> None:
        pass

    def keeping(self, *_) -> None:
        pass

    def record(self, *_) -> None:
        pass
