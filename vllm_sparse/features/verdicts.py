# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What may happen to a feature that is asked for, and rows that say what happens where."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

POLICIES: Final = "policies"
OUTSIDE: Final = "policies of other packages"
SPARDA: Final = "SPARDA"


@dataclass(frozen=True)
class Served:
    """Served, and tested; on GPUs: by interpreted kernels.

    Attributes:
        test: ``FILE::TEST`` that shows it.
    """

    test: str


@dataclass(frozen=True)
class Stock:
    """Such layers run as in stock vLLM, beside ours.

    Attributes:
        test: ``FILE::TEST`` that shows it.
    """

    test: str


@dataclass(frozen=True)
class Untested:
    """Start-up lets it through, nobody has tried.

    Attributes:
        note: What is known.
    """

    note: str = ""


@dataclass(frozen=True)
class Refused:
    """Stops the start.

    Attributes:
        reason: Why, and what to do; names in braces are filled in with what was asked for.
    """

    reason: str


Verdict = Served | Stock | Untested | Refused
Pair = tuple[Verdict | None, Verdict | None]


class Place(NamedTuple):
    """Who is asked.

    Attributes:
        family: :data:`POLICIES`, :data:`OUTSIDE` or :data:`SPARDA`.
        on_gpu: Steps take a GPU's path, interpreted or not.
    """

    family: str
    on_gpu: bool


@dataclass(frozen=True)
class Feature:
    """A row of the table.

    Attributes:
        name: For code.
        group: Of the table.
        title: For readers.
        cells: What happens where; ``None``: it does not come up there, or another row refuses it.
    """

    name: str
    group: str
    title: str
    cells: Mapping[Place, Verdict | None] = field(repr=False)

    def verdict(self, family: str, on_gpu: bool) -> Verdict | None:
        """What happens there; policies of other packages are like ours unless a cell says so."""
        default = self.cells[Place(POLICIES if family == OUTSIDE else family, on_gpu)]
        return self.cells.get(Place(family, on_gpu), default)


def row(
    group: str,
    name: str,
    title: str,
    policies: Verdict | Pair | None,
    sparda: Verdict | Pair | None,
    outside: Verdict | None = None,
) -> Feature:
    """A feature.

    Args:
        group: Of the table.
        name: For code.
        title: For readers.
        policies: What our policies do, on CPUs and on GPUs if that differs.
        sparda: What SPARDA does, on CPUs and on GPUs if that differs.
        outside: What policies of other packages do if that differs from ours.
    """
    cells: dict[Place, Verdict | None] = {}
    for family, given in ((POLICIES, policies), (SPARDA, sparda)):
        pair = given if isinstance(given, tuple) else (given, given)
        cells |= {Place(family, on_gpu): pair[on_gpu] for on_gpu in (False, True)}
    if outside is not None:
        cells |= {Place(OUTSIDE, on_gpu): outside for on_gpu in (False, True)}
    return Feature(name, group, title, cells)


def everywhere(group: str, name: str, title: str, reason: str) -> Feature:
    """A feature that all refuse."""
    return row(group, name, title, Refused(reason), Refused(reason))
