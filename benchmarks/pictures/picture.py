# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What a picture shows."""

from __future__ import annotations

import hashlib
import json
from typing import NamedTuple

from benchmarks.published import result

K = 1024
MODELS = {"smollm2": "SmolLM2-135M", "qwen": "Qwen2.5-Coder-0.5B", "tiny": "random 2-layer model"}


class Series(NamedTuple):
    """One thing that is compared.

    Attributes:
        name: Written beside it.
        points: ``(x, y)``; of bars, x is the place of a category.
        spans: Intervals of y, if there are any.
        role: ``line``, ``reference`` (dashed), ``dot``, ``bar``, ``part`` of a stack, ``bound``.
        marks: What is written at each point, if anything.
    """

    name: str
    points: tuple[tuple[float, float], ...]
    spans: tuple[tuple[float, float], ...] = ()
    role: str = "line"
    marks: tuple[str, ...] = ()


class Picture(NamedTuple):
    """One picture.

    Attributes:
        name: Of the file.
        title: Its message.
        note: Model, method and machine.
        x: Label of the axis, with its unit.
        y: The same.
        series: What is shown.
        files: Result files that it is derived from.
        categories: Of bars, from the top.
        ticks: Of the x axis, where it is a logarithm.
        shown: Format of a bar's number.
    """

    name: str
    title: str
    note: str
    x: str
    y: str
    series: tuple[Series, ...]
    files: tuple[str, ...]
    categories: tuple[str, ...] = ()
    ticks: tuple[int, ...] = ()
    shown: str = "{:.0f}"

    @property
    def digest(self) -> str:
        """Of all that is shown: another picture has another one."""
        return hashlib.sha256(json.dumps(self, default=float).encode()).hexdigest()


def machine(*files: str) -> str:
    """Where and when: processors, cores, days."""
    found: dict[str, set[str]] = {}
    for env in (result(file)["environment"] for file in files):
        cores = f"{env['cores']} core{'s' if env['cores'] > 1 else ''}"
        found.setdefault(f"{env['cpu']}, {cores}", set()).add(env["date"][:10])
    return "; ".join(f"{cpu}, {' and '.join(sorted(days))}" for cpu, days in found.items()) + "."
