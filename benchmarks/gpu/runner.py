# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Runs the stages of a GPU program within a budget, and writes and prints what came of it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import harness, results
from benchmarks.gpu import machine
from benchmarks.gpu.stages import PASSED, Stage, run_stage
from benchmarks.tables import table

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterable, Sequence

TAIL_LINES = 15
POLL_S, WRITE_S = 0.05, 1.0
INCOMPLETE = 2


@dataclass
class _Child:
    """A stage under way; its process leads a session of its own."""

    stage: Stage
    process: subprocess.Popen
    log: Path
    started: float
    limit_s: float

    @property
    def seconds(self) -> float:
        """Since it was started."""
        return time.monotonic() - self.started

    @property
    def ended(self) -> bool:
        """Whether it has ended, or has had its time."""
        return self.process.poll() is not None or self.seconds > self.limit_s


class Run:
    """Runs stages within a budget, one after the other or a few at once.

    Attributes:
        results: Report of each stage by name, with ``status``, ``reason`` and ``seconds``.
    """

    def __init__(
        self,
        module: str,
        name: str,
        options: argparse.Namespace,
        arguments: Sequence[str],
        environment: dict,
    ) -> None:
        """Prepares a run.

        Args:
            module: The program, as for ``python -m``.
            name: Of the result.
            options: Parsed.
            arguments: What they were parsed from, handed on to the stages.
            environment: Of the result file.
        """
        self.results: dict[str, dict] = {}
        self._module, self._name = module, name
        self._options, self._arguments = options, list(arguments)
        self._environment = environment
        self._started = self._written = time.monotonic()
        self._children: list[_Child] = []
        self._log = options.out / f"{name}.log"

    def run(self, stages: Iterable[Stage]) -> dict[str, dict]:
        """Runs the stages that have no result yet; what is found is written every few seconds."""
        self._options.out.mkdir(parents=True, exist_ok=True)
        self._log.write_text("")
        pending = [stage for stage in stages if stage.name not in self.results]
        with tempfile.TemporaryDirectory(prefix="vllm-sparse-gpu-") as scratch:
            self._work = Path(scratch)
            self._paths = machine.child_paths(self._work)
            for name, result in self.results.items():  # for those that compare themselves with it
                (self._work / f"{name}.json").write_text(json.dumps(result))
            try:
                while pending or self._children:
                    self._start(pending)
                    for child in [child for child in self._children if child.ended]:
                        self._finish(child)
                    if time.monotonic() - self._written > WRITE_S:
                        self.write()
                    time.sleep(POLL_S)
            finally:
                for child in list(self._children):
                    self._finish(child, interrupted=True)
        return self.results

    def write(self, **further: Any) -> None:
        """Writes the result file; of stages under way what they have found so far."""
        running = {child.stage.name: _read(self._report(child)) for child in self._children}
        self._written = time.monotonic()
        results.write_json(
            self._options.out / f"{self._name}.json",
            {
                "benchmark": self._name, "environment": self._environment,
                "stages": {**self.results, **running}, **further,
            },
            {
                self._options.out: "OUT", self._options.site: "SITE", self._work: "WORK",
                machine.ROOT: "CHECKOUT", Path.home(): "HOME",
            },
        )  # fmt: skip

    @property
    def left_s(self) -> float:
        """Seconds of the budget that are left."""
        return self._options.budget_s - (time.monotonic() - self._started)

    def _start(self, pending: list[Stage]) -> None:
        """Starts what can be started, in order; takes it from the list."""
        for stage in list(pending):
            if len(self._children) >= self._options.jobs:
                return
            if any(
                child.stage.alone or child.stage.name in stage.needs for child in self._children
            ):
                continue
            if stage.alone and self._children:
                return  # or it would wait for ever
            pending.remove(stage)
            result = self._skipped(stage)
            if result is None:
                self._children.append(self._launch(stage))
            else:
                self._keep(stage, result)

    def _skipped(self, stage: Stage) -> dict | None:
        reason = ""
        lost = [name for name in stage.needs if self._status(name) not in (None, "ok")]
        if lost:
            reason = f"needs {', '.join(lost)}"
        elif self.left_s < stage.least_s:
            left = f"{max(0.0, self.left_s):.0f} s are left"
            reason = f"of the budget of {self._options.budget_s:.0f} s {left}"
        if not reason:
            return None
        return {"status": "skipped", "reason": reason, "seconds": 0.0, "facts": {}, "rows": []}

    def _status(self, name: str) -> str | None:
        return self.results[name]["status"] if name in self.results else None

    def _keep(self, stage: Stage, result: dict) -> None:
        self.results[stage.name] = result
        self.write()
        line = f"{stage.name}: {result['status']}, {result['seconds']:.0f} s"
        harness.progress(f"{line} {result['reason']}".rstrip())

    def _report(self, child: _Child) -> Path:
        return self._work / f"{child.stage.name}.json"

    def _launch(self, stage: Stage) -> _Child:
        limit = min(stage.limit_s, self.left_s)
        harness.progress(f"{stage.name} (at most {limit:.0f} s) {stage.about}")
        command = [
            *stage.prefix,
            *(sys.executable, "-P", "-m", self._module, *self._arguments),
            *("--stage", stage.name, "--work", str(self._work)),
            *("--deadline", str(time.time() + limit)),
        ]
        log = self._work / f"{stage.name}.log"
        with log.open("w") as handle:
            process = subprocess.Popen(
                command, stdout=handle, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                env={**machine.ENVIRONMENT, **os.environ, **stage.env, "PYTHONPATH": self._paths},
                start_new_session=True,
            )  # fmt: skip
        return _Child(stage, process, log, time.monotonic(), limit)

    def _finish(self, child: _Child, *, interrupted: bool = False) -> None:
        """Ends the stage's process and everything that it has started; keeps its result."""
        timed_out = child.process.poll() is None
        for number, patience in ((signal.SIGTERM, 3.0), (signal.SIGKILL, 10.0)):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child.process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.process.wait(timeout=patience)
        code = child.process.poll()  # none if a driver holds it: the other stages go on
        self._children.remove(child)
        result = _read(self._report(child))
        if interrupted:
            result |= {"status": "interrupted"}
        elif timed_out:
            result |= {"status": "timed out", "reason": f"stopped after {child.limit_s:.0f} s"}
            if code is None:
                result["reason"] += f", but process {child.process.pid} does not end"
        elif result["status"] == "running":
            result |= {"status": "crashed", "reason": f"exit status {code}"}
        elif result["status"] in PASSED and code:  # a checker that it ran under found something
            result |= {"status": "failed", "reason": f"exit status {code}"}
        result["seconds"] = round(child.seconds, 1)
        printed = child.log.read_text(errors="replace")
        refused = [line for line in printed.splitlines() if _names(line, child.stage.unavailable)]
        if refused and result["status"] not in PASSED:
            result |= {"status": "not available", "reason": refused[0].strip("= ")}
        with self._log.open("a") as handle:
            handle.write(f"== {child.stage.name}\n{printed}")
        if result["status"] not in PASSED:
            result["log_tail"] = printed.splitlines()[-TAIL_LINES:]
            print("\n".join(f"    {line[:300]}" for line in result["log_tail"]), flush=True)
        self._keep(child.stage, result)


