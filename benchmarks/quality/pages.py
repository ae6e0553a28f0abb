# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The tables of docs/quality.md, from the laboratory's replies.

All arms of a table are scored by the same questions: those that each of them has answered.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks import published
from benchmarks.quality import report
from benchmarks.tables import table

if TYPE_CHECKING:
    from collections.abc import Iterable

Cells = dict[str, Any]  # questions' answers by task
FILE, CONTEXT = "quality-lab", "4096"
SHORT = 0.9  # of a context: tasks whose questions have fewer tokens on average
TASKS = ("multivalue", "cwe", "table", "niah_multikey_3", "vt", "multiquery", "niah_multikey_2",
         "fwe")  # fmt: skip
BUDGETS = (256, 512, 1024)
WINDOWS = {
    "dense": "dense",
    **{f"{kind}-{n}": f"window {window}, t = {n}" for n in BUDGETS
       for kind, window in (("paper", 32), ("window16", 16))},
}  # fmt: skip
# Of stage 1, tried on few questions.
TRIED = {
    "dense": "dense",
    "paper-1024": "window 32 (the paper's)",
    "window16-1024": "window 16 (default)",
    "window128-1024": "window 128",
    "pool15-1024": "window 32, pool 15 wide, not 63",
    "idealvotes-1024": "votes of the answer's own queries (oracle)",
}
SPARDA = ("query", "previous", "forecast")
# Behind arms whose replies are older than commit 51d6025, which mended the laboratory's `previous`.
OLDER = "†"
EVERY = {
    "dense": "dense",
    "exact-256": "exact top-k, 256 tokens",
    "exact-1024": "exact top-k, 1,024 tokens",
    **{f"window16-{n}": f"ROCKETKV, t = {n}{' (default)' if n == 1024 else ''}"
       for n in (*BUDGETS, 2048)},
    "stage1-1024": "t = 1024, stage 1 only",
    "stage2-1024": "t = 1024, stage 2 only",
    **{f"paper-{n}": f"the paper's window: t = {n}" for n in BUDGETS},
    **{f"{name.lower()}-{n}": f"{name}, t = {n}" for name in ("QUEST", "SNAPKV") for n in BUDGETS},
    **{f"streamingllm-{n}": f"STREAMINGLLM, t = {n}" for n in BUDGETS[1:]},
    "exactblocks-16": "SPARDA, exact mass of blocks, 16",
    **{f"{name}-{n}": f"SPARDA, `{name}`, {n}{OLDER if name == 'previous' else ''}"
       for name in SPARDA for n in (16, 32)},
    "forecastunion-16": "SPARDA, `forecast`, 16, and what the step before chose",
}  # fmt: skip
_NAMES = {
    **EVERY,
    "snapkv-2048": "SNAPKV, t = 2048",
    "default-96": "SPARDA, `query`, 96",
    "previousdefault-96": f"SPARDA, `previous`, 96 (default){OLDER}",
    "page8-1024": "t = 1024, page size 8",
    "query-64": "SPARDA, `query`, 64",
    **{f"stride{n}-32": f"SPARDA, `query`, 32, `kernel_stride` {n}" for n in (8, 4, 2)},
}
TURNS = {
    name: _NAMES[name]
    for name in ("dense", "exact-1024", "window16-512", "window16-1024", "paper-1024",
                 "quest-1024", "snapkv-2048", "query-32", "forecast-32")
}  # fmt: skip
STRIDES = {
    name: _NAMES[name]
    for name in ("dense", "query-32", "stride8-32", "stride4-32", "stride2-32", "query-64")
}  # fmt: skip
LONGER = {
    name: _NAMES[name]
    for name in ("dense", "exact-1024", "window16-512", "window16-1024", "page8-1024", "query-32",
                 "forecast-32", "default-96")
}  # fmt: skip
# What the default chooses by, on the two tasks that few blocks lose most of.
DEFAULT = {name: _NAMES[name] for name in ("dense", "query-32", "default-96", "previousdefault-96")}
DEFAULT_TASKS = "multivalue", "niah_multikey_2"
# Of another model, and what it can do at all.
SECOND = {
    name: _NAMES[name]
    for name in ("dense", "exact-1024", *(f"window16-{n}" for n in (*BUDGETS, 2048)), "paper-1024",
                 "quest-512", "quest-1024", "snapkv-1024", "streamingllm-1024", "query-32")
}  # fmt: skip
SECOND_TASKS = "niah_single_1", "multivalue", "multiquery", "vt"
ATTENTION = {
    **{f"window16-{n}": EVERY[f"window16-{n}"] for n in BUDGETS},
    **{f"paper-{n}": EVERY[f"paper-{n}"] for n in (256, 1024)},
    **{f"idealvotes-{n}": f"t = {n}, votes of the answer's own queries" for n in (256, 1024)},
    "page1-1024": "t = 1024, page size 1",
    "page2-1024": "t = 1024, page size 2",
    "page8-1024": "t = 1024, page size 8",
    "moments-1024": "t = 1024, pages by mean and deviation",
    "meanpage2-1024": "t = 1024, pages of 2 by their mean",
    "exactpages-1024": "t = 1024, pages by their keys",
    **{f"exact-{n}": f"exact top-k, {n} tokens" for n in (128, 512)},
    "quest-512": EVERY["quest-512"],
    **{name: EVERY[name] for name in ("exactblocks-16", "query-16", "previous-16", "forecast-16",
                                      "query-32", "forecast-32")},
}  # fmt: skip
EARLY = 8  # layers, whose attention is spread most
GROUPS = {f"layers 1 to {EARLY}": slice(EARLY), "the others": slice(EARLY, None)}
BY_TASK = {
    name: EVERY[name]
    for name in ("dense", "exact-256", "exact-1024",
                 *(f"window16-{n}" for n in (*BUDGETS, 2048)), *(f"{name}-32" for name in SPARDA))
}  # fmt: skip


