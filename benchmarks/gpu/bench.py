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
import statistics
import sys
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from benchmarks.gpu import check, runner, stages

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from benchmarks.gpu.stages import Report

MODULE, NAME = "benchmarks.gpu.bench", "gpu-bench"
DENSE, MOST = "dense", "most"
K = 1024
FORCED = 0.1  # miss rate of the targets
WHOLE = ("whole step", "whole stage 1", "FlashAttention, pages of 16, as vLLM plans it")


class Target(NamedTuple):
    """What is to be reached on one H200.

    Attributes:
        what: In words.
        found: What was measured; None if it was not.
        least: Reached if found is at least this.
        bound: What bandwidth allows, for a reader; None if there is no bound.
        most: Reached if found is at most this, in place of `least`.
    """

    what: str
    found: float | None
    least: float | None
    bound: float | None = None
    most: float | None = None

    @property
    def verdict(self) -> str:
        """``yes``, ``no`` or ``not measured``."""
        if self.found is None:
            return "not measured"
        if self.least is not None and self.found < self.least:
            return "no"
        return "no" if self.most is not None and self.found > self.most else "yes"


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
            f"sparda-{name}",
            paged_steps,
            limit_s,
            ("smoke",),
            min_s=min_s,
            env=interpreted,
            about=about,
        )

    def alone(name: str, run: Callable[..., None], about: str) -> stages.Stage:
        return stages.Stage(
            name, run, 60, ("smoke",), min_s=25, env=interpreted, about=f"(a) {about}, alone"
        )

    smoke = stages.Stage("smoke", check.smoke, 60, about="GPU, vLLM, installed plugin")
    dense = arm(DENSE, 140, 70, "(b, c) FLASH_ATTN")
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
                "dense-more",
                200,
                90,
                "(b) FLASH_ATTN, largest batches at 8K and 128K",
                "dense-more",
            ),
            arm("rocket-1024-more", 200, 90, "(b) ROCKETKV, the same", "dense-more"),
            arm("rocket-256-more", 200, 90, "(b) ROCKETKV, the same, t = 256", "dense-more"),
            arm("dense-blocks-of-64", 70, 50, "(b) FLASH_ATTN with blocks of 64 tokens", DENSE),
            arm("dense-compiled", 150, 100, "(b) FLASH_ATTN as vLLM compiles it", DENSE),
        ],
    }
    if options.part:
        return parts[options.part]
    every = [*first, *(stage for part in parts.values() for stage in part)]
    return list({stage.name: stage for stage in every}.values())


# Reading results.


def steps(result: dict | None) -> dict[tuple[int, int], dict]:
    """Rows of decode steps by context and batch; the later one wins."""
    rows = (result or {}).get("rows", [])
    return {
        (row["context"], row["batch"]): row
        for row in rows
        if {"context", "wanted", "step_ms"} <= row.keys()
    }


def prefills(result: dict | None) -> dict[int, list[float]]:
    """Seconds of each cold prefill by context."""
    found: dict[int, list[float]] = {}
    for row in (result or {}).get("rows", []):
        if "prefill_s" in row:
            found.setdefault(row["context"], []).append(row["prefill_s"])
    return found


def speedups(results: dict[str, dict], arm: str) -> dict[tuple[int, int], tuple[float, float]]:
    """How many times faster a step is than stock vLLM's at equal batch, and its bound.

    A batch that was preempted is none of its size, and does not count.
    """
    dense = {**steps(results.get("dense-more")), **steps(results.get(DENSE))}
    return {
        key: (
            dense[key]["step_ms"]["median"] / row["step_ms"]["median"],
            dense[key]["least_bytes"] / row["least_bytes"],
        )
        for key, row in steps(results.get(arm)).items()
        if key in dense and not (row["preemptions"] or dense[key]["preemptions"])
    }


def largest(results: dict[str, dict], arm: str, context: int) -> int | None:
    """The largest batch that was measured to run at once; None if that was not reached."""
    return max(
        (
            row["batch"]
            for row in steps(results.get(arm)).values()
            if (row["context"], row["wanted"], row["preemptions"]) == (context, MOST, 0)
        ),
        default=None,
    )


