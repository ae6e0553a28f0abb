# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Stages: subprocesses with time limits, whose results are on disk whatever becomes of them.

A stage writes its report after every row. So a stage that crashes, hangs or is killed costs what
it has not measured yet, and a run that is killed keeps everything up to that moment.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import results
from benchmarks.gpu import machine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

PASSED = ("ok", "not available")
MERGE = "an earlier result on this machine: stages that it has completely are not run again"


class NotAvailableError(Exception):
    """A stage cannot be run here; the message says why. No failure."""


class CheckFailedError(Exception):
    """Something that a stage checks does not hold."""


@dataclass(frozen=True)
class Stage:
    """One subprocess of a run.

    Attributes:
        name: Unique, short.
        run: What the subprocess does.
        limit_s: Longest time it may take.
        min_s: Not started with less: it would do nothing but start. Unset: a third of the limit.
        needs: Stages without whose success this one is pointless.
        beside: Stages whose results this one is compared with.
        prefix: Command to run Python under.
        env: Further environment variables.
        alone: No other stage may run at the same time.
        unavailable: What is printed where the command of ``prefix`` cannot work on this machine.
        about: What it is for, in a few words.
    """

    name: str
    run: Callable[[Report, argparse.Namespace], None]
    limit_s: float
    needs: tuple[str, ...] = ()
    prefix: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    beside: tuple[str, ...] = ()
    min_s: float | None = None
    alone: bool = False
    unavailable: tuple[str, ...] = ()
    about: str = ""

    @property
    def least_s(self) -> float:
        """What must be left of the budget to start it."""
        return self.limit_s / 3 if self.min_s is None else self.min_s


class Report:
    """What a stage has found so far; every change is written at once.

    Attributes:
        rows: Measurements or checks, in order.
        facts: What holds for all of them.
    """

    def __init__(self, path: Path, deadline: float = float("inf")) -> None:
        """Starts a report."""
        self.rows: list[dict] = []
        self.facts: dict[str, Any] = {}
        self._path = path
        self._deadline = deadline
        self.save("running")

    @property
    def left_s(self) -> float:
        """Seconds until the stage will be stopped."""
        return self._deadline - time.time()

    def add(self, **row: Any) -> dict:
        """Adds a row, prints and returns it."""
        self.rows.append(row)
        print(row, flush=True)
        self.save("running")
        return row

    def note(self, **facts: Any) -> None:
        """Adds facts."""
        self.facts |= facts
        print({key: value for key, value in facts.items() if len(str(value)) < 1000}, flush=True)
        self.save("running")

    def save(self, status: str, reason: str = "") -> None:
        """Writes the report."""
        content = {"status": status, "reason": reason, "facts": self.facts, "rows": self.rows}
        results.write_json(self._path, content)


def add_options(parser: argparse.ArgumentParser, name: str) -> None:
    """Adds the options that both programs have."""
    parser.add_argument("--out", type=Path, default=Path("build") / name, help="folder")
    parser.add_argument("--budget-s", type=float, default=460, help="for all stages together")
    parser.add_argument("--jobs", type=int, default=1, help="stages at once; not to measure time")
    parser.add_argument("--merge", type=Path, metavar="JSON", help=MERGE)
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="these stages")
    parser.add_argument("--skip", nargs="+", default=[], metavar="STAGE", help="not these stages")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="shapes for a try-out on a CPU")
    parser.add_argument("--list", action="store_true", help="only show what would be run")
    parser.add_argument(
        "--site", type=Path, default=machine.default_site(), help="where vLLM is unpacked"
    )
    parser.add_argument(
        "--engine-arg", nargs="+", default=[], metavar="KEY=JSON", help="of `LLM`, for every engine"
    )
    parser.add_argument("--stage", help=argparse.SUPPRESS)  # what follows is for the subprocess
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, default=float("inf"), help=argparse.SUPPRESS)


def report_of(options: argparse.Namespace, stage: str) -> dict:
    """Returns the report of an earlier stage of this run.

    Raises:
        NotAvailableError: It has none.
    """
    path = options.work / f"{stage}.json"
    if not path.exists():
        raise NotAvailableError(f"stage {stage} has not run")
    return json.loads(path.read_text())


def run_stage(stages: Iterable[Stage], options: argparse.Namespace) -> int:
    """Runs the one stage that the options name, in this process, and returns the exit status."""
    machine.end_with_parent()
    (stage,) = (stage for stage in stages if stage.name == options.stage)
    report = Report(options.work / f"{stage.name}.json", options.deadline)
    status, reason = "ok", ""
    try:
        stage.run(report, options)
    except NotAvailableError as error:
        status, reason = "not available", str(error)
    except CheckFailedError as error:
        status, reason = "failed", str(error)
    except BaseException as error:
        traceback.print_exc()
        status, reason = "failed", _one_line(error)
    watched = bool(stage.prefix)  # by a checker, which has a say of its own
    if not watched and (gpu := machine.gpu()):
        report.facts["gpu"] = gpu  # its clocks while it is warm
    report.save(status, reason)
    print(f"{stage.name}: {status} {reason}", flush=True)
    code = 0 if status in PASSED else 1
    if not watched:
        sys.stderr.flush()
        os._exit(code)  # all is on disk; what libraries do at exit may crash, or take a while
    return code


def _one_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    # vLLM's and pydantic's messages are paragraphs; the log has all of it.
    return " ".join(text.split())[:400]
