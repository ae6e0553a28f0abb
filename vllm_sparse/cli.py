# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The ``vllm-sparse`` command.

Each command lives in a module of its own, which offers ``add_command(subparsers)``: it adds its
parser and sets ``run``, a function from the parsed arguments to the exit status, which may raise
``VllmSparseError``. These modules import heavy packages only when they run.
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module, metadata

from vllm_sparse.errors import VllmSparseError

COMMAND_MODULES = (
    "vllm_sparse.demo.models",
    "vllm_sparse.demo.run",
    "vllm_sparse.doctor.commands",
    "vllm_sparse.forecast.convert",
    "vllm_sparse.planner.commands",
    "vllm_sparse.training.commands",
)


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser with all commands."""
    parser = argparse.ArgumentParser(
        prog="vllm-sparse", description="Tools for the sparse attention backends of vLLM."
    )
    parser.add_argument("--version", action="version", version=metadata.version("vllm-sparse"))
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in COMMAND_MODULES:
        import_module(name).add_command(subparsers)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    arguments = build_parser().parse_args(argv)
    try:
        status: int = arguments.run(arguments)
    except VllmSparseError as error:
        print(f"vllm-sparse: {error}", file=sys.stderr)
        return 1
    return status


if __name__ == "__main__":
    raise SystemExit(main())
