# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Made-up installations: distributions and packages in a folder that is put on the path."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def install(
    site: Path,
    name: str,
    version: str,
    *,
    requires: tuple[str, ...] = (),
    points: dict[str, dict[str, str]] | None = None,
) -> None:
    """Writes the metadata of a distribution.

    Args:
        site: The folder.
        name: Of the distribution.
        version: Its own.
        requires: Lines of ``Requires-Dist``.
        points: Entry points by group.
    """
    folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir(parents=True)
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {line}" for line in requires]
    (folder / "METADATA").write_text("\n".join(lines) + "\n")
    sections = [
        f"[{group}]\n" + "".join(f"{key} = {value}\n" for key, value in found.items())
        for group, found in (points or {}).items()
    ]
    (folder / "entry_points.txt").write_text("\n".join(sections))


def package(site: Path, name: str, body: str) -> None:
    """Writes a package whose import runs ``body``."""
    (site / name).mkdir(parents=True)
    (site / name / "__init__.py").write_text(body)
