# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Draws a picture as SVG: the same data make the same bytes."""

from __future__ import annotations

import io
import re
import textwrap
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("svg")

from matplotlib import pyplot
from matplotlib.ticker import FixedLocator, NullLocator

if TYPE_CHECKING:
    from benchmarks.pictures.picture import Picture, Series

# Okabe and Ito's colours, which the colour-blind can tell apart.
COLOURS = ("#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#0072B2", "#D55E00")
GREY, BLACK = "#767676", "#222222"
OWN = {  # the same in every picture
    "ROCKETKV": "#0072B2", "ROCKETKV, stage1 off": "#0072B2", "window 16 (default)": "#0072B2",
    "SPARDA": "#D55E00", "SPARDA, 32 blocks": "#D55E00", "a layer ahead": "#D55E00",
    "frames of a step": "#D55E00", "stock": GREY, "dense": BLACK, "KV blocks (stock)": GREY,
    "fetched when needed": GREY,
}  # fmt: skip
_STYLE = {
    "svg.hashsalt": "vllm-sparse", "svg.fonttype": "none", "font.family": "sans-serif",
    "font.size": 10, "text.color": BLACK, "axes.labelcolor": BLACK, "axes.edgecolor": GREY,
    "xtick.color": BLACK, "ytick.color": BLACK, "axes.spines.top": False,
    "axes.spines.right": False, "figure.facecolor": "white",
}  # fmt: skip
_APART = 0.055  # of the height, between names at the ends of lines


def svg(picture: Picture) -> str:
    """The picture, which says in its metadata what it is made of."""
    with matplotlib.rc_context(_STYLE):
        height = 1.9 + 0.42 * len(picture.categories) if picture.categories else 3.9
        figure, axes = pyplot.subplots(figsize=(7.6, height), layout="constrained")
        figure.suptitle(
            textwrap.fill(picture.title, 72), x=0.01, ha="left", fontsize=12, fontweight="bold"
        )
        if picture.categories:
            _bars(axes, picture)
        else:
            _lines(axes, picture)
        axes.set_xlabel(picture.x)
        axes.set_ylabel(picture.y)
        note = textwrap.fill(picture.note, 112)
        figure.supxlabel(note, fontsize=8, x=0.01, ha="left", color="#555555")
        output = io.StringIO()
        figure.savefig(
            output, format="svg",
            metadata={
                "Date": None, "Creator": None, "Title": picture.title,
                "Source": ", ".join(picture.files), "Identifier": f"sha256:{picture.digest}",
            },
        )  # fmt: skip
        pyplot.close(figure)
    return re.sub(r"[ \t]+\n", "\n", output.getvalue())


def _lines(axes: Any, picture: Picture) -> None:
    if picture.ticks:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(picture.ticks))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(picture.ticks, [_count(tick) for tick in picture.ticks])
    ends: list[tuple[float, float, str, str]] = []
    furthest = max(x for series in picture.series for x, _ in series.points)
    for series, colour in zip(picture.series, _colours(picture), strict=True):
        xs, ys = zip(*series.points, strict=True)
        if series.role == "reference":
            axes.plot(xs, ys, "--", color=colour, linewidth=1)
        elif series.role == "dot":
            axes.plot(xs, ys, "o", color=colour, markersize=7)
        else:
            axes.plot(xs, ys, "-o", color=colour, markersize=5)
        for x, y, mark in zip(xs, ys, series.marks, strict=False):
            axes.annotate(
                mark, (x, y), xytext=(0, 8), textcoords="offset points", color=colour, fontsize=9,
                ha="center",
            )  # fmt: skip
        if series.spans:
            low, high = zip(*series.spans, strict=True)
            axes.vlines(xs, low, high, color=colour, alpha=0.5, linewidth=1.5)
        if series.role == "line" and xs[-1] < furthest:  # beside it others go on
            axes.annotate(
                series.name, (xs[0], ys[0]), xytext=(4, -14), textcoords="offset points",
                color=colour,
            )  # fmt: skip
        else:
            ends.append((xs[-1], ys[-1], series.name, colour))
    if not any(y < 0 for series in picture.series for _, y in series.points):
        axes.set_ylim(bottom=0)
        if any(series.marks for series in picture.series):  # x is a speed, too
            axes.set_xlim(left=0)
    _name_ends(axes, ends)


def _colours(picture: Picture) -> list[str]:
    others = iter(COLOURS)
    return [OWN.get(series.name) or next(others) for series in picture.series]


def _name_ends(axes: Any, ends: list[tuple[float, float, str, str]]) -> None:
    """Names beside the last point of each line; those at one place keep apart."""
    low, high = axes.get_ylim()
    last: dict[float, float] = {}
    for x, y, name, colour in sorted(ends, key=lambda end: end[1]):
        at = max(y, last.get(x, low - high) + _APART * (high - low))
        last[x] = at
        axes.annotate(
            name, (x, at), xytext=(9, 0), textcoords="offset points", color=colour, va="center",
            annotation_clip=False,
        )  # fmt: skip


def _bars(axes: Any, picture: Picture) -> None:
    axes.set_yticks(range(len(picture.categories)), picture.categories)
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    start = [0.0] * len(picture.categories)
    for series, colour in zip(picture.series, _colours(picture), strict=True):
        places, values = zip(*series.points, strict=True)
        if series.role == "bound":
            _bounds(axes, series)
            continue
        axes.barh(places, values, 0.62, left=start, color=colour, label=series.name)
        start = [begin + value for begin, value in zip(start, values, strict=True)]
    for place, value in enumerate(start):
        axes.annotate(
            picture.shown.format(value), (value, place), xytext=(5, 0),
            textcoords="offset points", va="center", fontweight="bold",
        )  # fmt: skip
    if picture.series[0].role == "part":
        axes.legend(frameon=False, loc="best", fontsize=9)
    axes.set_xlim(0, 1.18 * max([*start, *(y for each in picture.series for _, y in each.points)]))


def _bounds(axes: Any, series: Series) -> None:
    """A tick where nobody can go beyond, named at the last."""
    for place, value in series.points:
        axes.plot([value, value], [place - 0.38, place + 0.38], color=BLACK, linewidth=2)
    place, value = max(series.points, key=lambda point: point[1])
    axes.annotate(
        f"{series.name} {value:.2f}", (value, place), xytext=(5, 0), textcoords="offset points",
        va="center",
    )  # fmt: skip


def _count(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens >= 4096 else f"{tokens:,}"
