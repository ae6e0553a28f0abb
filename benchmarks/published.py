# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The tables of results that README.md and docs/ publish, from the files behind them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from benchmarks import arms, replay, results
from benchmarks import drafts as drafting
from benchmarks import lists as forced
from benchmarks import serving as served
from benchmarks.served import report as matrix
from benchmarks.tables import STEP, mib, number, table

if TYPE_CHECKING:
    from collections.abc import Callable

    Row = dict[str, Any]

BUDGETS = ("rocket-128", "rocket-256", "rocket-512", "rocket-1024")
ABLATIONS = ("stage1-256", "stage2-256", "page1-256", "page2-256", "skip1-256")
SELECTORS = [f"{kind}-{top}" for kind in ("query", "lookahead", "previous") for top in (8, 16, 32)]


def result(name: str) -> Any:
    """A result file."""
    return json.loads((results.FOLDER / f"{name}.json").read_text())


def _cells(name: str) -> dict[str, Row]:
    """The arms of an accuracy result, and how many questions each answered."""
    rows = result(name)["arms"]
    found = {arm: {"arm": arms.label(arm), "prose": row.get("prose")} for arm, row in rows.items()}
    for arm, row in rows.items():
        for task in ("single", "multikey"):
            counted = {context: cell["correct"] for context, cell in row.get(task, {}).items()}
            found[arm] |= {f"{task} {context}": n for context, n in counted.items()}
    return found


def _merged(*names: str) -> dict[str, Row]:
    """Cells of several files; a later file's win, and what it lacks does not."""
    merged: dict[str, Row] = {}
    for name in names:
        for arm, row in _cells(name).items():
            merged.setdefault(arm, {}).update({k: v for k, v in row.items() if v is not None})
    return merged


def _fraction(*keys: str) -> Callable[[Row], str]:
    """Shows a number between 0 and 1 without its zero."""
    show = number(3, *keys)
    return lambda row: show(row).lstrip("0") if 0 < float(show(row)) < 1 else number(0, *keys)(row)


PROSE = {"prose KL": _fraction("prose", "kl"), "top-1": _fraction("prose", "top1_agreement")}


def accuracy() -> str:
    """Needles and prose of ROCKETKV."""
    # The first file's multi-key questions were ambiguous.
    names = ("", "-multikey", "-8k-single", "-8k-multikey")
    rows = _merged(*(f"accuracy-qwen{name}" for name in names))
    ablations = _cells("accuracy-qwen-ablations")
    for name in set(ABLATIONS) & set(ablations):  # of fewer passages: only the divergence is shown
        rows[name]["prose"] = {"kl": ablations[name]["prose"]["kl"]}
    columns: dict[str, Any] = {" ": "arm"}
    for task, first, apart in (("single", "single ", ""), ("multikey", "multi-key ", " ")):
        columns[f"{first}2K"] = f"{task} 2048"
        columns |= {f"{n}K{apart}": f"{task} {1024 * n}" for n in (4, 8)}
    lines = [rows["dense"], *(rows[name] for name in (*BUDGETS, *ABLATIONS))]
    return table(lines, {**columns, **PROSE})


def policies() -> str:
    """The policies at equal budgets."""
    return _at_4k("accuracy-policies")


def fp8_answers() -> str:
    """What an fp8 cache costs in answers."""
    return _at_4k("accuracy-fp8")


def _at_4k(name: str) -> str:
    columns = {"4K, of 20": "arm", "multi-key": "multikey 4096", **PROSE}
    return table(_cells(name).values(), columns)


def speed() -> str:
    """Decode steps of ROCKETKV against stock vLLM."""
    lines = []
    for name, cell, what in (
        ("speed-smollm2-8k-alone", 0, "8K, batch 8, different documents"),
        ("speed-smollm2-8k-shared", 0, "8K, batch 8, one shared document"),
        ("speed-smollm2", 1, "1K, batch 1 (dense below `min_context`)"),
    ):
        found = result(name)["cells"][cell]
        line = {"what": what, "bound": found["bound"], **found["arms"]}
        lines.append(line | {"gain": line["rocket-512"]["speedup"]})
    sparse = number(0, "rocket-512", "share_of_bound", unit=" %", scale=100)
    columns = {
        "SmolLM2-135M, bf16, t = 512": "what",
        "stock's step": "{dense[step_ms][median]:.1f} ms",
        "ROCKETKV's step": number(1, "rocket-512", "step_ms", "median", unit=" ms"),
        "speed-up": lambda row: (
            f"**{row['gain']:.2f}x**" if row["gain"] > 2 else f"{row['gain']:.2f}x"
        ),
        "bound": "{bound:.2f}x",
        "share of bound": lambda row: sparse(row) if row["bound"] > 1.01 else "\N{EN DASH}",
        "prefill": lambda row: _signed(row["rocket-512"]["prefill_overhead_percent"]),
    }
    return table(lines, columns)


def _signed(percent: float) -> str:
    return f"{percent:+.1f} %".replace("-", "\N{MINUS SIGN}")


