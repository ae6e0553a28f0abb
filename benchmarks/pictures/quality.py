# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Answers against dense, from the laboratory's replies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks.pictures.picture import Picture, Series, machine
from benchmarks.published import result
from benchmarks.quality.report import differences, lost_points

if TYPE_CHECKING:
    from collections.abc import Iterable

    Cells = dict[str, Any]

CONTEXT = "4096"
FEWEST = 10  # questions of a task; fewer mislead
BUDGETS = (256, 512, 1024, 2048)
OTHERS = {"QUEST": "quest-512", "SNAPKV": "snapkv-512", "STREAMINGLLM": "streamingllm-512"}


def common(arms: Iterable[Cells]) -> dict[str, list[str]]:
    """Questions that all arms have answered, by task; tasks with few of them are left out."""
    every = [arm[CONTEXT] for arm in arms]
    tasks = sorted(set.intersection(*(set(found) for found in every)))
    shared = {task: set.intersection(*(set(found[task]) for found in every)) for task in tasks}
    return {task: sorted(keys) for task, keys in shared.items() if len(keys) >= FEWEST}


def lost(arm: Cells, dense: Cells, questions: dict[str, list[str]]) -> tuple[float, ...]:
    """Points above dense, and the 90 % interval."""
    found, base = arm[CONTEXT], dense[CONTEXT]
    of_tasks = [
        differences({key: found[task][key] for key in keys}, base[task])
        for task, keys in questions.items()
    ]
    return tuple(round(value, 3) for value in lost_points(of_tasks))


def policies() -> Picture:
    """Policies and exact top-k against dense, on the questions that all of them answered."""
    arms = result("quality-lab")["arms"]
    rocket = {n: arms[f"window16-{n}"] for n in BUDGETS if f"window16-{n}" in arms}
    exact = {n: arms[f"exact-{n}"] for n in BUDGETS if f"exact-{n}" in arms}
    others = {name: arms[arm] for name, arm in OTHERS.items()}
    dense = arms["dense"]
    questions = common([dense, *rocket.values(), *exact.values(), *others.values()])

    def at(arm: dict[str, Any]) -> float:
        return lost(arm, dense, questions)[0]

    lines = {
        name: Series(name, tuple((n, at(arm)) for n, arm in found.items()))
        for name, found in (("ROCKETKV", rocket), ("exact top-k", exact))
    }
    dots = [Series(name, ((512, at(arm)),), role="dot") for name, arm in others.items()]
    name, (_, least, greatest) = min(
        ((n, lost(arm, dense, questions)) for n, arm in rocket.items()), key=lambda each: each[1]
    )
    stand = ", ".join(f"{dot.name} {dot.points[0][1]:+.0f}" for dot in dots)
    count = min(len(keys) for keys in questions.values())
    return Picture(
        "quality-policies",
        f"With its worst budget, {name}, ROCKETKV is {least:+.1f} to {greatest:+.1f} points from "
        f"dense (90 %); at 512 {stand}",
        f"Qwen2.5-Coder-0.5B, 4K prompts; tasks {', '.join(questions)}; {count} questions of each, "
        f"the same for all. {machine('quality-lab')}",
        "tokens a decode step reads (SNAPKV: keeps)",
        "points above or below dense",
        (Series("dense", ((BUDGETS[0], 0.0), (BUDGETS[-1], 0.0)), role="reference"),
         *lines.values(), *dots),
        ("quality-lab",),
        ticks=BUDGETS,
    )  # fmt: skip


def windows() -> Picture:
    """The default window against the paper's, on all tasks."""
    arms = result("quality-lab")["arms"]
    dense, budgets = arms["dense"], BUDGETS[:3]
    kinds = {"window 16 (default)": "window16", "window 32 (paper)": "paper"}
    chosen = {name: [arms[f"{kind}-{n}"] for n in budgets] for name, kind in kinds.items()}
    questions = common([dense, *(arm for found in chosen.values() for arm in found)])
    series = []
    for name, found in chosen.items():
        values = [lost(arm, dense, questions) for arm in found]
        points = tuple((n, centre) for n, (centre, _, _) in zip(budgets, values, strict=True))
        spans = tuple((low, high) for _, low, high in values)
        series.append(Series(name, points, spans))
    own, paper = ([y for _, y in each.points] for each in series)
    count = sum(len(keys) for keys in questions.values())
    return Picture(
        "quality-budget",
        f"A budget of 1,024 tokens is {own[-1]:+.1f} points from dense, one of 256 {own[0]:+.1f}; "
        f"the paper's wider window {paper[-1]:+.1f} and {paper[0]:+.1f}",
        f"Qwen2.5-Coder-0.5B, 4K prompts, mean of {len(questions)} tasks, {count} questions; "
        f"bars: 90 % intervals, resampled within tasks. {machine('quality-lab')}",
        "token_budget of ROCKETKV",
        "points above or below dense",
        (Series("dense", ((budgets[0], 0.0), (budgets[-1], 0.0)), role="reference"), *series),
        ("quality-lab",),
        ticks=budgets,
    )
