# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Runs every benchmark, one after the other, and prints the report.

``python -m benchmarks.run_all`` takes hours on two cores; ``--quick`` takes about an hour and
writes to ``benchmarks/results/quick``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from benchmarks import harness, report

OFFLOAD = ("memory", "overlap", "serve")
SPARDA_ARMS = ",".join(
    [
        "dense,sparse-dense",
        *(f"{kind}-{top}" for kind in ("query", "lookahead", "previous") for top in (8, 16, 32)),
    ]
)


def commands(quick: bool) -> dict[str, list[str]]:
    """Returns the arguments of each program, by the name of its result."""
    if quick:
        return {
            "speed": ["benchmarks.speed", "--quick", "--cells", "smollm2-8192-b8"],
            "capacity": ["benchmarks.capacity", "--quick"],
            "accuracy": [
                *("benchmarks.accuracy", "--quick", "--model", "smollm2"),
                *("--contexts", "2048", "--two-turn-context", "2048"),
                *("--arms", "dense,rocket-256,rocket-512"),
            ],
            "accuracy-sparda": [
                *("benchmarks.accuracy", "--quick", "--model", "smollm2", "--contexts", "2048"),
                *("--tasks", "multikey", "--arms", "dense,query-8,lookahead-8,previous-8"),
            ],
            "oracle": ["benchmarks.oracle", "--quick", "--model", "smollm2", "--context", "2048"],
            "blocks": ["benchmarks.blocks", "--quick", "--model", "smollm2"],
            **{kind: ["benchmarks.offload", kind, "--quick"] for kind in OFFLOAD},
        }
    return {
        "speed": ["benchmarks.speed"],
        "capacity": ["benchmarks.capacity"],
        "accuracy": ["benchmarks.accuracy"],
        "accuracy-sparda": [
            *("benchmarks.accuracy", "--arms", SPARDA_ARMS, "--contexts", "4096", "8192"),
            *("--tasks", "single", "multikey", "prose"),
        ],
        "oracle": ["benchmarks.oracle"],
        "blocks": ["benchmarks.blocks"],
        **{kind: ["benchmarks.offload", kind] for kind in OFFLOAD},
    }


def main() -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run_all", description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="+", choices=list(commands(False)), metavar="NAME")
    options = parser.parse_args()
    harness.exit_cleanly()
    folder = harness.RESULTS_DIR / "quick" if options.quick else harness.RESULTS_DIR
    folder = folder.relative_to(Path(__file__).parent.parent)
    failed = []
    for name, arguments in commands(options.quick).items():
        if options.only and name not in options.only:
            continue
        out = folder / f"{name}.json"
        command = [sys.executable, "-m", *arguments, "--out", str(out)]
        harness.progress(f"python {' '.join(command[1:])}")
        with subprocess.Popen(command, cwd=Path(__file__).parent.parent) as process:
            try:
                code = process.wait()
            except BaseException:
                process.terminate()
                raise
        if code != 0:
            failed.append(name)
        else:
            print(report.render(Path(__file__).parent.parent / out), flush=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