def scored(
    names: Iterable[str], file: str = FILE, context: str = CONTEXT, of: Iterable[str] = ()
) -> dict[str, dict[str, Cells]]:
    """Per arm and task, the answers to the questions that all these arms have answered.

    Args:
        names: The arms.
        file: Of the judge.
        context: One of its contexts.
        of: These tasks; empty: all.
    """
    arms = published.result(file)["arms"]
    found = {name: arms[name][context] for name in names}
    tasks = set.intersection(*(set(cells) for cells in found.values()))
    tasks &= set(of or tasks)
    shared = {}
    for task in sorted(tasks, key=lambda task: ((*TASKS, task).index(task), task)):
        keys = set.intersection(*(set(cells[task]) for cells in found.values()))
        shared[task] = sorted(keys, key=int)
    return {
        name: {task: {key: cells[task][key] for key in keys} for task, keys in shared.items()}
        for name, cells in found.items()
    }


def lengths(file: str, context: str) -> dict[str, list[int]]:
    """Tokens of each task's questions, of those tasks that a file has at a context.

    Args:
        file: Of the judge.
        context: One of its contexts.
    """
    asked = published.result(file).get("questions", {}).get(context, {})
    return {
        task: [each["prompt_tokens"] for each in of_task.values()]
        for task, of_task in asked.items()
    }


def short(file: str, context: str) -> set[str]:
    """Tasks whose questions fill less than `SHORT` of their context.

    Args:
        file: Of the judge.
        context: One of its contexts.
    """
    return {
        task
        for task, tokens in lengths(file, context).items()
        if np.mean(tokens) < SHORT * int(context)
    }


def _mean(answers: Cells) -> float:
    return float(np.mean([each["score"] for each in answers.values()]))


def _paired(of: dict[str, Cells], base: dict[str, Cells], tasks: list[str]) -> str:
    return report.lost([report.differences(of[task], base[task]) for task in tasks])


def scores(
    names: dict[str, str], file: str = FILE, context: str = CONTEXT, of: Iterable[str] = ()
) -> str:
    """A line per arm: means of tasks, their mean, and the difference from dense.

    Behind a score that an arm has by reading everything there is a star. Where some tasks are
    shorter than the context, the difference is shown without them, too.

    Args:
        names: What arms are called.
        file: Of the judge.
        context: One of its contexts.
        of: These tasks; empty: all.
    """
    found = scored(names, file, context, of)
    dense = found["dense"]
    columns: dict[str, Any] = {"arm": lambda name: names[name]}
    for task, answers in dense.items():
        columns[f"{task} ({len(answers)})"] = lambda name, task=task: (
            f"{_mean(found[name][task]):.2f}".removeprefix("0")
            + ("" if name == "dense" else report.mark(found[name][task]))
        )
    columns["mean"] = lambda name: (
        f"{np.mean([_mean(each) for each in found[name].values()]):.3f}".removeprefix("0")
    )
    full = [task for task in dense if task not in short(file, context)]
    compared = {"to dense, points (90 %)": list(dense)}
    if 0 < len(full) < len(dense):
        compared[f"tasks of full length ({len(full)})"] = full
    for head, tasks in compared.items():
        columns[head] = lambda name, tasks=tasks: (
            None if name == "dense" else _paired(found[name], dense, tasks)
        )
    return table(names, columns)


