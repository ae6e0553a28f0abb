# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Whether two answers to one prompt are the same, up to the order of float32 sums."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

# What batching, chunking and cached prefixes may change of a log-probability.
TOLERANCE = 1e-3


class Difference(NamedTuple):
    """Where two answers part.

    Attributes:
        at: Tokens before it.
        tie: Both tokens were as likely, so that rounding chose; log-probabilities agree.
        gap: Between the two log-probabilities there.
    """

    at: int
    tie: bool
    gap: float


def difference(
    tokens: Sequence[int],
    logprobs: Sequence[float],
    other_tokens: Sequence[int],
    other_logprobs: Sequence[float],
) -> Difference | None:
    """Compares as far as both answers go.

    Two greedy answers may part where two tokens are equally likely. Then each side's own best token
    has the same log-probability. A wrong key or block moves these, mostly long before it changes a
    token; so they are compared at every token.

    Returns:
        The first difference, or `None`.
    """
    pairs = zip(tokens, logprobs, other_tokens, other_logprobs, strict=False)
    for at, (token, logprob, other, other_logprob) in enumerate(pairs):
        gap = abs(logprob - other_logprob)
        if token != other or not gap <= TOLERANCE:  # NaN differs from everything
            return Difference(at, gap <= TOLERANCE, gap)
    return None
