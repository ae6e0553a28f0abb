# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What a check found: what it is, why that matters, what to do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

Level = Literal["ok", "warning", "error"]
LEVELS: tuple[Level, ...] = ("ok", "warning", "error")
"""Ascending; the place is the exit status."""


class Finding(NamedTuple):
    """One finding.

    Attributes:
        subject: What was looked at, in a word or two.
        level: Of :data:`LEVELS`.
        what: The fact.
        why: It matters; may be left out where all is well.
        todo: What to do about it.
    """

    subject: str
    level: Level
    what: str
    why: str = ""
    todo: str = ""


def fine(subject: str, what: str, why: str = "") -> Finding:
    """Nothing needs doing."""
    return Finding(subject, "ok", what, why)


def warning(subject: str, what: str, why: str, todo: str) -> Finding:
    """It works, but slower, or not with everything."""
    return Finding(subject, "warning", what, why, todo)


def error(subject: str, what: str, why: str, todo: str) -> Finding:
    """Serving will not start, or not with our backends."""
    return Finding(subject, "error", what, why, todo)


def status(findings: Iterable[Finding]) -> int:
    """Exit status of the worst: 0 fine, 1 a warning, 2 an error."""
    return max((LEVELS.index(finding.level) for finding in findings), default=0)