def budgets() -> str:
    """Decode steps of two budgets in one run."""
    found = result("speed-smollm2-8k-budgets")["cells"][0]
    names = {"dense": "stock", "rocket-1024": "t = 1024 (default)", "rocket-512": "t = 512"}
    lines = [found["arms"][arm] | {"name": name} for arm, name in names.items()]
    sparse = number(0, "share_of_bound", unit=" %", scale=100)
    columns = {
        "SmolLM2-135M, 8K, batch 8": "name",
        "step, ms (quartiles)": STEP.replace("-", " to "),
        "at 128 tokens, ms": "{step_ms_at_128_tokens[median]:.1f}",
        "speed-up": "{speedup:.2f}x",
        "share of bound": lambda row: None if row["name"] == "stock" else sparse(row),
        "prefill": lambda row: _signed(row["prefill_overhead_percent"]),
    }
    return table(lines, columns)


def capacity() -> str:
    """Requests that a pool holds."""
    found = result("capacity")
    needed = -(-(found["prompt_tokens"] + found["generated_tokens"]) // found["block_tokens"])
    lines = [{"arm": "stock", **found["arms"]["dense"], "blocks": f"{needed} needed"}]
    for budget in (512, 1024):
        ours = found["arms"][f"rocket-{budget}"]
        held = f"{ours['blocks_per_decoding_request']:.1f}"
        lines.append({**ours, "arm": f"ROCKETKV, t = {budget}", "blocks": held})
    columns = {
        **{" ": "arm", "blocks in the pool": "pool_blocks", "running at once": "peak_running"},
        "preemptions": "preemptions",
        "blocks per decoding request": "blocks",
        "all done after": "{seconds:.0f} s",
    }
    return table(lines, columns)


def serving() -> str:
    """Throughput and latency against the number of users."""
    return served.points(result("serving-smollm2-4k"))


def agents() -> str:
    """Growing conversations."""
    return replay.runs(result("replay-smollm2"))


def selectors() -> str:
    """Needles of SPARDA's selectors."""
    rows = _merged(*(f"accuracy-qwen-{name}" for name in ("sparda", "sparda-more", "forecast")))
    trained = {"arm": "**`forecast`, 16**, trained at 4K on one CPU core"}
    lines = [rows["dense"], *(rows[name] for name in SELECTORS)]
    columns = {"selector, blocks read": "arm", "4K": "multikey 4096", "8K": "multikey 8192"}
    return table([*lines, rows["forecast-16"] | trained], columns)


def mass() -> str:
    """Attention mass that each selector finds."""
    cells = {(cell["task"], cell["context"]): cell for cell in result("blocks-qwen")["cells"]}
    names = ("exact", "query", "lookahead-query", "previous", "forecast")
    columns: dict[str, Any] = {" ": lambda at: "exact mass" if at == "exact" else f"`{at}`"}
    for index, (task, title, n) in enumerate(
        (("multikey", "needles", 4), ("multikey", "needles", 8), ("prose", "prose", 8))
    ):
        found = cells[task, 1024 * n]["selectors"]
        columns[f"{title} {n}K"] = lambda at, found=found: " / ".join(
            f"{found[at][top]['captured']:.2f}".lstrip("0") for top in ("8", "16", "32")
        )
        columns["misses" + " " * index] = lambda at, found=found: _missed(found[at]["16"])
    return table(names, columns)


def _missed(row: Row) -> str:
    least, most = (100 * bound(row["miss_rate_by_layer"]) for bound in (min, max))
    return f"{100 * row['miss_rate']:.0f} % ({least:.0f}-{most:.0f})"


def memory() -> str:
    """Device memory of one request, with the whole slab of its engine."""
    lines = []
    for name, cell, arm, what in (
        ("sparda-memory", 0, "sparda-32", "SmolLM2-135M, 8K, 32"),
        ("sparda-memory", 0, "sparda-96-local-32", "SmolLM2-135M, 8K, 96 (32 local)"),
        ("sparda-memory-qwen-32k", 0, "sparda-32", "Qwen2.5-Coder-0.5B, 32K, 32"),
        ("sparda-memory-tiny", 0, "sparda-32", "random 2-layer model, 32K, 32"),
        ("sparda-memory-tiny", 1, "sparda-32", "random 2-layer model, 128K, 32"),
    ):
        found = result(name)["cells"][cell]["arms"]
        stock, ours = (sum(allocated(found[name]).values()) for name in ("dense", arm))
        less = f"{stock / ours:.1f}x less" if ours < stock else f"{ours / stock:.2f}x **more**"
        lines.append({"what": what, "stock": stock, "ours": ours, "less": less, "step": found[arm]})
    columns = {
        "model, context, blocks read": "what",
        "stock": mib("stock", digits=1, unit=" MiB"),
        "SPARDA, default slab": mib("ours", digits=1, unit=" MiB"),
        " ": "less",
        "of which a step needs": mib("step", "device_bytes", digits=1, unit=" MiB"),
    }
    return table(lines, columns)


def allocated(found: Row) -> dict[str, int]:
    """Bytes of one request's parts on the device, where it is the only one."""
    slab = found["measured"].get("slab")
    return found["parts"] if slab is None else found["parts"] | {"frames": slab}


def overlap() -> str:
    """Steps at forced miss rates."""
    found = {(row["arm"], row["rate"]): row for row in result("sparda-overlap")["rows"]}
    lines = []
    for rate in sorted({rate for _, rate in found}):
        rows = [found[arm, rate] for arm in ("resident", "no prefetch", "prefetch")]
        line = {"rate": 100 * rows[1]["miss_share_of_free_picks"]}
        line["ms"] = [row["step_ms"]["median"] for row in rows]
        line["waits"] = [row["exposed_wait_ms_per_step"] for row in rows[1:]]
        lines.append(line)

    def ahead(row: Row) -> str:
        _, blocking, prefetched = row["ms"]
        shown = f"{prefetched:.1f} ms"
        return f"**{shown}** ({blocking / prefetched:.2f}x)" if row["rate"] else shown

    columns = {
        "misses of the free picks": lambda row: f"{row['rate']:.1f} %" if row["rate"] else "0 %",
        "resident": "{ms[0]:.1f} ms",
        "fetched when needed": "{ms[1]:.1f} ms",
        "fetched a layer ahead": ahead,
        "exposed wait": lambda row: (
            " → ".join(f"{ms:.1f}" if ms else "0" for ms in row["waits"]) + " ms"
        ),
    }
    return table(lines, columns)


def drafts() -> str:
    """Drafts from the context beside sparse decode."""
    lines = [
        {"task": task, "arm": drafting.label(name), **row}
        for task, found in result("drafts")["tasks"].items()
        for name, row in found["arms"].items()
    ]
    return table(lines, {"task": "task", " ": "arm", **drafting.columns()})


def lists() -> str:
    """What is found again of generated lists."""
    found = result("lists")
    lines = [
        {"text": forced.shown(cell), "arm": f"`{name}`", **row}
        for cell in found["cells"].values()
        for name, row in cell["arms"].items()
    ]
    return table(lines, {"list": "text", "arm": "arm", **forced.columns(found["items"])})


def fp8() -> str:
    """The decode kernel beside itself on a cache of fp8."""
    found = result("kernels-fp8")["result"]
    lines = {
        f"{found['top_k']} of {found['kept_tokens']:,} kept tokens": "fused",
        "every kept token": "fused, every kept token",
    }

    def shown(name: str) -> str:
        times = found["variants"][name]
        return f"{times['us_p10']:,.0f} ({times['us']:,.0f})"

    columns = {
        "a layer, \N{MICRO SIGN}s": lambda what: what,
        "bfloat16": lambda what: shown(lines[what]),
        "fp8": lambda what: shown(f"{lines[what]}, fp8"),
    }
    return table(lines, columns)


def quarters() -> str:
    """How far prose is from dense in each quarter of the text."""
    rows = [
        {"arm": arms.label(name), **row["prose"]}
        for name, row in result("accuracy-policies")["arms"].items()
        if name != arms.DENSE and "kl_by_quarter" in row.get("prose", {})
    ]
    columns: dict[str, Any] = {"KL to dense": "arm"}
    for part in range(4):
        columns[f"tokens {48 * part + 1} to {48 * part + 48}"] = number(3, "kl_by_quarter", part)
    return table(rows, {**columns, "all": number(3, "kl")})


def rows() -> str:
    """Rows of the table of features that were served once."""
    return matrix.render(result("serve-matrix"))


def training() -> str:
    """Memory of training against the length of the sequence."""
    found: dict[int, list[str]] = {}
    for cell in result("train-memory")["cells"]:
        shown = f"would need {cell.get('left_out_gib', 0):.0f} GiB"
        if "tokens_per_s" in cell:
            shown = f"{cell['peak_beyond_start_mib']:,} MiB, {cell['tokens_per_s']:,.0f} tokens/s"
        found.setdefault(cell["tokens"], []).append(shown)
    columns = {
        "tokens": lambda tokens: f"{tokens:,}",
        "in chunks of 256 queries": lambda tokens: found[tokens][0],
        "all queries at once": lambda tokens: found[tokens][1],
    }
    return table(found, columns)


def recall() -> str:
    """How well the shipped Forecast finds blocks, beside other selectors."""
    found = result("recall")

    def shown(name: str) -> Callable[[Row], str]:
        share = {kind: _fraction("mean", name, kind) for kind in ("recall", "mass")}
        return lambda cell: " / ".join(show(cell) for show in share.values())

    names = {"forecast": "this Forecast", "exact": "exact", "random": "random"}
    columns = {
        "tokens": lambda cell: f"{cell['context']:,}",
        **{
            names.get(name, f"`{name}`"): shown(name)
            for name in ("exact", "query", "forecast", "previous", "lookahead-query", "random")
        },
    }
    return table(found["cells"], columns)


TABLES = {
    make.__name__: make
    for make in (
        *(accuracy, policies, speed, budgets, capacity, serving, agents, selectors),
        *(mass, memory, overlap, drafts, lists, fp8, fp8_answers, quarters, rows, training),
        recall,
    )
}
