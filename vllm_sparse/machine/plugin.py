# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Whether vLLM will see the plugin, and whether it is the one that one thinks."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlparse

from vllm_sparse import registry
from vllm_sparse.machine.findings import error, fine, warning

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vllm_sparse.machine.findings import Finding

NAME, PACKAGE = "vllm-sparse", "vllm_sparse"
GROUPS = {
    "vllm.general_plugins": "vllm_sparse.plugin:register",
    "vllm.platform_plugins": "vllm_sparse.plugin:platform",
}
"""What `pyproject.toml` declares."""

_REINSTALL = "pip install --force-reinstall --no-deps . in the checkout, in vLLM's environment"


def plugin_findings() -> Iterator[Finding]:
    """Installations, entry points, what shadows them, and policies of other packages."""
    copies = installations()
    if not copies:
        yield error(
            "plugin", "vllm-sparse is not installed, only importable",
            "vLLM finds plugins by the entry points of installed distributions", "pip install .",
        )  # fmt: skip
    else:
        yield from _copies(copies)
        yield from _imported(copies[0])
    for group, value in GROUPS.items():
        yield from _entry_point(group, value)
    yield from _allowed()
    yield from _platforms()
    yield from _policies()


def installations() -> list[metadata.Distribution]:
    """Every installation of the plugin on the path, the one that Python takes first."""
    found: dict[Path, metadata.Distribution] = {}
    for distribution in metadata.distributions():
        name = re.sub(r"[-_.]+", "-", distribution.metadata["Name"] or "").lower()
        if name == NAME:
            found.setdefault(root_of(distribution), distribution)
    return list(found.values())


def root_of(distribution: metadata.Distribution) -> Path:
    """The folder that an installation's package lies in: of an editable one, its checkout."""
    origin = json.loads(distribution.read_text("direct_url.json") or "{}")
    if origin.get("dir_info", {}).get("editable"):
        return Path(unquote(urlparse(origin["url"]).path)).resolve()
    return Path(str(distribution.locate_file(""))).resolve()


def _copies(copies: list[metadata.Distribution]) -> Iterator[Finding]:
    shown = ", ".join(f"{copy.version} in {root_of(copy)}" for copy in copies)
    if len(copies) == 1:
        yield fine("plugin", f"vllm-sparse {shown}")
        return
    yield warning(
        "plugin", f"installed {len(copies)} times: {shown}",
        "the first on the path runs, and which that is may differ between processes",
        "pip uninstall vllm-sparse until none is left, mind PYTHONPATH, install it once",
    )  # fmt: skip


def _imported(copy: metadata.Distribution) -> Iterator[Finding]:
    spec = importlib.util.find_spec(PACKAGE)
    place = Path(spec.origin).resolve().parents[1] if spec and spec.origin else None
    if place is not None and place != root_of(copy):
        yield warning(
            "plugin", f"{PACKAGE} is imported from {place}, but installed is {root_of(copy)}",
            "another folder comes first on the path, so that not what was installed runs",
            "start elsewhere, or take that folder off PYTHONPATH",
        )  # fmt: skip
    if importlib.util.find_spec(f"{PACKAGE}.kernels") is None:
        yield error(
            "plugin", f"the copy of {PACKAGE} in {place} has no kernels",
            "in a checkout they lie beside it, and only an installation joins them", _REINSTALL,
        )  # fmt: skip


def _entry_point(group: str, value: str) -> Iterator[Finding]:
    found = [point for point in metadata.entry_points(group=group) if point.name == PACKAGE]
    if not found:
        yield error(
            "entry points", f"none named {PACKAGE} in {group}",
            "vLLM will not load the plugin, and does not know its backends", _REINSTALL,
        )  # fmt: skip
    elif len(found) > 1 or found[0].value != value:
        owners = ", ".join(
            f"{point.value} of {point.dist.name if point.dist else '?'}" for point in found
        )
        yield error(
            "entry points", f"{PACKAGE} in {group} is {owners}, not {value}",
            "an older installation or another package shadows ours: vLLM keeps one of a name",
            "uninstall the other one; " + _REINSTALL,
        )  # fmt: skip
    else:
        yield fine("entry points", f"{group}: {value}")


def _allowed() -> Iterator[Finding]:
    listed = os.environ.get("VLLM_PLUGINS")
    if listed is not None and PACKAGE not in [name.strip() for name in listed.split(",")]:
        yield error(
            "entry points", f"VLLM_PLUGINS={listed} does not list {PACKAGE}",
            "vLLM then loads only what is listed", f"add {PACKAGE} to VLLM_PLUGINS, or unset it",
        )  # fmt: skip


def _platforms() -> Iterator[Finding]:
    others = sorted(
        point.name
        for point in metadata.entry_points(group="vllm.platform_plugins")
        if point.name != PACKAGE
    )
    if others:
        yield warning(
            "entry points", f"other platform plugins are installed: {', '.join(others)}",
            "vLLM runs one platform; on a CPU ours must be it, or vLLM stops",
            f"without a GPU: VLLM_PLUGINS={PACKAGE} (and whatever else you need)",
        )  # fmt: skip


def _policies() -> Iterator[Finding]:
    served = registry.entries()
    for point in metadata.entry_points(group=registry.ENTRY_POINTS):
        if point.name in served and served[point.name].settings == point.value:
            yield fine("policies", f"{point.name} = {point.value}, of another package")
        else:
            yield warning(
                "policies", f"{point.name} = {point.value} is ignored",
                "the name is taken, or not in capitals", "its package must choose another name",
            )  # fmt: skip
