# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Measures again what the published results say, one after the other, and prints the report.

Each file of ``benchmarks/results`` says by which commands it was made; they run again and write
files of the same names into ``build/results``. Copied over the published ones, ``make tables`` and
``make report`` make tables and pictures of them. All of it takes days on two cores, ``--only``
chooses; ``--quick`` is a small run of each program, and takes about an hour.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

from benchmarks import harness, report, results

SMALL = ["--model", "smollm2"]
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
    **{kind: ["offload", kind] for kind in ("memory", "overlap", "serve")},
    **{name: [name] for name in ("prompts", "serving", "replay", "drafts", "generations", "lists")},
    "quality": ["quality.judge", "--arms", "dense,rocketkv-512"],
}
QUICK = {name: [*arguments, "--quick"] for name, arguments in QUICK.items()}
QUICK["kernels"] = ["kernels", "--layers", "4", "--rounds", "2"]
QUICK["train-memory"] = ["train_memory", "--lengths", "2048"]
QUICK["recall"] = ["recall", "--quick"]
ROOT = Path(__file__).parent.parent
OUT = Path("build/results")
_BEFORE = "python -m benchmarks."


def commands_of(path: Path) -> list[list[str]]:
    """What made a file, in order: programs with their arguments but ``--out``."""
    found = json.loads(path.read_text())
    commands = []
    for run in (found["environment"], *found.get("resumed", [])):
        program, *arguments = shlex.split(run["command"].removeprefix(_BEFORE))
        if "--out" in arguments:
            at = arguments.index("--out")
            del arguments[at : at + 2]
        commands.append([program, *arguments])
    return commands


def published() -> dict[str, list[list[str]]]:
    """Commands by the name of the file that they make."""
    return {path.stem: commands_of(path) for path in sorted(results.FOLDER.glob("*.json"))}


def run(arguments: list[str], out: Path) -> bool:
    """Runs one program.

    Args:
        arguments: Its name and options.
        out: Its result, from the repository.

    Returns:
        Whether it ended well.
    """
    command = ["-m", f"benchmarks.{arguments[0]}", *arguments[1:], "--out", str(out)]
    harness.progress(f"python {shlex.join(command)}")
    with subprocess.Popen([sys.executable, *command], cwd=ROOT) as process:
        try:
            return process.wait() == 0
        except BaseException:
            process.terminate()
            raise


def main(arguments: list[str] | None = None) -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run_all", description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="files, without .json")
    options = parser.parse_args(arguments)
    harness.exit_cleanly()
    chosen = {name: [each] for name, each in QUICK.items()} if options.quick else published()
    if strange := set(options.only or []) - set(chosen):
        parser.error(f"{sorted(strange)[0]} is none of {', '.join(chosen)}")
    folder = OUT / "quick" if options.quick else OUT
    failed = []
    for name, commands in chosen.items():
        if options.only and name not in options.only:
            continue
        out = folder / f"{name}.json"
        if not all(run(each, out) for each in commands):
            failed.append(name)
        else:
            print(report.render(ROOT / out), flush=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
