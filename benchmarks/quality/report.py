# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What the judge found: means, intervals, and differences from dense on the same questions."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks import tables

RESAMPLES = 20_000


def interval(values: list[float], level: float = 0.9) -> tuple[float, float]:
    """Bootstrap interval of a mean."""
    rng = np.random.default_rng(0)
    sample = np.asarray(values)
    means = rng.choice(sample, (RESAMPLES, len(sample))).mean(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def differences(of: dict[str, Any], base: dict[str, Any]) -> list[float]:
    """Scores minus those of the baseline, of the questions that both have answered."""
    return [each["score"] - base[key]["score"] for key, each in of.items() if key in base]


def render(result: dict[str, Any]) -> str:
    """A table for each context: a line per arm, a column per task, and their mean.

    A star stands behind scores of an arm that read everything, as dense does.
    """
    every = result["arms"]
    baseline = next(iter(every))
    contexts = sorted({key for cells in every.values() for key in cells if key.isdigit()}, key=int)
    return "\n\n".join(_context(every, baseline, context) for context in contexts)


def mark(answers: dict[str, Any]) -> str:
    """What stands behind the score of an arm that read everything in these questions."""
    return "*" if answers and all(each.get("read_everything") for each in answers.values()) else ""


def _context(every: dict[str, Any], baseline: str, context: str) -> str:
    base = every[baseline].get(context, {})
    rows = []
    for name, cells in every.items():
        found = cells.get(context, {})
        if not found:
            continue
        row: dict[str, Any] = {"arm": name}
        means, apart = [], []
        for task, answers in found.items():
            scores = [each["score"] for each in answers.values()]
            fewer = len(answers) != len(base.get(task, answers))
            row[task] = f"{np.mean(scores):.2f}" + (f" ({len(answers)})" if fewer else "")
            row[task] += "" if name == baseline else mark(answers)
            means.append(np.mean(scores))
            if task in base:
                apart.append(differences(answers, base[task]))
        if set(found) == set(base):  # else it would be the mean of other tasks
            row["mean"] = f"{np.mean(means):.3f}"
            if name != baseline and apart and all(apart):
                row["lost"] = lost(apart)
        rows.append(row)
    tasks = list(dict.fromkeys(task for cells in every.values() for task in cells.get(context, {})))
    counts = {task: len(base.get(task, {})) for task in tasks}
    columns = {
        "arm": "arm",
        **{f"{task} ({counts[task]})": task for task in tasks},
        "mean": "mean",
        "to dense, points (90 %)": "lost",
    }
    parts = [f"**{context} tokens**", tables.table(rows, columns)]
    others = {name: cells[context] for name, cells in every.items() if context in cells}
    others.pop(baseline, None)
    if others and base:
        parts += ["To dense by task, points (90 %):", by_task(others, base)]
    return "\n\n".join(parts)


def by_task(arms: dict[str, dict[str, Any]], base: dict[str, Any]) -> str:
    """A line per arm: points above or below dense in each task, with an interval of its own.

    Args:
        arms: Answers by task, by what a line is called.
        base: Dense answers by task.
    """

    def points_lost(name: str, task: str) -> str:
        points = [100 * each for each in differences(arms[name][task], base[task])]
        if not any(points):  # or nothing that both have answered
            return f"0{mark(arms[name][task])}" if points else ""
        low, high = (round(bound) for bound in interval(points))
        return f"{round(float(np.mean(points))):+d} ({low:+d} to {high:+d})"

    columns: dict[str, Any] = {"arm": lambda name: name}
    for task, answers in base.items():
        columns[f"{task} ({len(answers)})"] = lambda name, task=task: points_lost(name, task)
    return tables.table(arms, columns)


def lost_points(of_tasks: list[list[float]]) -> tuple[float, float, float]:
    """Mean over tasks of the mean difference, in points, and its 90 % interval.

    Args:
        of_tasks: See :func:`differences`; resampled within each task, in an order that is theirs
            alone, so that the interval is the same in whatever order they were asked.
    """
    of_tasks = sorted(map(sorted, of_tasks))
    rng = np.random.default_rng(0)
    means = np.mean(
        [rng.choice(np.asarray(each), (RESAMPLES, len(each))).mean(1) for each in of_tasks], 0
    )
    low, high = 100 * np.quantile(means, [0.05, 0.95])
    return 100 * float(np.mean([np.mean(each) for each in of_tasks])), float(low), float(high)


def lost(of_tasks: list[list[float]]) -> str:
    """What :func:`lost_points` finds, in words; no interval where no score differs."""
    if not any(map(any, of_tasks)):  # resampling zeros would promise a certainty that n cannot
        return f"no difference in {sum(map(len, of_tasks))}"
    centre, low, high = (round(value, 1) + 0.0 for value in lost_points(of_tasks))  # no -0.0
    return f"{centre:+.1f} ({low:+.1f} to {high:+.1f})"
