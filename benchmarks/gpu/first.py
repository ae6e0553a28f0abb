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
BUDGET_S = 550  # ending a stage that hangs takes up to 13 s more
# Whatever comes to its limit, there is time for all of `TIMED` but the last.
STOCK_S, PARITY_S, ENGINE_S = 120, 200, 90
ENGINES, BASELINES = ("whole-graphs", "sparda-whole"), ("quest", "snapkv", "streamingllm")
TIMED = {verdicts.DENSE: 140, "rocket-1024": 110, "sparda-offload": 150, "sparda-resident": 90}


def plan(options: argparse.Namespace) -> list[stages.Stage]:
    """All stages, the most valuable first.

    None needs another one but for what it is compared with: a check that fails says so, and the
    rest is measured all the same.
    """
    checks = {stage.name: stage for stage in check.plan(options)}
    timed = {stage.name: stage for stage in bench.plan(options)}

    def engine(name: str, limit_s: float, *needs: str) -> stages.Stage:
        return dataclasses.replace(checks[name], limit_s=limit_s, min_s=30, needs=needs)

    return [
        dataclasses.replace(checks["smoke"], about="versions, GPU, installed plugin"),
        engine(tokens.STOCK, STOCK_S),
        dataclasses.replace(checks[check.PARITY], limit_s=PARITY_S),
        *(engine(name, ENGINE_S, tokens.STOCK) for name in ENGINES),
        # Nothing else may run beside what is timed.
        *(
            dataclasses.replace(timed[name], limit_s=limit_s, alone=True, needs=())
            for name, limit_s in TIMED.items()
        ),
        *(engine(name, ENGINE_S, tokens.STOCK) for name in BASELINES),
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
