# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Tables that stand between ``<!-- table: NAME -->`` and ``<!-- end -->``, made anew."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks import headline, published
from benchmarks.quality import pages as quality
from scripts.pages import features, metrics, plans, settings

ROOT = Path(__file__).parents[2]
TABLES = {
    **{**published.TABLES, **headline.TABLES, **quality.TABLES},
    **{**settings.TABLES, **features.TABLES, **metrics.TABLES, **plans.TABLES},
}
_MARKED = re.compile(r"(<!-- table: ([\w-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def pages() -> list[Path]:
    """Files that may have such tables."""
    return [ROOT / "README.md", ROOT / "assets/README.md", *sorted((ROOT / "docs").glob("*.md"))]


def marked(text: str) -> list[str]:
    """Names of a text's tables."""
    return [name for _, name, *_ in _MARKED.findall(text)]


def filled(text: str) -> str:
    """A text with its tables made anew.

    Raises:
        KeyError: A marker names no table.
    """
    return _MARKED.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}\n{found[4]}", text)


def rewrite() -> list[Path]:
    """Writes all tables.

    Returns:
        The files that changed.
    """
    changed = []
    for path in pages():
        old = path.read_text()
        new = filled(old)
        if new != old:
            path.write_text(new)
            changed.append(path.relative_to(ROOT))
    return changed
