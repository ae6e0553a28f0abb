# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What the stages of ``gpu-bench`` have found: tables, and verdicts on the targets for one H200."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.tables import table

if TYPE_CHECKING:
    from collections.abc import Iterator

    Results = dict[str, dict[str, Any]]

DENSE, MOST = "dense", "most"
K = 1024
FORCED = 0.1  # miss rate of the targets
WHOLE = ("whole step", "whole stage 1", "FlashAttention, pages of 16, as vLLM plans it")


class Target(NamedTuple):
    """What is to be reached on one H200: at least `least`, or at most `most`.

    `found` is None if it was not measured; `bound` is what bandwidth allows, if there is a bound,
    and `predicted` what the cost model expects of this GPU.
    """

    what: str
    found: float | None
    least: float | None
    bound: float | None = None
    most: float | None = None
    predicted: float | None = None

    @property
    def verdict(self) -> str:
        """``yes``, ``no`` or ``not measured``."""
        if self.found is None:
            return "not measured"
        if self.least is not None and self.found < self.least:
            return "no"
        return "no" if self.most is not None and self.found > self.most else "yes"


def steps(result: dict | None) -> dict[tuple[int, int], dict]:
    """Rows of decode steps by context and batch; the later one wins."""
    rows = (result or {}).get("rows", [])
    return {
        (row["context"], row["batch"]): row
        for row in rows
        if {"context", "wanted", "step_ms"} <= row.keys()
    }


def prefills(result: dict | None) -> dict[int, list[float]]:
    """Seconds of each cold prompt by context, to its second token, by which it is compacted."""
    found: dict[int, list[float]] = {}
    for row in (result or {}).get("rows", []):
        if "second_token_s" in row:
            found.setdefault(row["context"], []).append(row["second_token_s"])
    return found


def speedups(results: Results, arm: str) -> dict[tuple[int, int], tuple[float, float, float]]:
    """How many times faster a step is than stock vLLM's at equal batch, its bound, and predicted.

    A batch that was preempted is none of its size, and does not count.
    """
    dense = steps(_with_more(results, DENSE))
    return {
        key: (
            dense[key]["step_ms"]["median"] / row["step_ms"]["median"],
            dense[key]["least_bytes"] / row["least_bytes"],
            dense[key]["predicted_ms"] / row["predicted_ms"],
        )
        for key, row in steps(results.get(arm)).items()
        if key in dense and not (row["preemptions"] or dense[key]["preemptions"])
    }


def _with_more(results: Results, arm: str) -> dict[str, Any]:
    """An arm's rows and those of its larger batches; where both have one, the arm's own wins."""
    return {
        "rows": [
            row for name in (f"{arm}-more", arm) for row in results.get(name, {}).get("rows", [])
        ]
    }


def largest(results: Results, arm: str, context: int) -> int | None:
    """The largest batch that was measured to run at once; None if that was not reached."""
    return max(
        (
            row["batch"]
            for row in steps(results.get(arm)).values()
            if (row["context"], row["wanted"], row["preemptions"]) == (context, MOST, 0)
        ),
        default=None,
    )


def overheads(results: Results, arm: str) -> dict[int, float]:
    """By how many percent cold prompts take longer than stock vLLM's, where both have several."""
    dense = prefills(_with_more(results, DENSE))
    return {
        context: 100 * (statistics.median(seconds) / statistics.median(dense[context]) - 1)
        for context, seconds in prefills(_with_more(results, arm)).items()
        if min(len(seconds), len(dense.get(context, ()))) > 1
    }


def paged_row(results: Results, stage: str, arm: str, rate: float) -> dict | None:
    """The row of SPARDA's arm at a miss rate, if the misses were those that were forced."""
    for row in results.get(stage, {}).get("rows", []):
        if row.get("arm") == arm and row["rate"] == rate and row["as_forced"]:
            return row
    return None


def targets(results: Results) -> list[Target]:
    """The targets, next to what was found."""
    dense_most = largest(results, DENSE, 32 * K)
    ours_most = largest(results, "rocket-1024", 32 * K)
    found = []
    for budget in (1024, 256):
        ratios = speedups(results, f"rocket-{budget}")
        cells = [
            *((f"{n}K, batch 1", (n * K, 1), x) for n, x in ((16, 1.05), (32, 1.2), (128, 2.0))),
            ("32K, stock's largest batch", (32 * K, dense_most), 6.0),
        ]
        for what, key, least in cells:
            ratio, bound, predicted = ratios.get(key, (None, None, None))
            name = f"{what}, t = {budget}: x dense"
            found.append(Target(name, ratio, least, bound, predicted=predicted))
    more = ours_most / dense_most if ours_most and dense_most else None
    found.append(Target("32K, t = 1024: largest batch over stock's", more, 3.5))
    over = overheads(results, "rocket-1024")
    for n in (32, 128):
        what = f"prompt overhead at {n}K, t = 1024, %"
        found.append(Target(what, over.get(n * K), None, most=2.0))
    ahead = paged_row(results, "sparda-offload", "prefetch", FORCED)
    for what, least, other in (
        ("prefetch over blocking", 1.5, paged_row(results, "sparda-offload", "blocking", FORCED)),
        ("over all resident", 4.0, paged_row(results, "sparda-resident", "resident", FORCED)),
    ):
        ratio = bound = None
        if ahead and other:
            ratio = ahead["tokens_per_s"] / other["tokens_per_s"]
            bound = ahead["batch"] / other["batch"] * other["bound_ms"] / ahead["bound_ms"]
        found.append(Target(f"SPARDA, {FORCED:.0%} misses: tokens/s, {what}", ratio, least, bound))
    return found


