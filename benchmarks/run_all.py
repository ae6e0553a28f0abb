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

from benchmarks import harness, report, results

OFFLOAD = {kind: ["offload", kind] for kind in ("memory", "overlap", "serve")}
SMALL = ["--model", "smollm2"]
FULL = {
    **{name: [name] for name in ("speed", "capacity", "accuracy", "blocks", "kernels")},
    "accuracy-sparda": [
        *("accuracy", "--arms", "selectors", "--contexts", "4096", "8192"),
        *("--tasks", "single", "multikey", "prose"),
    ],
    **OFFLOAD,
    "train-memory": ["train_memory"],
}
# Beside --quick, which every program but the last two has.
QUICK = {
    "speed": ["speed", "--cells", "smollm2-8192-b8"],
    "capacity": ["capacity"],
    "accuracy": [
        *("accuracy", *SMALL, "--contexts", "2048", "--two-turn-context", "2048"),
        *("--arms", "dense,rocket-256,rocket-512"),
    ],
    "accuracy-sparda": [
        *("accuracy", *SMALL, "--contexts", "2048", "--tasks", "multikey"),
        *("--arms", "dense,query-8,lookahead-8,previous-8"),
    ],
    "blocks": ["blocks", *SMALL],
    **OFFLOAD,
}
QUICK = {name: [*arguments, "--quick"] for name, arguments in QUICK.items()}
QUICK["kernels"] = ["kernels", "--layers", "4", "--rounds", "2"]
QUICK["train-memory"] = ["train_memory", "--lengths", "2048"]
ROOT = Path(__file__).parent.parent


def main(arguments: list[str] | None = None) -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run_all", description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="+", choices=list(FULL), metavar="NAME")
    options = parser.parse_args(arguments)
    harness.exit_cleanly()
    folder = (results.FOLDER / "quick" if options.quick else results.FOLDER).relative_to(ROOT)
    failed = []
    for name, (program, *further) in (QUICK if options.quick else FULL).items():
        if options.only and name not in options.only:
            continue
        out = folder / f"{name}.json"
        command = ["-m", f"benchmarks.{program}", *further, "--out", str(out)]
        harness.progress(f"python {' '.join(command)}")
        with subprocess.Popen([sys.executable, *command], cwd=ROOT) as process:
            try:
                code = process.wait()
            except BaseException:
                process.terminate()
                raise
        if code != 0:
            failed.append(name)
        else:
            print(report.render(ROOT / out), flush=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
