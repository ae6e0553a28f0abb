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
from typing import TYPE_CHECKING, NamedTuple

from benchmarks.gpu import check, stages

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from benchmarks.gpu.stages import Report

MODULE, NAME = "benchmarks.gpu.bench", "gpu-bench"
DENSE = "dense"
K = 1024
WHOLE = ("whole step", "whole stage 1", "FlashAttention, dense")


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


def kernels(report: Report, options: argparse.Namespace) -> None:
    """Kernels alone."""
    from benchmarks.gpu import kernels as measured

    measured.measure(report, options)


def kernels_sparda(report: Report, options: argparse.Namespace) -> None:
    """SPARDA's kernels alone."""
    from benchmarks.gpu import kernels_sparda as measured

    measured.measure(report, options)


def decode(report: Report, options: argparse.Namespace) -> None:
    """One arm's decode steps and prefills."""
    from benchmarks.gpu import decode as measured

    measured.measure(options.stage, report, options)


def offload(report: Report, options: argparse.Namespace) -> None:
    """One arm of SPARDA."""
    from benchmarks.gpu import offload as measured

    measured.measure(options.stage.removeprefix("sparda-"), report, options)


def plan(options: argparse.Namespace) -> list[stages.Stage]:
    """All stages: those that the targets are about, then one of each kind, then the rest."""
    interpreted = {"TRITON_INTERPRET": "1"} if options.device == "cpu" else {}

    def arm(name: str, limit_s: float, about: str, baseline: str = DENSE) -> stages.Stage:
        beside = (baseline,) if name != baseline else ()
        return stages.Stage(name, decode, limit_s, ("smoke",), beside=beside, about=about)

    def paged(name: str, limit_s: float, about: str) -> stages.Stage:
        return stages.Stage(f"sparda-{name}", offload, limit_s, ("smoke",), about=about)

    return [
        stages.Stage("smoke", check.smoke, 60, about="GPU, vLLM, installed plugin"),
        stages.Stage("kernels", kernels, 60, ("smoke",), env=interpreted, about="(a) alone"),
        arm(DENSE, 130, "(b, c) FLASH_ATTN"),
        arm("rocket-1024", 120, "(b, c) ROCKETKV, t = 1024"),
        stages.Stage(
            "kernels-sparda",
            kernels_sparda,
            60,
            ("smoke",),
            env=interpreted,
            about="(a) SPARDA's, alone",
        ),
        paged("prefetch", 90, "(d) SPARDA, offloaded, fetched ahead"),
        paged("blocking", 90, "(d) SPARDA, offloaded, fetched when needed"),
        arm("rocket-256", 100, "(b, c) ROCKETKV, t = 256"),
        paged("resident", 75, "(d) SPARDA, all on the device"),
        arm("stage1-1024", 80, "(b) ablation: eviction only"),
        arm("stage2-1024", 80, "(b) ablation: selection only"),
        arm("dense-more", 200, "(b) FLASH_ATTN, largest batches at 8K and 128K", "dense-more"),
        arm("rocket-1024-more", 200, "(b) ROCKETKV, the same", "dense-more"),
    ]


# Reading results.


def steps(result: dict | None) -> dict[tuple[int, int], dict]:
    """Rows of decode steps by context and batch; the later one wins."""
    rows = (result or {}).get("rows", [])
    return {
        (row["context"], row["batch"]): row for row in rows if {"context", "step_ms"} <= row.keys()
    }


def prefills(result: dict | None) -> dict[int, list[float]]:
    """Seconds of each cold prefill by context."""
    found: dict[int, list[float]] = {}
    for row in (result or {}).get("rows", []):
        if "prefill_s" in row:
            found.setdefault(row["context"], []).append(row["prefill_s"])
    return found


def speedups(results: dict[str, dict], arm: str) -> dict[tuple[int, int], tuple[float, float]]:
    """How many times faster a step is than stock vLLM's at equal batch, and its bound."""
    dense = {**steps(results.get("dense-more")), **steps(results.get(DENSE))}
    return {
        key: (
            dense[key]["step_ms"]["median"] / row["step_ms"]["median"],
            dense[key]["least_bytes"] / row["least_bytes"],
        )
        for key, row in steps(results.get(arm)).items()
        if key in dense
    }


