# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""README's first table: one line for each of the main results, from the files behind them."""

from __future__ import annotations

import re
from typing import Any

from benchmarks import published
from benchmarks.tables import table


def _result(name: str) -> Any:
    return published.result(name)


def main() -> str:
    """One line for each of the main results, with the command behind it."""
    step, again, shared = (
        _result(f"speed-smollm2-8k{which}")["cells"][0] for which in ("-alone", "", "-shared")
    )
    gains = [cell["arms"]["rocket-512"]["speedup"] for cell in (step, again, shared)]
    now, pool = (
        _result("speed-smollm2-8k-budgets")["cells"][0],
        _result("capacity")["arms"],
    )
    arms = now["arms"]
    needles = {arm: row["multikey"]["8192"]["correct"] for arm, row in
               _result("accuracy-qwen-8k-multikey")["arms"].items()}  # fmt: skip
    prompt = _result("prompts-qwen-16k")["cells"][0]["arms"]
    device = _result("sparda-memory-qwen-32k")["cells"][0]["arms"]
    taken = [sum(published.allocated(device[arm]).values()) for arm in ("dense", "sparda-32")]
    seconds = [prompt[arm]["cpu"]["median"] for arm in ("dense", "prompts-32")]
    unspared = _result("prompts-qwen-8k")["cells"][0]["arms"]["sparda-32"]["speedup_cpu"]
    edit, extract = (_result("drafts")["tasks"][task]["arms"] for task in ("edit", "extract"))
    drafted, alone = "rocket-512 + ngram", "dense + ngram"
    lost = needles["dense"] - needles["rocket-256"]
    steps = {arm: f"{arms[arm]['step_ms']['median']:.1f} ms" for arm in arms}
    lines = [
        {
            "file": "speed-smollm2-8k-budgets",
            "what": "ROCKETKV, t = 1024 (default): decode step, SmolLM2-135M, 8K, batch 8",
            "stock": steps["dense"],
            "ours": steps["rocket-1024"],
            "gain": f"**{arms['rocket-1024']['speedup']:.1f}x**; at most {now['bound']:.1f}x",
        },
        {
            "file": "speed-smollm2-8k-budgets",
            "what": "the same, t = 512",
            "stock": steps["dense"],
            "ours": steps["rocket-512"],
            "gain": f"**{arms['rocket-512']['speedup']:.1f}x**; {min(gains[:2]):.1f}x to "
            f"{max(gains[:2]):.1f}x on the Xeon, {gains[2]:.1f}x over one shared document",
        },
        {
            "file": "capacity",
            "what": "ROCKETKV, t = 512: requests of 8K at once in 188 blocks, ours 25 % larger",
            "stock": pool["dense"]["peak_running"],
            "ours": pool["rocket-512"]["peak_running"],
            "gain": f"{pool['dense']['seconds'] / pool['rocket-512']['seconds']:.1f}x sooner done",
        },
        {
            "file": "drafts",
            "what": "ROCKETKV, t = 512, ngram drafts: a token of a 4K edit, Qwen2.5-Coder-0.5B",
            "stock": f"{edit['dense']['ms']:.1f} ms",
            "ours": f"{edit[drafted]['ms']:.1f} ms",
            "gain": f"{edit[drafted]['speedup_ms']:.2f}x, drafts alone "
            f"{edit[alone]['speedup_ms']:.2f}x; an extraction "
            f"{extract[drafted]['speedup_ms']:.2f}x, drafts alone "
            f"{extract[alone]['speedup_ms']:.2f}x",
        },
        {
            "file": "accuracy-qwen-8k-multikey",
            "what": "ROCKETKV, t = 256, the paper's window: multi-key needles, "
            "Qwen2.5-Coder-0.5B, 8K, of 20",
            "stock": needles["dense"],
            "ours": needles["rocket-256"],
            "gain": "as many" if lost == 0 else f"{-lost:+d}",
        },
        {
            "file": "prompts-qwen-16k",
            "what": "SPARDA, 32 blocks: CPU time of one 16K prompt, Qwen2.5-Coder-0.5B",
            "stock": f"{seconds[0]:.0f} s",
            "ours": f"{seconds[1]:.0f} s",
            "gain": f"{seconds[0] / seconds[1]:.1f}x less; reading every block "
            f"{unspared:.1f}x less (at 8K)",
        },
        {
            "file": "sparda-memory-qwen-32k",
            "what": "SPARDA, 32 blocks, default slab: device memory of one 32K request, "
            "Qwen2.5-Coder-0.5B",
            "stock": f"{taken[0] / 2**20:.0f} MiB",
            "ours": f"{taken[1] / 2**20:.0f} MiB",
            "gain": f"{taken[0] / taken[1]:.1f}x less",
        },
    ]
    columns = {"what": "what", "stock": "stock", "ours": "ours", " ": "gain",
               "command": lambda row: f"`{_command(row['file'])}`"}  # fmt: skip
    return table(lines, columns)


def _command(name: str) -> str:
    """What makes the file that a line is read from, whatever the file was called at first."""
    typed = re.sub(r" --out \S+", "", _result(name)["environment"]["command"])
    _, _, program, *_ = typed.split()
    default = program.removeprefix("benchmarks.") == name
    return typed if default else f"{typed} --out benchmarks/results/{name}.json"


TABLES = {"main": main}
