# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The search for launches: how it descends."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("triton")
from vllm_sparse.kernels.triton.launch import Launch

from benchmarks.ops import search


def found_with(best: Launch, default: Launch, **options) -> search.Found:
    """Searches where every factor of two, or stage, away from the best costs as much again."""

    def measure(candidate: Launch) -> tuple[float, ...]:
        away = sum(abs(math.log2(at / to)) for at, to in zip(candidate, best, strict=True))
        return 1.0 + away, 3.0 + 3.0 * away

    return search.search(default, measure, **options)


@pytest.mark.parametrize(
    "best", [Launch(128, 4, 3), Launch(32, 8, 2), Launch(64, 2, 1), Launch(64, 4, 2)]
)
def test_the_search_finds_the_best(best):
    found = found_with(best, Launch(64, 4, 2))
    assert found.best == best
    assert len(found.times) <= 1 + search.MOST_CANDIDATES
    assert not found.cut


def test_the_search_comes_back_to_what_did_not_help_before():
    """A larger tile is only faster with more warps, which are tried after it."""

    def measure(candidate):
        return (
            4 * abs(candidate.num_warps - 8) + abs(candidate.block / candidate.num_warps - 16) + 1,
        )

    assert search.search(Launch(64, 4, 1), measure).best == Launch(128, 8, 1)


def test_the_search_stops_at_its_bound():
    found = found_with(Launch(8192, 16, 5), Launch(16, 1, 2))
    assert len(found.times) == 1 + search.MOST_CANDIDATES
    assert found.best == Launch(4096, 1, 2)
    assert not found.cut


def test_the_search_stays_within_what_makes_sense():
    found = found_with(Launch(1, 64, 9), Launch(16, 16, 7))
    assert found.best == Launch(16, 16, 7)
    assert all(search.is_sane(candidate) for candidate in found.times)
    assert len(found.times) > 2
    assert {stages for _, _, stages in found_with(Launch(64, 4, 3), Launch(64, 4, 1)).times} == {1}


def test_the_search_only_tries_what_is_valid():
    tried = found_with(
        Launch(32, 16, 1), Launch(256, 4, 1), valid=lambda at: at.block >= 32 * at.num_warps
    ).times
    assert {Launch(128, 4, 1), Launch(256, 8, 1)} & set(tried)
    assert all(at.block >= 32 * at.num_warps for at in tried)


def test_loops_that_gather_take_two_stages_per_buffer():
    assert found_with(Launch(64, 4, 7), Launch(64, 4, 5)).best == Launch(64, 4, 7)
    assert {at.num_stages for at in found_with(Launch(64, 4, 3), Launch(64, 4, 5)).times} == {
        *(1, 3, 5, 7),
    }


def test_the_search_does_not_follow_noise():
    def measure(gain):
        return lambda candidate: (1.0,) if candidate == default else (1.0 - gain,)

    default = Launch(64, 4, 1)
    assert search.search(default, measure(0.02)).best == default
    assert search.search(default, measure(0.04)).best == Launch(128, 4, 1)


def test_one_shape_is_not_paid_for_by_another():
    """The large one has all the time, and gets less than the small one loses."""

    def measure(candidate):
        return (1.0, 100.0) if candidate == default else (2.0, 60.0)

    default = Launch(64, 4, 1)
    assert search.search(default, measure).best == default


def test_the_search_survives_what_cannot_be_used():
    best, default = Launch(64, 8, 2), Launch(64, 4, 2)

    def measure(candidate):
        if candidate.block != 64 or candidate == default:
            return None
        return (1.0 + abs(candidate.num_warps - best.num_warps),)

    found = search.search(default, measure)
    assert found.best == best
    assert found.times[default] is None
    # Fast, but too large in float32.
    found = search.search(default, measure, fits=lambda candidate: candidate.num_warps < 8)
    assert found.best != best
    assert found.times[best] is None
    none = search.search(default, lambda candidate: None)
    assert none.best == default


def test_the_search_ends_with_its_time():
    left = iter([True, True, False])
    found = found_with(Launch(8192, 4, 2), Launch(64, 4, 2), has_time=lambda: next(left))
    assert found.cut
    assert found.best == Launch(256, 4, 2)
