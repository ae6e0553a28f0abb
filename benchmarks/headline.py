# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""README's first table: one line for each of the main results, from the files behind them."""

from __future__ import annotations

import re

from benchmarks import published
from benchmarks.tables import table
from vllm_sparse.policies.rocketkv import RocketKVSettings

KEYS = ("file", "what", "stock", "ours", "gain")
# ROCKETKV's default window until 2026-11-29, the paper's: files that are older did not name it.
OLD_WINDOW, CHANGED = 32, "2026-11-29 04:39"


def main() -> str:
    """One line for each of the main results, with the command behind it."""
    result = published.result
    step, again, shared = (
        result(f"speed-smollm2-8k{which}")["cells"][0]["arms"]["rocket-512"]["speedup"]
        for which in ("-alone", "", "-shared")
    )
    now, pool = result("speed-smollm2-8k-budgets")["cells"][0], result("capacity")["arms"]
    gains = {arm: f"**{row['speedup']:.1f}x**" for arm, row in now["arms"].items()
             if "speedup" in row}  # fmt: skip
    sooner = {arm: f"{pool['dense']['seconds'] / row['seconds']:.1f}x"
              for arm, row in pool.items()}  # fmt: skip
    steps = {arm: f"{row['step_ms']['median']:.1f} ms" for arm, row in now["arms"].items()}
    needles = {arm: row["multikey"]["8192"]["correct"] for arm, row in
               result("accuracy-qwen-8k-multikey")["arms"].items()}  # fmt: skip
    prompt = result("prompts-qwen-16k")["cells"][0]["arms"]
    seconds = [prompt[arm]["cpu"]["median"] for arm in ("dense", "prompts-32")]
    unspared = result("prompts-qwen-8k")["cells"][0]["arms"]["sparda-32"]["speedup_cpu"]
    device = result("sparda-memory-qwen-32k")["cells"][0]["arms"]
    taken = [sum(published.allocated(device[arm]).values()) for arm in ("dense", "sparda-32")]
    edit, extract = (result("drafts")["tasks"][task]["arms"] for task in ("edit", "extract"))
    drafted, alone = "rocket-512 + ngram", "dense + ngram"
    lost = needles["dense"] - needles["rocket-256"]
    lines = (
        ("speed-smollm2-8k-budgets",
         "ROCKETKV, t = 1024 (default): decode step, SmolLM2-135M, 8K, batch 8",
         steps["dense"], steps["rocket-1024"],
         f"{gains['rocket-1024']}; at most {now['bound']:.1f}x"),
        ("speed-smollm2-8k-budgets", "the same, t = 512", steps["dense"], steps["rocket-512"],
         f"{gains['rocket-512']}; {min(step, again):.1f}x to {max(step, again):.1f}x on the Xeon, "
         f"{shared:.1f}x over one shared document"),
        ("capacity",
         "ROCKETKV, t = 512: requests of 8K at once in the bytes of 188 blocks of stock's",
         pool["dense"]["peak_running"], pool["rocket-512"]["peak_running"],
         f"done {sooner['rocket-512']} sooner; the default runs "
         f"{pool['rocket-1024']['peak_running']}, {sooner['rocket-1024']}"),
        ("drafts",
         "ROCKETKV, t = 512, ngram drafts: a token of a 4K edit, Qwen2.5-Coder-0.5B",
         f"{edit['dense']['ms']:.1f} ms", f"{edit[drafted]['ms']:.1f} ms",
         f"{edit[drafted]['speedup_ms']:.2f}x, drafts alone {edit[alone]['speedup_ms']:.2f}x; "
         f"an extraction {extract[drafted]['speedup_ms']:.2f}x, drafts alone "
         f"{extract[alone]['speedup_ms']:.2f}x"),
        ("accuracy-qwen-8k-multikey",
         f"ROCKETKV, t = 256, {_window('accuracy-qwen-8k-multikey', 'rocket-256')}: multi-key "
         "needles, Qwen2.5-Coder-0.5B, 8K, of 20",
         needles["dense"], needles["rocket-256"], "as many" if lost == 0 else f"{-lost:+d}"),
        ("prompts-qwen-16k",
         "SPARDA, `sparse_prefill` 32 (off by default): CPU time of one 16K prompt, "
         "Qwen2.5-Coder-0.5B",
         f"{seconds[0]:.0f} s", f"{seconds[1]:.0f} s",
         f"{seconds[0] / seconds[1]:.1f}x less; reading every block {unspared:.1f}x less (at 8K)"),
        ("sparda-memory-qwen-32k",
         "SPARDA, 32 blocks, default slab: device memory of one 32K request, Qwen2.5-Coder-0.5B",
         f"{taken[0] / 2**20:.0f} MiB", f"{taken[1] / 2**20:.0f} MiB",
         f"{taken[0] / taken[1]:.1f}x less"),
    )  # fmt: skip
    rows = [dict(zip(KEYS, line, strict=True)) for line in lines]
    columns = {"what": "what", "stock": "stock", "ours": "ours", " ": "gain",
               "command": lambda row: f"`{_command(row['file'])}`"}  # fmt: skip
    return table(rows, columns)


def _window(name: str, arm: str) -> str:
    """What a file's arm of ROCKETKV had for a window, in words."""
    found = published.result(name)
    old = {"window": OLD_WINDOW} if found["environment"]["date"] < CHANGED else {}
    window = RocketKVSettings(**{**old, **found["arms"][arm]["settings"]}).window
    return "the paper's window" if window == OLD_WINDOW else f"window {window}"


def _command(name: str) -> str:
    """What makes the file that a line is read from, whatever the file was called at first."""
    environment = published.result(name)["environment"]
    typed = re.sub(r" --out \S+", "", environment["command"])
    if "benchmarks.accuracy" in typed and environment["date"] < CHANGED:
        typed += f" --setting window={OLD_WINDOW}"
    _, _, program, *_ = typed.split()
    default = program.removeprefix("benchmarks.") == name
    return typed if default else f"{typed} --out benchmarks/results/{name}.json"


TABLES = {"main": main}
