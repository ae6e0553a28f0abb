# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The tables of README.md, from the result files behind them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import arms, results
from benchmarks.tables import mib, number, table

if TYPE_CHECKING:
    from collections.abc import Callable

    Row = dict[str, Any]

PATH = Path(__file__).parents[1] / "README.md"
_MARKED = re.compile(r"(<!-- table: ([\w-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
BUDGETS = ("rocket-128", "rocket-256", "rocket-512", "rocket-1024")
ABLATIONS = ("stage1-256", "stage2-256", "page1-256", "page2-256", "skip1-256")
LESS = "{:.2f}x less", "{:.2g}x less"


def result(name: str) -> Any:
    """A result file."""
    return json.loads((results.FOLDER / f"{name}.json").read_text())


def _merged(*names: str) -> dict[str, Row]:
    """Cells of each arm, from several files; a later file's cells win."""
    merged: dict[str, Row] = {}
    for name in names:
        for arm, row in result(name)["arms"].items():
            into = merged.setdefault(arm, {"arm": arms.label(arm)})
            for task in ("single", "multikey"):
                into.setdefault(task, {}).update(row.get(task, {}))
            if "prose" in row:
                into["prose"] = row["prose"]
    return merged


def _correct(task: str, context: int) -> Callable[[Row], object]:
    return lambda row: row[task][str(context)]["correct"]


def _fraction(*keys: str) -> Callable[[Row], str]:
    """Shows a number between 0 and 1 without its zero."""
    show = number(3, *keys)
    return lambda row: show(row).lstrip("0") if 0 < float(show(row)) < 1 else number(0, *keys)(row)


def _all_alike(rows: list[Row], task: str, context: int) -> str:
    """What several rows have in common; all of them in one cell if they differ."""
    found = [str(_correct(task, context)(row)) for row in rows]
    return f"each {found[0]}" if len(set(found)) == 1 else " / ".join(found)


def accuracy() -> str:
    """Needles and prose of ROCKETKV."""
    # The first file's multi-key questions were ambiguous.
    rows = _merged("accuracy-qwen", "accuracy-qwen-multikey", "accuracy-qwen-8k-single")
    for name, row in result("accuracy-qwen-8k-multikey")["arms"].items():
        rows[name]["multikey"] |= row["multikey"]
    ablations = result("accuracy-qwen-ablations")["arms"]
    for name in ABLATIONS:  # of fewer passages: only the divergence is shown
        rows[name]["prose"] = {"kl": ablations[name]["prose"]["kl"]} if name in ablations else {}
    exact = [row for name, row in _merged("oracle-qwen-4k").items() if "topk" in name]
    best = {
        "arm": "exact top-k tokens, k = 64 / 128 / 256 / 512",
        "shown": {task: _all_alike(exact, task, 4096) for task in ("single", "multikey")},
    }
    columns: dict[str, Callable[[Row], object]] = {" ": "arm"}
    for task, first, apart in (("single", "single ", ""), ("multikey", "multi-key ", " ")):
        columns[f"{first}2K"] = _either(task, 2048)
        columns |= {f"{n}K{apart}": _either(task, 1024 * n) for n in (4, 8)}
    columns["prose KL"] = _fraction("prose", "kl")
    columns["top-1"] = _fraction("prose", "top1_agreement")
    return table([rows["dense"], best, *(rows[name] for name in (*BUDGETS, *ABLATIONS))], columns)


def _either(task: str, context: int) -> Callable[[Row], object]:
    counted = _correct(task, context)

    def show(row: Row) -> object:
        if "shown" in row:
            return row["shown"][task] if context == 4096 else None
        return counted(row)

    return show


def policies() -> str:
    """The policies at equal budgets."""
    rows = _merged("accuracy-policies")
    columns = {
        "4K, of 20": "arm",
        "single": _correct("single", 4096),
        "multi-key": _correct("multikey", 4096),
        "prose KL": _fraction("prose", "kl"),
        "top-1": _fraction("prose", "top1_agreement"),
    }
    return table(rows.values(), columns)


def speed() -> str:
    """Decode steps of ROCKETKV against stock vLLM."""
    lines = []
    for name, cell, what in (
        ("speed-smollm2-8k-alone", 0, "8K, batch 8, different documents"),
        ("speed-smollm2-8k-shared", 0, "8K, batch 8, one shared document"),
        ("speed-smollm2", 1, "1K, batch 1 (dense below `min_context`)"),
    ):
        found = result(name)["cells"][cell]
        ours = found["arms"]["rocket-512"]
        sparse = found["bound"] > 1.01
        gain = f"{ours['speedup']:.2f}x"
        lines.append(
            {
                "what": what,
                "stock": found["arms"]["dense"],
                "ours": ours,
                "gain": f"**{gain}**" if ours["speedup"] > 2 else gain,
                "bound": f"{found['bound']:.2f}x",
                "share": f"{100 * ours['share_of_bound']:.0f} %" if sparse else "\N{EN DASH}",
                "prefill": f"{ours['prefill_overhead_percent']:+.1f} %".replace(
                    "-", "\N{MINUS SIGN}"
                ),
            }
        )
    step = {"unit": " ms"}
    columns = {
        "SmolLM2-135M, bf16, t = 512": "what",
        "stock's step": number(1, "stock", "step_ms", "median", **step),
        "ROCKETKV's step": number(1, "ours", "step_ms", "median", **step),
        "speed-up": "gain",
        "bound": "bound",
        "share of bound": "share",
        "prefill": "prefill",
    }
    return table(lines, columns)


def capacity() -> str:
    """Requests that a pool holds."""
    found = result("capacity")
    needed = -(-(found["prompt_tokens"] + found["generated_tokens"]) // found["block_tokens"])
    stock, ours = found["arms"]["dense"], found["arms"]["rocket-512"]
    columns = {
        " ": "arm",
        "running at once": "running",
        "preemptions": "preemptions",
        "blocks per decoding request": "blocks",
        "all done after": number(0, "seconds", unit=" s"),
    }
    held = f"**{ours['blocks_per_decoding_request']:.1f}**"
    return table(
        [
            {
                **stock,
                "arm": "stock",
                "running": stock["peak_running"],
                "blocks": f"{needed} needed",
            },
            {**ours, "arm": "ROCKETKV", "running": f"**{ours['peak_running']}**", "blocks": held},
        ],
        columns,
    )


def selectors() -> str:
    """Needles of SPARDA's selectors."""
    rows = _merged("accuracy-qwen-sparda", "accuracy-qwen-sparda-more", "accuracy-qwen-forecast")
    exact = [row for name, row in _merged("oracle-qwen-4k").items() if "blocks" in name]
    best = {
        "arm": "exact attention mass per block, 8 / 16 / 32",
        "shown": {"multikey": _all_alike(exact, "multikey", 4096)},
    }
    names = [f"{kind}-{top}" for kind in ("query", "lookahead", "previous") for top in (8, 16, 32)]
    trained = "**`forecast`, 16**, trained at 4K on one CPU core"
    lines = [
        *(rows["dense"], best, *(rows[name] for name in names)),
        {**rows["forecast-16"], "arm": trained},
    ]
    columns = {
        "selector, blocks read": "arm",
        "4K": _either("multikey", 4096),
        "8K": _either("multikey", 8192),
    }
    return table(lines, columns)


def mass() -> str:
    """Attention mass that each selector finds."""
    cells = {(cell["task"], cell["context"]): cell for cell in result("blocks-qwen")["cells"]}
    kept = {"exact": "exact mass"}
    names = ("exact", "query", "lookahead-query", "previous", "forecast")
    columns: dict[str, Callable[[str], object]] = {" ": lambda name: kept.get(name, f"`{name}`")}
    for index, (task, context) in enumerate((("multikey", 4), ("multikey", 8), ("prose", 8))):
        found = cells[task, 1024 * context]["selectors"]
        title = f"{'needles' if task == 'multikey' else task} {context}K"
        columns[title] = _held(found)
        columns["misses" + " " * index] = _missed(found)
    return table(names, columns)


def _held(found: dict[str, Row]) -> Callable[[str], str]:
    return lambda name: " / ".join(
        f"{found[name][top]['captured']:.2f}".lstrip("0") for top in ("8", "16", "32")
    )


def _missed(found: dict[str, Row]) -> Callable[[str], str]:
    def show(name: str) -> str:
        row = found[name]["16"]
        layers = row["miss_rate_by_layer"]
        return f"{row['miss_rate']:.0%} ({min(layers):.0%}-{max(layers):.0%}".replace("%", "") + ")"

    return lambda name: show(name).replace(" (", " % (")


def memory() -> str:
    """Device memory of one request."""
    lines = []
    for name, cell, arm, what in (
        ("sparda-memory", 0, "sparda-32", "SmolLM2-135M, 8K, 32"),
        ("sparda-memory", 0, "sparda-96-local-32", "SmolLM2-135M, 8K, 96 (32 local)"),
        ("sparda-memory-qwen-32k", 0, "sparda-32", "Qwen2.5-Coder-0.5B, 32K, 32"),
        ("sparda-memory-tiny", 0, "sparda-32", "random 2-layer model, 32K, 32"),
        ("sparda-memory-tiny", 1, "sparda-32", "random 2-layer model, 128K, 32"),
    ):
        found = result(name)["cells"][cell]["arms"]
        times = found[arm]["times_less_than_dense"]
        less = LESS[times >= 2].format(times)
        lines.append({"what": what, "stock": found["dense"], "ours": found[arm], "less": less})
    columns = {
        "model, context, blocks read": "what",
        "stock": lambda row: mib("stock", "device_bytes", digits=1)(row) + " MiB",
        "SPARDA": lambda row: mib("ours", "device_bytes", digits=1)(row) + " MiB",
        " ": "less",
    }
    return table(lines, columns)


def overlap() -> str:
    """Steps at forced miss rates."""
    found = {(row["arm"], row["rate"]): row for row in result("sparda-overlap")["rows"]}
    lines = [
        {arm: found[arm, rate] for arm in ("resident", "no prefetch", "prefetch")}
        for rate in sorted({rate for _, rate in found})
    ]

    def step(row: Row) -> float:
        return row["step_ms"]["median"]

    def ahead(row: Row) -> str:
        shown = f"{step(row['prefetch']):.1f} ms"
        if not row["prefetch"]["rate"]:
            return shown
        return f"**{shown}** ({step(row['no prefetch']) / step(row['prefetch']):.2f}x)"

    def wait(row: Row) -> str:
        waits = [row[arm]["exposed_wait_ms_per_step"] for arm in ("no prefetch", "prefetch")]
        return " → ".join(f"{ms:.1f}" if ms else "0" for ms in waits) + " ms"

    def missed(row: Row) -> str:
        found = 100 * row["no prefetch"]["miss_share_of_free_picks"]
        return f"{found:.1f} %" if found else "0 %"

    columns = {
        "misses of the free picks": missed,
        "resident": number(1, "resident", "step_ms", "median", unit=" ms"),
        "fetched when needed": number(1, "no prefetch", "step_ms", "median", unit=" ms"),
        "fetched a layer ahead": ahead,
        "exposed wait": wait,
    }
    return table(lines, columns)


def training() -> str:
    """Memory of training against the length of the sequence."""
    found: dict[int, list[Row]] = {}
    for cell in result("train-memory"):
        found.setdefault(cell["tokens"], []).append(cell)

    def shown(index: int) -> Callable[[int], str]:
        def show(tokens: int) -> str:
            cell = found[tokens][index]
            if "left_out_gib" in cell:
                return f"would need {cell['left_out_gib']:.0f} GiB"
            return f"{cell['peak_beyond_start_mib']:,} MiB, {cell['tokens_per_s']:,.0f} tokens/s"

        return show

    columns = {
        "tokens": lambda tokens: f"{tokens:,}",
        f"in chunks of {found[2048][0]['chunk']} queries": shown(0),
        "all queries at once": shown(1),
    }
    return table(found, columns)


TABLES = {
    "accuracy": accuracy,
    "policies": policies,
    "speed": speed,
    "capacity": capacity,
    "selectors": selectors,
    "mass": mass,
    "memory": memory,
    "overlap": overlap,
    "training": training,
}


def filled(text: str) -> str:
    """Returns a text with its marked tables made anew.

    Raises:
        KeyError: A marker names no table.
    """
    return _MARKED.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}\n{found[4]}", text)


def rewrite() -> None:
    """Writes the tables of README.md anew."""
    PATH.write_text(filled(PATH.read_text()))