def overhead_percent(results: dict[str, dict], arm: str) -> dict[int, float]:
    """By how much a cold prefill takes longer than stock vLLM's."""
    dense = prefills(results.get(DENSE))
    return {
        context: 100 * (statistics.median(seconds) / statistics.median(dense[context]) - 1)
        for context, seconds in prefills(results.get(arm)).items()
        if context in dense
    }


def targets(results: dict[str, dict]) -> list[Target]:
    """The targets for one H200, next to what was found."""
    best: dict[tuple[int, int], tuple[float, float]] = {}
    for arm in ("rocket-1024", "rocket-256"):
        for key, value in speedups(results, arm).items():
            best[key] = max(value, best.get(key, (0.0, 0.0)))
    none = (None, None)
    largest = {
        arm: results.get(arm, {}).get("facts", {}).get("largest", {})
        for arm in (DENSE, "rocket-1024")
    }
    dense_most = largest[DENSE].get(str(32 * K))
    ours_most = largest["rocket-1024"].get(str(32 * K))
    at_most = best.get((32 * K, dense_most), none)
    overheads = [
        value
        for arm in ("rocket-1024", "rocket-256")
        for value in overhead_percent(results, arm).values()
    ]
    return [
        Target("16K, batch 1: speed-up", best.get((16 * K, 1), none)[0], 1.0, *_bound(best, 16)),
        Target("32K, batch 1: speed-up", best.get((32 * K, 1), none)[0], 1.2, *_bound(best, 32)),
        Target("128K, batch 1: speed-up", best.get((128 * K, 1), none)[0], 1.8, *_bound(best, 128)),
        Target("32K, stock's largest batch: throughput", at_most[0], 4.0, at_most[1]),
        Target(
            "32K, t = 1024: largest batch over stock's",
            ours_most / dense_most if ours_most and dense_most else None,
            3.5,
        ),
        Target("prefill overhead, %, worst context", max(overheads, default=None), None, most=3.0),
    ]


def _bound(best: dict, thousands: int) -> tuple[float | None]:
    return (best.get((thousands * K, 1), (None, None))[1],)


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
        (
            *(row.get(key) for key in keys),
            row.get("share_of_copy"),
            row.get("share_of_link"),
        )
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
        most = result["facts"].get("largest", {})
        for (context, batch), row in steps(result).items() if most else ():
            faster, bound = ratios.get((context, batch), (None, None))
            lines.append(
                (
                    arm, context, batch, most.get(str(context)), row["step_ms"]["median"],
                    row["bound_ms"], row["tokens_per_s"], faster, bound,
                )
            )  # fmt: skip
    if lines:
        header = ("arm", "context", "batch", "fit", "step ms", "bound ms", "tokens/s")
        yield stages.table((*header, "x dense", "bound"), lines)
    times = [
        (arm, context, statistics.median(seconds), overhead_percent(results, arm).get(context))
        for arm, result in results.items()
        for context, seconds in prefills(result).items()
    ]
    if times:
        yield stages.table(("arm", "context", "prefill s", "overhead %"), times)


def _sparda_table(results: dict[str, dict]) -> Iterator[str]:
    keys = (
        *("rate", "batch", "tokens_per_s", "bound_ms", "exposed_wait_ms", "fetched_mib"),
        "link_gb_per_s",
    )
    lines = [
        (name, row["step_ms"]["median"], *(row[key] for key in keys), row["as_forced"])
        for name, result in results.items()
        if name.startswith("sparda-")
        for row in result["rows"]
        if "exposed_wait_ms" in row
    ]
    if lines:
        header = ("arm", "step ms", "miss rate", "batch", "tokens/s", "bound ms", "wait ms")
        yield stages.table((*header, "MiB/step", "GB/s", "as forced"), lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__)
    stages.add_options(parser, NAME)
    parser.add_argument("--compile", action="store_true", help="engines as vLLM compiles them")
    parser.add_argument("--device-kv-gib", type=float, default=4.0, help="of each arm of SPARDA")
    parser.add_argument("--host-gib", type=float, default=64.0, help="most host memory for SPARDA")
    parser.add_argument("--sparda-context", type=int, default=32 * K)
    parser.add_argument("--sparda-eager", action="store_true", help="no graphs for SPARDA")
    return stages.main(MODULE, NAME, parser, plan, summary, arguments)


if __name__ == "__main__":
    sys.exit(main())
