# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""``vllm-sparse doctor``."""

from __future__ import annotations

import argparse
import json
import textwrap
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_sparse.machine.findings import Finding

_WIDTH = 100
_MARKS = {"ok": "ok", "warning": "WARNING", "error": "ERROR"}


def add_command(subparsers: Any) -> None:
    """Adds ``vllm-sparse doctor``."""
    parser = subparsers.add_parser(
        "doctor",
        help="examine this machine: versions, plugin, kernels, memory, cores",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Looks for what keeps the plugin from running, or from running fast, and says\n"
        "what to do. Takes less than five seconds and needs neither GPU nor a vLLM that works.",
        epilog="exit status: 0 all is fine; 1 warnings; 2 errors (or wrong options)",
    )
    add = parser.add_argument
    add("--model", metavar="MODEL", help="config.json, its folder, or a model of a local cache")
    add("--thorough", action="store_true",
        help="also compile the kernels and load vLLM with the plugin (up to a minute)")  # fmt: skip
    add("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from vllm_sparse.machine.findings import error, status

    try:
        from vllm_sparse.doctor.examine import examine
    except ModuleNotFoundError as missing:
        findings = [
            error(
                "dependencies", f"{missing.name} is not installed",
                "vllm-sparse itself cannot run without it", "pip install . in the checkout",
            )
        ]  # fmt: skip
    else:
        findings = examine(arguments.model, arguments.thorough)
    if arguments.json:
        print(json.dumps([finding._asdict() for finding in findings], indent=1))
    else:
        print("\n".join(map(text_of, findings)))
        count = {
            level: sum(finding.level == level for finding in findings)
            for level in ("warning", "error")
        }
        print(f"\n{count['error']} errors, {count['warning']} warnings")
    return status(findings)


def text_of(finding: Finding) -> str:
    """A finding for a terminal; why and what to do on lines of their own where something is."""
    head = f"{_MARKS[finding.level]:8} {finding.subject}: "
    if finding.level == "ok":
        return _wrapped(head, finding.what + (f" ({finding.why})" if finding.why else ""))
    return "\n".join(
        [
            _wrapped(head, finding.what),
            _wrapped(" " * 9 + "why: ", finding.why),
            _wrapped(" " * 9 + "do:  ", finding.todo),
        ]
    )


def _wrapped(head: str, text: str) -> str:
    return textwrap.fill(
        text, _WIDTH, initial_indent=head, subsequent_indent=" " * 14, break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip
