# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What counts as the same answer."""

from __future__ import annotations

import math

from benchmarks.soak import judge

TOKENS, LOGPROBS = [5, 6, 7], [-1.0, -2.0, -3.0]


def test_the_same_and_a_part_of_it():
    assert judge.difference(TOKENS, LOGPROBS, TOKENS, [x + 1e-4 for x in LOGPROBS]) is None
    assert judge.difference(TOKENS[:2], LOGPROBS[:2], TOKENS, LOGPROBS) is None
    assert judge.difference([], [], TOKENS, LOGPROBS) is None


def test_another_token_is_a_tie_only_if_it_was_as_likely():
    tie = judge.difference(TOKENS, LOGPROBS, [5, 9, 9], [-1.0, -2.0001, -9.0])
    assert (tie.at, tie.tie) == (1, True)
    other = judge.difference(TOKENS, LOGPROBS, [5, 9, 9], [-1.0, -2.2, -9.0])
    assert (other.at, other.tie) == (1, False)


def test_the_same_tokens_with_other_probabilities_differ():
    found = judge.difference(TOKENS, LOGPROBS, TOKENS, [-1.0, -2.1, -3.0])
    assert (found.at, found.tie) == (1, False)
    found = judge.difference(TOKENS, LOGPROBS, TOKENS, [math.nan, -2.0, -3.0])
    assert (found.at, found.tie) == (0, False)
