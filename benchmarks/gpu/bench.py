# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""How fast the backends are on this GPU, against stock vLLM and against the bounds.

``make gpu-bench``, or ``python -m benchmarks.gpu.bench``: kernels, decode steps and prefills of
FLASH_ATTN and ROCKETKV, SPARDA at forced miss rates. Weights are random, in the shapes of
Llama-3.1-8B and MiniCPM4.1-8B, so nothing is downloaded and nothing is said about accuracy. Prints
tables last and writes ``gpu-bench.json`` and ``gpu-bench.log`` to the folder given by ``--out``.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from typing import TYPE_CHECKING

from benchmarks.gpu import check, runner, stages
from benchmarks.gpu.verdicts import DENSE, summary

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benchmarks.gpu.stages import Report

MODULE, NAME = "benchmarks.gpu.bench", "gpu-bench"
K = 1024


def kernels(kind: str, report: Report, options: argparse.Namespace) -> None:
    """Kernels alone."""
    from benchmarks.ops import timings

    timings.measure(kind, report, options)


def decode(report: Report, options: argparse.Namespace) -> None:
    """One arm's decode steps and prefills."""
    from benchmarks.gpu import decode as measured

    measured.measure(options.stage, report, options)


def paged_steps(report: Report, options: argparse.Namespace) -> None:
    """One arm of SPARDA."""
    from benchmarks.gpu import forced as measured

    measured.measure(options.stage.removeprefix("sparda-"), report, options)


def plan(options: argparse.Namespace) -> list[stages.Stage]:
    """All stages of the part, or of all parts, the most valuable first."""
    interpreted = {"TRITON_INTERPRET": "1"} if options.device == "cpu" else {}

    def arm(
        name: str, limit_s: float, min_s: float, about: str, baseline: str = DENSE
    ) -> stages.Stage:
        beside = (baseline,) if name != baseline else ()
        return stages.Stage(
            name, decode, limit_s, ("smoke",), beside=beside, min_s=min_s, about=about
        )

    def paged(name: str, limit_s: float, min_s: float, about: str) -> stages.Stage:
        return stages.Stage(
            f"sparda-{name}", paged_steps, limit_s, ("smoke",), min_s=min_s, env=interpreted,
            about=about,
        )  # fmt: skip

    def alone(name: str, run: Callable[..., None], about: str) -> stages.Stage:
        return stages.Stage(
            name, run, 60, ("smoke",), min_s=25, env=interpreted, about=f"(a) {about}, alone"
        )

    smoke = stages.Stage("smoke", check.smoke, 60, about="GPU, vLLM, installed plugin")
    dense = arm(DENSE, 200, 70, "(b, c) FLASH_ATTN")
    rocket = arm("rocket-1024", 140, 70, "(b, c) ROCKETKV, t = 1024")
    offloaded = paged("offload", 150, 90, "(d) SPARDA, offloaded, both ways to fetch")
    resident = paged("resident", 90, 60, "(d) SPARDA, all on the device")
    kernels_of = {
        "rocketkv": alone("kernels", partial(kernels, "rocketkv"), "ROCKETKV's kernels"),
        "sparda": alone("kernels-sparda", partial(kernels, "sparda"), "SPARDA's kernels"),
    }
    first = [smoke, dense, rocket, offloaded, resident, *kernels_of.values()]
    parts = {
        "rocketkv": [
            *(smoke, kernels_of["rocketkv"], dense, rocket),
            arm("rocket-256", 100, 65, "(b, c) ROCKETKV, t = 256"),
            arm("stage1-1024", 80, 55, "(b) ablation: eviction only"),
            arm("stage2-1024", 80, 55, "(b) ablation: selection only"),
            arm("dense-again", 60, 50, "(b) FLASH_ATTN once more, for drift"),
        ],
        "sparda": [
            *(smoke, kernels_of["sparda"], offloaded, resident),
            paged("first", 150, 90, "(d) SPARDA, offloaded but for the first layer"),
        ],
        "more": [
            smoke,
            arm(
                "dense-more", 200, 90, "(b) FLASH_ATTN at 8K, largest batch at 128K",
                "dense-more",
            ),
            arm("rocket-1024-more", 200, 90, "(b) ROCKETKV, the same", "dense-more"),
            arm("rocket-256-more", 200, 90, "(b) ROCKETKV, the same, t = 256", "dense-more"),
            arm("dense-blocks-of-64", 70, 50, "(b) FLASH_ATTN with blocks of 64 tokens", DENSE),
            arm(
                "rocket-1024-blocks-of-128", 80, 55, "(b) ROCKETKV with blocks of 128 tokens",
                DENSE,
            ),
            arm("dense-compiled", 150, 100, "(b) FLASH_ATTN as vLLM compiles it", DENSE),
        ],
    }  # fmt: skip
    if options.part:
        return parts[options.part]
    every = [*first, *(stage for part in parts.values() for stage in part)]
    return list({stage.name: stage for stage in every}.values())


def parser_of() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__)
    stages.add_options(parser, NAME)
    parser.add_argument(
        "--part",
        choices=("rocketkv", "sparda", "more"),
        help="these stages, 9 minutes each; unset: the most wanted of all, then the rest",
    )
    parser.set_defaults(budget_s=550)
    add_options(parser)
    return parser


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of engines that are timed."""
    parser.add_argument("--compile", action="store_true", help="engines as vLLM compiles them")
    # Of 32K tokens, 4 requests fill it if all is resident, and 19 if it is offloaded.
    parser.add_argument("--device-kv-gib", type=float, default=4.2, help="of each arm of SPARDA")
    parser.add_argument("--host-gib", type=float, default=64.0, help="most host memory for SPARDA")
    parser.add_argument("--sparda-context", type=int, default=32 * K)
    parser.add_argument("--sparda-eager", action="store_true", help="no graphs for SPARDA")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line entry point; returns the exit status."""
    return runner.main(MODULE, NAME, parser_of(), plan, summary, arguments)


if __name__ == "__main__":
    sys.exit(main())
