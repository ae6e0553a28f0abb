# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""``vllm-sparse convert-forecast``: official SparDA checkpoints to safetensors, and back."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse


def add_command(subparsers: Any) -> None:
    """Adds ``vllm-sparse convert-forecast``."""
    parser = subparsers.add_parser(
        "convert-forecast",
        help="convert Forecast weights between the official format and safetensors",
        description="Converts an official SparDA checkpoint (.pt, .bin, .safetensors or a "
        "directory) to a safetensors file that SPARDA serves, without executing anything in it. "
        "With a TARGET that ends in .pt or .bin: the way back.",
    )
    parser.add_argument("source", metavar="SOURCE", type=Path, help="file or directory to read")
    parser.add_argument(
        "target", metavar="TARGET", type=Path, help="file to write, *.safetensors, *.pt or *.bin"
    )
    parser.add_argument(
        "--base-model", metavar="NAME", help="model of the Forecast, recorded in a safetensors file"
    )
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from vllm_sparse.forecast.official import convert_official, export_official

    suffix = arguments.target.suffix
    if suffix == ".safetensors":
        convert_official(arguments.source, arguments.target, arguments.base_model)
    elif suffix in (".pt", ".bin"):
        export_official(arguments.source, arguments.target)
    else:
        print(
            f"vllm-sparse: the target {arguments.target} should end in .safetensors, .pt or "
            ".bin, which decides the direction",
            file=sys.stderr,
        )
        return 2
    print(arguments.target)
    return 0
