# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The first ten minutes on a GPU: what is there, whether it is right, and the cells that matter.

``make gpu-first``, or ``python -m benchmarks.gpu.first``. The stages are those of ``gpu-check`` and
``gpu-bench``, the most wanted first; each is a process of its own with a time limit, and whatever
it finds is in ``gpu-first.json`` in the folder given by ``--out`` within a second. A stage that
fails costs no other one. The other programs go on from that file with ``--merge``. What each red
result means is in ``docs/gpu.md``.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from functools import partial
from typing import TYPE_CHECKING

from benchmarks.gpu import bench, check, runner, stages, tokens, verdicts

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

MODULE, NAME = "benchmarks.gpu.first", "gpu-first"
BUDGET_S = 570  # ending a stage that hangs takes up to 13 s more
PARITY_S, ENGINE_S = 120, 90
ENGINES = (tokens.STOCK, "whole-graphs", "sparda-whole", "quest", "snapkv", "streamingllm")
TIMED = (verdicts.DENSE, "rocket-1024", "sparda-offload", "sparda-resident")


def plan(options: argparse.Namespace) -> list[stages.Stage]:
    """All stages, the most valuable first.

    None needs another one but for what it is compared with: a check that fails says so, and the
    rest is measured all the same.
    """
    checks = {stage.name: stage for stage in check.plan(options)}
    timed = {stage.name: stage for stage in bench.plan(options)}
    stock, *others = (
        dataclasses.replace(checks[name], limit_s=ENGINE_S, min_s=30, needs=()) for name in ENGINES
    )
    return [
        dataclasses.replace(checks["smoke"], about="versions, GPU, installed plugin"),
        stock,
        dataclasses.replace(checks[check.PARITY], limit_s=PARITY_S),
        *(dataclasses.replace(engine, needs=(tokens.STOCK,)) for engine in others),
        # Nothing else may run beside what is timed.
        *(dataclasses.replace(timed[name], alone=True, needs=()) for name in TIMED),
    ]


def summary(results: dict[str, dict], log: Path | None = None) -> tuple[str, dict]:
    """Returns the tables to print last, and verdicts for the result file."""
    checked, passed = check.summary(results, log)
    measured, targets = verdicts.summary(results)
    return "\n\n".join(filter(None, (checked, measured))), {**passed, **targets}


def parser_of() -> argparse.ArgumentParser:
    """The options: those of both programs whose stages these are."""
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__)
    stages.add_options(parser, NAME)
    check.add_options(parser)
    bench.add_options(parser)
    parser.set_defaults(budget_s=BUDGET_S, jobs=check.jobs_at_once(), part=None)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line entry point; returns the exit status: 1 is wrong, 2 not all was run."""
    parser = parser_of()
    finish = partial(summary, log=parser.parse_args(arguments).out / f"{NAME}.log")
    return runner.main(MODULE, NAME, parser, plan, finish, arguments, complete=True)


if __name__ == "__main__":
    sys.exit(main())
