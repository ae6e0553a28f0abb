# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Renders the result files as Markdown.

``python -m benchmarks.report [FILES...]`` prints every result in ``benchmarks/results``. The tables
of README.md and docs/ are ``make tables``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks import drafts, lists, replay, results, serving, tables
from benchmarks.quality import report as quality
from benchmarks.served import report as served

RENDERERS = {
    **tables.RENDERERS,
    **{"quality": quality.render, "serving": serving.render, "replay": replay.render},
    **{"drafts": drafts.render, "lists": lists.render, "served": served.render},
}


def render(path: Path) -> str:
    """Returns one result file as a Markdown section."""
    result = json.loads(path.read_text())
    env = result["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in env["versions"].items())
    machine = f"{env['cpu']}, {env['cores']} cores, {env['memory_gib']} GiB"
    gpu = f", {env['gpu']['name']}" if env.get("gpu") else ""
    shown = RENDERERS[result["benchmark"]](result)
    parts = [f"### {path.stem}", f"Command: `{env['command']}`", shown]
    if "interrupted" in result:
        parts.insert(1, f"**Ended early: {result['interrupted']}**")
    commit = f"; commit: {env['commit'][:12]}" if env.get("commit") else ""
    parts.append(f"Machine: {machine}{gpu}; versions: {versions}; date: {env['date']}{commit}")
    return "\n\n".join(parts)


def main(arguments: list[str] | None = None) -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("files", nargs="*", type=Path)
    options = parser.parse_args(arguments)
    files = options.files or sorted(results.FOLDER.glob("*.json"))
    print("\n\n".join(render(path) for path in files))


if __name__ == "__main__":
    main()
