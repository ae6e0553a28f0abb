# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Finds faster launches of the kernels for this GPU, and installs them once they proved right.

``make gpu-tune``, or ``python -m benchmarks.gpu.tune``. The table that it finds is written to
``launches.json`` in the folder given by ``--out``. If all kernels still agree with their references
under it, it is copied to where `launch.tuned_path` says, and every later start on such a GPU reads
it. Shapes are those of Llama-3.1-8B and MiniCPM4.1-8B; head sizes beyond 128 keep what is shipped.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from functools import partial
from typing import TYPE_CHECKING

from benchmarks.gpu import check, runner, stages
from benchmarks.tables import table

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from benchmarks.gpu.stages import Report

MODULE, NAME = "benchmarks.gpu.tune", "gpu-tune"
LAUNCHES_ENV = "VLLM_SPARSE_LAUNCHES"  # launch.LAUNCHES_ENV, which cannot be had without torch
SEARCHES = ("tune", "tune-sparda")
PARITY_S, INSTALL_S, SMOKE_S = 190, 30, 60
ROCKETKV_SHARE = 0.6  # of the time to search in


def search(kind: str, report: Report, options: argparse.Namespace) -> None:
    """Searches for launches of the kernels of ROCKETKV or SPARDA."""
    from benchmarks.ops import launches

    launches.tune(kind, report, options)


def parity(report: Report, options: argparse.Namespace) -> None:
    """Writes what was found, however far the searches came, and compares all kernels under it.

    Raises:
        CheckFailedError: Nothing was found, or some kernel differs from its reference.
    """
    import torch
    import triton
    from vllm_sparse.kernels.triton import launch

    from benchmarks.ops import parity as compared

    device = torch.device(options.device)
    rows = list(_found(options))
    if not rows:
        raise stages.CheckFailedError("no kernel was timed, so that there is nothing to check")
    report.note(gpu=launch.gpu_name(device), triton=triton.__version__, found=rows)
    table = {
        row["kernel"]: (launch.Launch(*row["launch"]), launch.Launch(*row["larger_heads"]))
        for row in rows
    }
    launch.write_launches(_file(options), table, report.facts)
    report.note(launches=launch.launches(device).origin)
    compared.check(report, options)


def install(report: Report, options: argparse.Namespace) -> None:
    """Puts the table where it is looked for.

    Raises:
        CheckFailedError: It has not passed parity.
        NotAvailableError: It was not tried, or nobody looks for a table.
    """
    import torch
    from vllm_sparse.kernels.triton import launch

    if stages.report_of(options, "parity")["status"] != "ok":
        raise stages.CheckFailedError("parity has not passed")
    source = _file(options)
    target = launch.tuned_path(launch.gpu_name(torch.device(options.device)))
    if target is None:
        raise stages.NotAvailableError("no table is read here")
    facts = json.loads(source.read_text())["facts"]
    launch.write_launches(target, launch.read_launches(source), facts)
    report.note(installed=str(target))


def _found(options: argparse.Namespace) -> Iterator[dict]:
    """Rows of kernels for which there is a launch that works."""
    for search in SEARCHES:
        with contextlib.suppress(stages.NotAvailableError):
            rows = stages.report_of(options, search)["rows"]
            yield from (row for row in rows if row["launch"])


def _file(options: argparse.Namespace) -> Path:
    return options.out.absolute() / "launches.json"


def plan(options: argparse.Namespace) -> list[stages.Stage]:
    """All stages; the searches get what the others leave of the budget."""
    interpreted = {"TRITON_INTERPRET": "1"} if options.device == "cpu" else {}
    shipped = {LAUNCHES_ENV: "", **interpreted}  # not what an earlier run has found
    search_s = max(60, options.budget_s - PARITY_S - INSTALL_S - SMOKE_S)

    def find(name: str, kind: str, share: float) -> stages.Stage:
        run, limit_s = partial(search, kind), share * search_s
        return stages.Stage(
            name, run, limit_s, ("smoke",), env=shipped, alone=True, about=kind.upper()
        )

    every = [
        stages.Stage("smoke", check.smoke, SMOKE_S, about="GPU, vLLM, installed plugin"),
        find("tune", "rocketkv", ROCKETKV_SHARE),
        find("tune-sparda", "sparda", 1 - ROCKETKV_SHARE),
        stages.Stage(
            "parity", parity, PARITY_S, ("smoke",),
            env={LAUNCHES_ENV: str(_file(options)), **interpreted}, beside=SEARCHES,
            about="Triton kernels = references",
        ),
    ]  # fmt: skip
    if options.install:
        about = "for every later start on this GPU"
        every.append(stages.Stage("install", install, INSTALL_S, ("parity",), about=about))
    return every


def summary(results: dict[str, dict], source: Path) -> tuple[str, dict]:
    """Returns the tables to print last, and what to write beside the stages."""
    rows = [row for search in SEARCHES for row in results.get(search, {}).get("rows", [])]
    parts = []
    if rows:
        columns = {
            **{"kernel": "kernel", "shape": "shape"},
            "shipped": lambda row: _tiles(row["shipped"]), "us": "shipped_us",
            "found": lambda row: _tiles(row["launch"]), "us ": "us",
            "times": lambda row: row["shipped_us"] / row["us"], "tried": "tried",
            "unusable": lambda row: len(row["unusable"]),
        }  # fmt: skip
        parts.append(table(rows, columns, aligned=True))
    facts = [results.get(search, {}).get("facts", {}) for search in SEARCHES]
    missed = [name for found in facts for name in found.get("no_time_for", [])]
    if missed:
        parts.append(f"no time for: {' '.join(missed)}; raise --budget-s")
    cut = sorted({row["kernel"] for row in rows if row["cut"]})
    if cut:
        parts.append(f"not searched to the end: {' '.join(cut)}; raise --budget-s")
    installed = results.get("install", {}).get("facts", {}).get("installed")
    if installed:
        parts.append(f"installed: {installed}")
    elif rows:
        written = "found" in results.get("parity", {}).get("facts", {})
        parts.append(f"NOT installed: {source if written else 'no table was checked'}")
    return "\n\n".join(parts), {"no_time_for": missed, "installed": installed}


def _tiles(found: list[int] | None) -> str | None:
    return found and "/".join(map(str, found))


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line entry point; returns the exit status: 1 is wrong, 2 not all was checked."""
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__)
    stages.add_options(parser, NAME)
    parser.add_argument(
        "--no-install", dest="install", action="store_false", help="leave the table in --out"
    )
    finish = partial(summary, source=_file(parser.parse_args(arguments)))
    # A table that was not checked in time is no success.
    return runner.main(MODULE, NAME, parser, plan, finish, arguments, complete=True)


if __name__ == "__main__":
    sys.exit(main())
