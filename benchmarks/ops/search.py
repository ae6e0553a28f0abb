# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Coordinate descent from a launch of a kernel to a faster one.

Block, warps and stages are doubled, halved or changed by one for as long as that helps. What counts
is the geometric mean over shapes, so that no shape is paid for by another.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vllm_sparse.kernels.triton.launch import Launch

    Seconds = tuple[float, ...]

MOST_CANDIDATES = 8
NOISE = 0.03  # a candidate must be faster by more
BLOCKS, WARPS, STAGES = (16, 8192), (1, 16), (1, 7)


class Found(NamedTuple):
    """The fastest launch, and each shape's time by launch in the order of trial.

    A launch that cannot be used has ``None``; `cut` says whether time ran out.
    """

    best: Launch
    times: dict[Launch, Seconds | None]
    cut: bool


def search(
    default: Launch,
    measure: Callable[[Launch], Seconds | None],
    valid: Callable[[Launch], bool] = lambda candidate: True,
    fits: Callable[[Launch], bool] = lambda candidate: True,
    has_time: Callable[[], bool] = lambda: True,
) -> Found:
    """Descends from a launch.

    Args:
        default: Where to start.
        measure: Seconds of each shape with a launch; ``None`` if it cannot be used.
        valid: Whether a launch may be tried.
        fits: Whether a faster launch can be used for everything that is not measured.
        has_time: Whether another one may be measured.
    """
    best, times = default, {default: measure(default)}
    moved = True
    while moved:
        moved = False
        for move in _moves(default):
            while (candidate := move(best)) not in times:
                if not is_sane(candidate) or not valid(candidate):
                    break
                if len(times) > MOST_CANDIDATES:
                    return Found(best, times, False)
                if not has_time():
                    return Found(best, times, True)
                times[candidate] = measure(candidate)
                if not _cost(times[candidate]) < (1 - NOISE) * _cost(times[best]):
                    break
                if not fits(candidate):
                    times[candidate] = None
                    break
                best, moved = candidate, True
    return Found(best, times, False)


def _moves(default: Launch) -> Iterator[Callable[[Launch], Launch]]:
    yield lambda at: at._replace(block=2 * at.block)
    yield lambda at: at._replace(block=at.block // 2)
    yield lambda at: at._replace(num_warps=2 * at.num_warps)
    yield lambda at: at._replace(num_warps=at.num_warps // 2)
    if default.num_stages > 1:  # otherwise the kernel has no loop to pipeline
        # Loops that gather have half as many buffers as stages, and 5 of them in the table.
        step = 1 if default.num_stages < 5 else 2
        yield lambda at: at._replace(num_stages=at.num_stages + step)
        yield lambda at: at._replace(num_stages=at.num_stages - step)


def is_sane(candidate: Launch) -> bool:
    """Whether a launch is within what makes sense to try."""
    limits = zip(candidate, (BLOCKS, WARPS, STAGES), strict=True)
    return all(least <= value <= most for value, (least, most) in limits)


def _cost(seconds: Seconds | None) -> float:
    return float("inf") if seconds is None else statistics.geometric_mean(seconds)