def _names(line: str, words: Iterable[str]) -> bool:
    return any(word in line for word in words)


def _read(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {"status": "running", "reason": "", "facts": {}, "rows": []}


def chosen(stages: Iterable[Stage], options: argparse.Namespace) -> list[Stage]:
    """Returns the stages that the options ask for, in order."""
    return [
        stage
        for stage in stages
        if (options.only is None or stage.name in options.only) and stage.name not in options.skip
    ]


def merged(
    options: argparse.Namespace, environment: dict, stages: Iterable[Stage]
) -> dict[str, dict]:
    """Results of an earlier run on the same machine, of stages that need not run again.

    Those are stages of this program, whichever program ran them, that left nothing out.

    Raises:
        ValueError: It ran on something else.
    """
    if options.merge is None:
        return {}
    found = json.loads(options.merge.read_text())
    theirs = found["environment"]
    for key in ("versions", "gpu_versions", "commit", "seed"):
        if theirs[key] != environment[key]:
            raise ValueError(f"--merge: {key} was {theirs[key]} and is {environment[key]}")
    names = [(gpu or {}).get("name") for gpu in (theirs["gpu"], environment["gpu"])]
    if names[0] != names[1]:
        raise ValueError(f"--merge: it ran on {names[0]}, and this is {names[1]}")
    names = {stage.name for stage in stages}.difference(options.only or [])
    return {
        name: {**result, "of": theirs["date"]}
        for name, result in found["stages"].items()
        if name in names
        and result["status"] == "ok"
        and not any("skipped" in row for row in result["rows"])
    }


def main(
    module: str,
    name: str,
    parser: argparse.ArgumentParser,
    plan: Callable[[argparse.Namespace], list[Stage]],
    summary: Callable[[dict[str, dict]], tuple[str, dict]],
    arguments: Sequence[str] | None = None,
    *,
    complete: bool = False,
) -> int:
    """Runs a program and returns its exit status.

    Args:
        module: Its name, as for ``python -m``.
        name: Of its result.
        parser: With the options of `add_options`.
        plan: Returns all stages, the most valuable first.
        summary: Returns the tables to print last, and what to write beside the stages.
        arguments: The command line's unless given.
        complete: A stage that was skipped makes the exit status 2.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(arguments)
    every = plan(options)
    if options.stage:
        return run_stage(every, options)
    unknown = {*(options.only or []), *options.skip} - {stage.name for stage in every}
    if unknown:
        parser.error(f"no such stage: {', '.join(sorted(unknown))}; see --list")
    stages = chosen(every, options)
    if options.list:
        columns = {"stage": "name", "limit s": "limit_s", "needs": "needs", "about": "about"}
        rows = [{**vars(stage), "needs": ", ".join(stage.needs)} for stage in stages]
        print(table(rows, columns, aligned=True))
        return 0
    harness.exit_cleanly()
    environment = {**results.environment(), **machine.facts(), "seed": options.seed}
    run = Run(module, name, options, arguments, environment)
    try:
        run.results |= merged(options, environment, every)
    except (OSError, KeyError, ValueError) as error:
        parser.error(str(error))
    ended = run.run(stages)
    text, further = summary(ended)
    run.write(**further)
    gpu = environment["gpu"] or {"name": "no GPU"}
    wrong = [f"{stage}: {r['reason']}" for stage, r in ended.items() if r["status"] != "ok"]
    columns = {"stage": "name", "result": "status", "seconds": "seconds"}
    rows = [{"name": stage, **result} for stage, result in ended.items()]
    parts = ("", table(rows, columns, aligned=True), "\n".join(wrong), text)
    print("\n\n".join(filter(None, parts)))
    print(f"\n{name} on {gpu['name']}; full result: {options.out / f'{name}.json'}")
    missed = [stage for stage in stages if ended[stage.name]["status"] == "skipped"]
    if missed:
        again = {stage.name for stage in missed}
        again |= {name for stage in missed for name in (*stage.needs, *stage.beside)}
        names = " ".join(stage.name for stage in every if stage.name in again)
        print(f"not run: {' '.join(s.name for s in missed)}; for these use --only {names}")
    if any(result["status"] not in (*PASSED, "skipped") for result in ended.values()):
        return 1
    return INCOMPLETE if missed and complete else 0