def overheads(results: dict[str, dict], arm: str) -> dict[int, float]:
    """By how many percent cold prefills take longer than stock vLLM's, where both have several."""
    dense = prefills(results.get(DENSE))
    return {
        context: 100 * (statistics.median(seconds) / statistics.median(dense[context]) - 1)
        for context, seconds in prefills(results.get(arm)).items()
        if min(len(seconds), len(dense.get(context, ()))) > 1
    }


def paged_row(results: dict[str, dict], stage: str, arm: str, rate: float) -> dict | None:
    """The row of SPARDA's arm at a miss rate, if the misses were those that were forced."""
    for row in results.get(stage, {}).get("rows", []):
        if row.get("arm") == arm and row["rate"] == rate and row["as_forced"]:
            return row
    return None


def targets(results: dict[str, dict]) -> list[Target]:
    """The targets for one H200, next to what was found."""
    dense_most = largest(results, DENSE, 32 * K)
    ours_most = largest(results, "rocket-1024", 32 * K)
    found = []
    for budget in (1024, 256):
        ratios = speedups(results, f"rocket-{budget}")
        cells = [
            *((f"{n}K, batch 1", (n * K, 1), x) for n, x in ((16, 1.0), (32, 1.2), (128, 1.8))),
            ("32K, stock's largest batch", (32 * K, dense_most), 4.0),
        ]
        for what, key, least in cells:
            ratio, bound = ratios.get(key, (None, None))
            found.append(Target(f"{what}, t = {budget}: x dense", ratio, least, bound))
    over = overheads(results, "rocket-1024")
    return [
        *found,
        Target(
            "32K, t = 1024: largest batch over stock's",
            ours_most / dense_most if ours_most and dense_most else None,
            3.5,
        ),
        *(
            Target(f"prefill overhead at {n}K, t = 1024, %", over.get(n * K), None, most=3.0)
            for n in (32, 128)
        ),
        *_paged_targets(results),
    ]


def _paged_targets(results: dict[str, dict]) -> Iterator[Target]:
    ahead = paged_row(results, "sparda-offload", "prefetch", FORCED)
    for what, least, other in (
        ("prefetch over blocking", 1.5, paged_row(results, "sparda-offload", "blocking", FORCED)),
        ("over all resident", 4.0, paged_row(results, "sparda-resident", "resident", FORCED)),
    ):
        ratio = bound = None
        if ahead and other:
            batches = ahead["batch"] / other["batch"]
            ratio = ahead["tokens_per_s"] / other["tokens_per_s"]
            bound = batches * other["bound_ms"] / ahead["bound_ms"]
        yield Target(f"SPARDA, {FORCED:.0%} misses: tokens/s, {what}", ratio, least, bound)


def summary(results: dict[str, dict]) -> tuple[str, dict]:
    """Returns the tables to print last, and what to write beside the stages."""
    found = targets(results)
    parts = [
        *_kernel_table(results),
        *_sparda_kernel_table(results),
        *_step_table(results),
        *_sparda_table(results),
    ]
    parts.append(
        stages.table(
            ("target", "found", "wanted", "bound", "reached"),
            [
                (
                    target.what,
                    target.found,
                    f"<= {target.most:g}" if target.least is None else f">= {target.least:g}",
                    target.bound,
                    target.verdict,
                )
                for target in found
            ],
        )
    )
    verdicts = [{**target._asdict(), "reached": target.verdict} for target in found]
    return "\n\n".join(parts), {"targets": verdicts}


def _kernel_table(results: dict[str, dict]) -> Iterator[str]:
    result = results.get("kernels", {"rows": [], "facts": {}})
    rows = [row for row in result["rows"] if "us" in row]
    # All parts of the first shape only: the table is to be short, and the file has the rest.
    shape = ("context", "budget", "batch", "block_size")
    rows = [
        row
        for row in rows
        if row["kernel"] in WHOLE or all(row[key] == rows[0][key] for key in shape)
    ]
    if rows:
        header = ("kernel", "context", "budget", "batch", "block", "us", "GB/s", "of a copy")
        keys = ("kernel", "context", "budget", "batch", "block_size", "us", "gb_per_s")
        yield f"copy: {result['facts'].get('copy_gb_per_s')} GB/s\n" + stages.table(
            header, [(*(row[key] for key in keys), row["share_of_copy"]) for row in rows]
        )