def wanted(target: dict[str, Any]) -> str:
    """What a target's fields ask for, in signs."""
    least, most = target["least"], target["most"]
    return f"<= {most:g}" if least is None else f">= {least:g}"


def summary(results: Results) -> tuple[str, dict]:
    """Returns the tables to print last, and what to write beside the stages."""
    rows = [{**target._asdict(), "reached": target.verdict} for target in targets(results)]
    columns = {
        "target": "what",
        "found": "found",
        "wanted": wanted,
        **{"bound": "bound", "predicted": "predicted", "reached": "reached"},
    }
    parts = [
        *_kernel_tables(results),
        *_step_tables(results),
        *_paged_tables(results),
        table(rows, columns, aligned=True),
    ]
    return "\n\n".join(parts), {"targets": rows}


def _kernel_tables(results: Results) -> Iterator[str]:
    common = {
        **{"context": "context", "batch": "batch", "us": "us", "predicted": "predicted_us"},
        "GB/s": "gb_per_s",
    }
    for name, further in (
        ("kernels", {"budget": "budget", "block": "block_size", "of a copy": "share_of_copy"}),
        (
            "kernels-sparda",
            {
                **{"programs": "programs", "misses": "misses"},
                **{"of a copy": "share_of_copy", "of the link": "share_of_link"},
            },
        ),
    ):
        result = results.get(name, {"rows": [], "facts": {}})
        rows, facts = [row for row in result["rows"] if "us" in row], result["facts"]
        if name == "kernels":
            # All parts of the first shape only: the table is to be short, the file has the rest.
            shape = ("context", "budget", "batch", "block_size")
            rows = [
                row
                for row in rows
                if row["kernel"] in WHOLE or all(row[key] == rows[0][key] for key in shape)
            ]
        if rows:
            bandwidths = f"copy: {facts.get('copy_gb_per_s')}, link: {facts.get('link_gb_per_s')}"
            yield f"{facts.get('shape')}; {bandwidths} GB/s\n" + table(
                rows, {"kernel": "kernel", **common, **further}, aligned=True
            )


def _step_tables(results: Results) -> Iterator[str]:
    rows, times = [], []
    for arm, result in results.items():
        ratios = speedups(results, arm)
        for key, row in steps(result).items():
            faster, bound, _ = ratios.get(key, (None, None, None))
            rows.append({**row, "arm": arm, "faster": faster, "bound": bound})
        for context, seconds in prefills(result).items():
            over = overheads(results, arm).get(context)
            times.append(
                {
                    **{"arm": arm, "context": context, "seconds": seconds, "over": over},
                    "predicted": next(
                        row.get("predicted_s")
                        for row in result["rows"]
                        if "second_token_s" in row and row["context"] == context
                    ),
                }
            )
    if rows:
        arms = dict.fromkeys(row["arm"] for row in rows)
        facts = [{**results[arm]["facts"], "arm": arm} for arm in arms]
        columns = {
            "arm": "arm",
            "graphs": lambda row: row["graphs"].rpartition(".")[2],
            "compilation": lambda row: row["compilation"].rpartition(".")[2],
            "copy GB/s": "copy_gb_per_s",
            "pool tokens": "pool_tokens",
        }
        yield table(facts, columns, aligned=True)
        measured = {
            **{"arm": "arm", "context": "context", "batch": "batch"},
            "step ms": "{step_ms[median]:.3g}",
            "predicted": "predicted_ms",
            "p99": "{step_ms[p99]:.3g}",
            **{"bound ms": "bound_ms", "tokens/s": "tokens_per_s", "preempted": "preemptions"},
            **{"x dense": "faster", "bound": "bound"},
        }
        yield table(rows, measured, aligned=True)
    if times:
        cold = {
            **{"arm": "arm", "context": "context"},
            "prompts": lambda row: len(row["seconds"]),
            "median s to 2nd token": lambda row: statistics.median(row["seconds"]),
            "predicted to 1st": "predicted",
            "least": lambda row: min(row["seconds"]),
            "overhead %": "over",
        }
        yield table(times, cold, aligned=True)


def _paged_tables(results: Results) -> Iterator[str]:
    columns = {
        **{"arm": "arm", "context": "context", "batch": "batch"},
        "new %": lambda row: 100 * row["new_share"],
        "step ms": "{step_ms[median]:.3g}",
        "predicted": "predicted_ms",
        "p99": "{step_ms[p99]:.3g}",
        **{"bound ms": "bound_ms", "wait ms": "exposed_wait_ms", "tokens/s": "tokens_per_s"},
        **{"MiB/step": "fetched_mib", "GB/s in flight": "in_flight_gb_per_s"},
        "as forced": "as_forced",
    }
    for name, result in results.items():
        rows = [row for row in result["rows"] if "as_forced" in row]
        if rows:
            facts = result["facts"]
            sized, link = facts.get("plan", {}), facts.get("link_gb_per_s", {})
            rows.sort(key=lambda row: (row["rate"], row["arm"]))
            yield (
                f"{name}: {sized.get('device_gib', 0.0):.2f} of {facts.get('device_kv_gib')} GiB "
                f"for keys and values; {facts.get('graphs')}; link {link.get('host_to_device')} "
                f"GB/s\n{table(rows, columns, aligned=True)}"
            )