def sizes() -> str:
    """Tokens of each task's questions; of short tasks in bold."""
    rows = {
        (model, context): lengths(file, context)
        for model, file, context in (
            ("Qwen2.5-Coder-0.5B", FILE, "4096"),
            ("Qwen2.5-Coder-0.5B", "quality-8k", "8192"),
            ("SmolLM2-135M", "quality-smollm2", "4096"),
        )
    }

    def shown(row: tuple[str, str], task: str) -> str:
        tokens = rows[row][task]
        text = f"{min(tokens):,} to {max(tokens):,}"
        return f"**{text}**" if np.mean(tokens) < SHORT * int(row[1]) else text

    columns: dict[str, Any] = {
        "model": lambda row: row[0],
        "context": lambda row: f"{int(row[1]):,}",
    }
    for task in (*TASKS, "niah_single_1"):
        columns[task] = lambda row, task=task: shown(row, task)
    return table(rows, columns)


def pairs() -> str:
    """One arm minus another, in points: what a smaller budget costs, and stage 2's estimates."""
    longer, shorter = scored(LONGER, "quality-8k", "8192"), scored(WINDOWS)
    rows = {
        "t = 512 minus t = 1024, 4K": (shorter, "window16-512", "window16-1024"),
        "t = 512 minus t = 1024, 8K": (longer, "window16-512", "window16-1024"),
        "t = 1024 minus exact top-k of 1,024 tokens, 8K": (longer, "window16-1024", "exact-1024"),
    }

    def minus(row: str) -> str:
        found, of, base = rows[row]
        return _paired(found[of], found[base], list(found[of]))

    return table(rows, {"": str, "points (90 %)": minus})


def windows() -> str:
    """The default window minus the paper's, in points."""
    found = scored(WINDOWS)
    tasks = list(found["dense"])

    def gain(n: int, of: list[str]) -> str:
        return _paired(found[f"window16-{n}"], found[f"paper-{n}"], of)

    return table(
        BUDGETS,
        {
            "t": lambda n: f"{n}{' (default)' if n == 1024 else ''}",
            f"all {len(tasks)} tasks": lambda n: gain(n, tasks),
            "without `table`": lambda n: gain(n, [task for task in tasks if task != "table"]),
        },
    )


def _attention(name: str, what: str, layers: slice, of: Iterable[str]) -> str:
    """Percent of the dense answers' attention, the mean over tasks."""
    cells = published.result("quality-attention")["arms"][name]["recall"][CONTEXT]
    each = [np.mean([answer[what][layers] for answer in cells[task]]) for task in of]
    return f"{100 * np.mean(each):.0f}"


def _attention_tasks() -> dict[str, int]:
    """How many answers of each task were looked at."""
    cells = published.result("quality-attention")["arms"]["dense"]["recall"][CONTEXT]
    return {task: len(answers) for task, answers in cells.items()}


def attention() -> str:
    """Percent of the dense answers' attention that arms keep and read, means over tasks."""
    tasks = _attention_tasks()
    columns: dict[str, Any] = {"arm": ATTENTION.__getitem__}
    for what in ("kept", "read"):
        for which, layers in GROUPS.items():
            columns[f"{what}: {which}"] = lambda name, what=what, layers=layers: _attention(
                name, what, layers, tasks
            )
    return table(ATTENTION, columns)


def attention_by_task() -> str:
    """As :func:`attention`, of each task: the first layers, a slash, the others."""

    def both(name: str, what: str, task: str) -> str:
        return " / ".join(_attention(name, what, layers, [task]) for layers in GROUPS.values())

    columns: dict[str, Any] = {"arm": ATTENTION.__getitem__}
    for task, answers in _attention_tasks().items():
        for what in ("kept", "read"):
            columns[f"{task} ({answers}): {what}"] = lambda name, what=what, task=task: both(
                name, what, task
            )
    return table(ATTENTION, columns)


def by_task(names: dict[str, str], file: str = FILE, context: str = CONTEXT) -> str:
    """Points above or below dense in each task, with an interval of its own.

    Args:
        names: What arms are called.
        file: Of the judge.
        context: One of its contexts.
    """
    found = scored(names, file, context)
    return report.by_task(
        {told: found[name] for name, told in names.items() if name != "dense"}, found["dense"]
    )


TABLES = {
    "quality-lengths": sizes,
    "quality-windows": lambda: scores(WINDOWS),
    "quality-gains": windows,
    "quality-tried": lambda: scores(TRIED),
    "quality-every": lambda: scores(EVERY),
    "quality-by-task": lambda: by_task(BY_TASK),
    "quality-attention": attention,
    "quality-attention-by-task": attention_by_task,
    "quality-longer": lambda: scores(LONGER, "quality-8k", "8192"),
    "quality-longer-by-task": lambda: by_task(LONGER, "quality-8k", "8192"),
    "quality-pairs": pairs,
    "quality-default": lambda: scores(DEFAULT, "quality-8k", "8192", DEFAULT_TASKS),
    "quality-second": lambda: scores(SECOND, "quality-smollm2", CONTEXT, SECOND_TASKS),
    "quality-turns": lambda: scores(TURNS, "quality-turns", "8192"),
    "quality-strides": lambda: scores(STRIDES, "quality-strides", "8192"),
}