def _sparda_kernel_table(results: dict[str, dict]) -> Iterator[str]:
    result = results.get("kernels-sparda", {"rows": [], "facts": {}})
    keys = ("kernel", "programs", "context", "batch", "misses", "us", "gb_per_s")
    lines = [
        (*(row.get(key) for key in keys), row.get("share_of_copy"), row.get("share_of_link"))
        for row in result["rows"]
        if "us" in row
    ]
    if lines:
        facts = result["facts"]
        header = ("kernel", "programs", "context", "batch", "misses", "us", "GB/s")
        yield (
            f"{facts.get('shape')}; copy: {facts.get('copy_gb_per_s')} GB/s, "
            f"link: {facts.get('link_gb_per_s')} GB/s\n"
        ) + stages.table((*header, "of a copy", "of the link"), lines)


def _step_table(results: dict[str, dict]) -> Iterator[str]:
    lines = []
    for arm, result in results.items():
        ratios = speedups(results, arm)
        for (context, batch), row in steps(result).items():
            faster, bound = ratios.get((context, batch), (None, None))
            lines.append(
                (
                    arm, context, batch, row["step_ms"]["median"], row["step_ms"].get("p99"),
                    row["bound_ms"], row["tokens_per_s"], row["preemptions"], faster, bound,
                )
            )  # fmt: skip
    if lines:
        engines = {
            arm: result["facts"] for arm, result in results.items() if arm in {x[0] for x in lines}
        }
        yield stages.table(
            ("arm", "graphs", "compilation", "copy GB/s", "pool tokens"),
            [
                (
                    arm,
                    *(facts.get(key, "").rpartition(".")[2] for key in ("graphs", "compilation")),
                    facts.get("copy_gb_per_s"),
                    facts.get("pool_tokens"),
                )
                for arm, facts in engines.items()
            ],
        )
        header = ("arm", "context", "batch", "step ms", "p99", "bound ms", "tokens/s", "preempted")
        yield stages.table((*header, "x dense", "bound"), lines)
    times = [
        (
            arm, context, len(seconds), statistics.median(seconds), min(seconds),
            overheads(results, arm).get(context),
        )
        for arm, result in results.items()
        for context, seconds in prefills(result).items()
    ]  # fmt: skip
    if times:
        yield stages.table(("arm", "context", "prefills", "median s", "least", "overhead %"), times)


def _sparda_table(results: dict[str, dict]) -> Iterator[str]:
    for name, result in results.items():
        rows = sorted(
            (row for row in result["rows"] if "as_forced" in row),
            key=lambda row: (row["rate"], row["arm"]),
        )
        if not rows:
            continue
        facts = result["facts"]
        sized, link = facts.get("plan", {}), facts.get("link_gb_per_s", {})
        yield (
            f"{name}: {sized.get('device_gib', 0.0):.2f} of {facts.get('device_kv_gib')} GiB for "
            f"keys and values; {facts.get('graphs')}; link {link.get('host_to_device')} GB/s\n"
        ) + stages.table(
            (
                *("arm", "context", "batch", "new %", "step ms", "p99", "bound ms", "wait ms"),
                *("tokens/s", "MiB/step", "GB/s in flight", "as forced"),
            ),
            [
                (
                    row["arm"], row["context"], row["batch"], 100 * row["new_share"],
                    row["step_ms"]["median"], row["step_ms"].get("p99"), row["bound_ms"],
                    row.get("exposed_wait_ms"), row["tokens_per_s"], row["fetched_mib"],
                    row.get("in_flight_gb_per_s"), row["as_forced"],
                )
                for row in rows
            ],
        )  # fmt: skip


def parser_of() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__)
    stages.add_options(parser, NAME)
    parser.add_argument(
        "--part",
        choices=("rocketkv", "sparda", "more"),
        help="these stages, 8 minutes each; unset: the most wanted of all, then the rest",
    )
    parser.add_argument("--compile", action="store_true", help="engines as vLLM compiles them")
    # Of 32K tokens, 4 requests fill it if all is resident, and 19 if it is offloaded.
    parser.add_argument("--device-kv-gib", type=float, default=4.2, help="of each arm of SPARDA")
    parser.add_argument("--host-gib", type=float, default=64.0, help="most host memory for SPARDA")
    parser.add_argument("--sparda-context", type=int, default=32 * K)
    parser.add_argument("--sparda-eager", action="store_true", help="no graphs for SPARDA")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line entry point; returns the exit status."""
    return runner.main(MODULE, NAME, parser_of(), plan, summary, arguments)


if __name__ == "__main__":
    sys.exit(main())
