# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""MkDocs' hooks: pages are written to be read in the repository, too.

A link out of ``docs/`` leads to a file there; the site shows its name. ``<!-- include: FILE -->``
stands for a file of the repository, whose links are taken as if it lay in ``docs/``.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# Its warnings end a strict build.
logger = logging.getLogger("mkdocs.hooks.pages")

_INCLUDE = re.compile(r".*<!-- include: (\S+) -->.*", re.DOTALL)
_ELSEWHERE = re.compile(r"\]\((?!docs/|https?:|#)")
_OUTSIDE = re.compile(r"\[([^\]]+)\]\((\.\./[^)\s]*)\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Includes what is to be included, and unlinks what the site does not have."""
    source = page.file.src_uri
    if found := _INCLUDE.fullmatch(markdown):
        markdown = (ROOT / found[1]).read_text()
        markdown = _ELSEWHERE.sub("](../", markdown).replace("](docs/", "](")
    return _OUTSIDE.sub(lambda link: _named(link, source), markdown)


def _named(link: re.Match[str], source: str) -> str:
    text, target = link.groups()
    if not (ROOT / "docs" / source).parent.joinpath(target).exists():
        logger.warning("%s links to %s, which does not exist", source, target)
    return text
