# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Answers against dense, from the laboratory's replies."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.pictures.picture import Picture, Series, machine
from benchmarks.published import result
from benchmarks.quality.pages import CONTEXT, FILE, scored, short
from benchmarks.quality.report import differences, lost_points

if TYPE_CHECKING:
    from collections.abc import Iterable

FEWEST = 10  # questions of a task; fewer mislead
BUDGETS = (256, 512, 1024, 2048)
OTHERS = {"QUEST": "quest-512", "SNAPKV": "snapkv-512", "STREAMINGLLM": "streamingllm-512"}


def compared(
    names: Iterable[str],
) -> tuple[dict[str, tuple[float, ...]], dict[str, int]]:
    """Points above dense and the 90 % interval of each arm, and questions of each task.

    Of questions that all arms have answered; tasks with few of them are left out.
    """
    found = scored(("dense", *names))
    dense = found.pop("dense")
    counts = {task: len(cells) for task, cells in dense.items() if len(cells) >= FEWEST}
    lost = {
        name: lost_points([differences(arm[task], dense[task]) for task in counts])
        for name, arm in found.items()
    }
    return {name: tuple(round(n, 3) for n in points) for name, points in lost.items()}, counts


def prompts(counts: Iterable[str]) -> str:
    """The model, and how long its prompts are.

    Args:
        counts: The tasks that are shown.
    """
    fewer = ", ".join(sorted(short(FILE, CONTEXT) & set(counts)))
    return f"Qwen2.5-Coder-0.5B, 4K prompts ({fewer}: 2 to 3K)"


def policies() -> Picture:
    """Policies and exact top-k against dense, on the questions that all of them answered."""
    lines = {"ROCKETKV": "window16", "exact top-k": "exact"}
    there = result(FILE)["arms"]
    arms = {
        name: {n: f"{kind}-{n}" for n in BUDGETS if f"{kind}-{n}" in there}
        for name, kind in lines.items()
    }
    every = [arm for found in arms.values() for arm in found.values()]
    lost, counts = compared([*every, *OTHERS.values()])
    series = [
        Series(name, tuple((n, lost[arm][0]) for n, arm in found.items()))
        for name, found in arms.items()
    ]
    dots = [Series(name, ((512, lost[arm][0]),), role="dot") for name, arm in OTHERS.items()]
    name, (_, least, greatest) = min(
        ((n, lost[arm]) for n, arm in arms["ROCKETKV"].items()), key=lambda each: each[1]
    )
    stand = ", ".join(f"{dot.name} {dot.points[0][1]:+.0f}" for dot in dots)
    return Picture(
        "quality-policies",
        f"With its worst budget, {name}, ROCKETKV is {least:+.1f} to {greatest:+.1f} points from "
        f"dense (90 %); at 512 {stand}",
        f"{prompts(counts)}; tasks {', '.join(counts)}; {min(counts.values())} "
        f"questions of each, the same for all. {machine(FILE)}",
        "tokens a decode step reads (SNAPKV: keeps)",
        "points above or below dense",
        (Series("dense", ((BUDGETS[0], 0.0), (BUDGETS[-1], 0.0)), role="reference"),
         *series, *dots),
        (FILE,),
        ticks=BUDGETS,
    )  # fmt: skip


def windows() -> Picture:
    """The default window against the paper's, on all tasks."""
    budgets = BUDGETS[:3]
    kinds = {"window 16 (default)": "window16", "window 32 (paper)": "paper"}
    lost, counts = compared(f"{kind}-{n}" for n in budgets for kind in kinds.values())
    series = []
    for name, kind in kinds.items():
        values = {n: lost[f"{kind}-{n}"] for n in budgets}
        points = tuple((n, centre) for n, (centre, _, _) in values.items())
        series.append(Series(name, points, tuple((low, high) for _, low, high in values.values())))
    own, paper = ([y for _, y in each.points] for each in series)
    return Picture(
        "quality-budget",
        f"A budget of 1,024 tokens is {own[-1]:+.1f} points from dense, one of 256 {own[0]:+.1f}; "
        f"the paper's wider window {paper[-1]:+.1f} and {paper[0]:+.1f}",
        f"{prompts(counts)}, mean of {len(counts)} tasks, {sum(counts.values())} "
        f"questions; bars: 90 % intervals, resampled within tasks. {machine(FILE)}",
        "token_budget of ROCKETKV",
        "points above or below dense",
        (Series("dense", ((budgets[0], 0.0), (budgets[-1], 0.0)), role="reference"), *series),
        (FILE,),
        ticks=budgets,
    )
