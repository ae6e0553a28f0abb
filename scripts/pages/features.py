# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What is served and what is refused, from the table that start-up reads."""

from __future__ import annotations

import re
from functools import partial

from benchmarks.tables import table
from vllm_sparse.features import (
    FEATURES,
    OUTSIDE,
    POLICIES,
    SPARDA,
    Feature,
    Refused,
    Served,
    Stock,
    Verdict,
)

PLACES = {
    "policies, CPU": (POLICIES, False),
    "policies, GPU": (POLICIES, True),
    "SPARDA, CPU": (SPARDA, False),
    "SPARDA, GPU": (SPARDA, True),
}
GROUPS = {feature.group.split()[-1].lower(): feature.group for feature in FEATURES.values()}


def shown(verdict: Verdict | None) -> str:
    """A cell of the table; what has a test leads there."""
    if isinstance(verdict, Served | Stock):
        word = "yes" if isinstance(verdict, Served) else "stays stock"
        return f"[{word}](../{verdict.test.partition('::')[0]})"
    if isinstance(verdict, Refused):
        return "**refused**"
    return "\N{EN DASH}" if verdict is None else "not tested"


def group(title: str) -> str:
    """The rows of a group."""
    columns = {
        "feature": lambda feature: feature.title,
        **{
            head: lambda feature, place=place: shown(feature.verdict(*place))
            for head, place in PLACES.items()
        },
    }
    return table([row for row in FEATURES.values() if row.group == title], columns)


def reasons() -> str:
    """Why what is refused is refused, and what to do."""
    lines = []
    for feature in FEATURES.values():
        for reason in dict.fromkeys(_reasons(feature)):
            lines.append({"what": feature.title, "where": _where(feature, reason), "why": reason})
    columns = {"what": "what", "where": "where", "why": lambda line: _readable(line["why"])}
    return table(lines, columns)


def _reasons(feature: Feature) -> list[str]:
    return [cell.reason for cell in feature.cells.values() if isinstance(cell, Refused)]


def _where(feature: Feature, reason: str) -> str:
    """Where a feature is refused for a reason, in words."""
    places = {**PLACES, OUTSIDE: (OUTSIDE, False)}
    found = {head for head, place in places.items() if feature.verdict(*place) == Refused(reason)}
    if found == set(places):
        return "everywhere"
    for whole, parts in (
        (POLICIES, {"policies, CPU", "policies, GPU", OUTSIDE}),
        (SPARDA, {"SPARDA, CPU", "SPARDA, GPU"}),
        ("GPUs", {"policies, GPU", "SPARDA, GPU"}),
    ):
        if parts <= found:
            found = {whole, *(found - parts)}
    return "; ".join(head for head in (*places, POLICIES, SPARDA, "GPUs") if head in found)


def _readable(reason: str) -> str:
    """A reason whose blanks are named: ``{kind}`` becomes KIND."""
    return re.sub(r"\{(\w+)\}", lambda blank: blank[1].upper(), reason)


TABLES = {
    **{f"features-{name}": partial(group, title) for name, title in GROUPS.items()},
    "refusals": reasons,
}
