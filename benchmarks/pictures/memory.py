# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Bytes and blocks of requests against stock."""

from __future__ import annotations

from benchmarks.pictures.picture import MODELS, K, Picture, Series, machine
from benchmarks.published import allocated, result

MIB = 1 << 20

PARTS = {
    "kv_cache": "KV blocks (stock)",
    "frames": "slab",
    "compressed_keys": "compressed keys",
    "staging": "staging",
    "page_table": "page table",
}
MEMORIES = (
    ("sparda-memory", 0, "sparda-96-local-32", "SPARDA, 96 blocks"),
    ("sparda-memory", 0, "sparda-32", "SPARDA, 32 blocks"),
    ("sparda-memory-qwen-32k", 0, "sparda-32", "SPARDA, 32 blocks"),
)


def device_bytes() -> Picture:
    """What one request holds on the device, by part."""
    bars: list[tuple[str, dict[str, int]]] = []
    seen = set()
    for file, number, arm, name in MEMORIES:
        cell = result(file)["cells"][number]
        where = f"{MODELS[cell['model']]}, {cell['context'] // K}K"
        if where not in seen:
            bars.append((f"{where}: stock", allocated(cell["arms"]["dense"])))
            seen.add(where)
        bars.append((f"{where}: {name}", allocated(cell["arms"][arm])))
    series = tuple(
        Series(
            title,
            tuple(
                (place, round(parts.get(part, 0) / MIB, 3)) for place, (_, parts) in enumerate(bars)
            ),
            role="part",
        )
        for part, title in PARTS.items()
    )
    cell = result(MEMORIES[-1][0])["cells"][MEMORIES[-1][1]]
    stock, ours = (sum(allocated(cell["arms"][arm]).values()) for arm in ("dense", MEMORIES[-1][2]))
    files = tuple(dict.fromkeys(file for file, *_ in MEMORIES))
    return Picture(
        "memory",
        f"At {cell['context'] // K}K a request of SPARDA takes {stock / ours:.1f}x less of the "
        "device than stock's, with 96 blocks of 8K more",
        "Counted on the live tensors of an engine with one decoding request; the default slab, "
        f"twice what a step needs. {machine(*files)}",
        "MiB on the device",
        "",
        series,
        files,
        tuple(name for name, _ in bars),
    )


def growth() -> Picture:
    """Device bytes of one request against context."""
    cells = result("sparda-memory-tiny")["cells"]

    def points(arm: str) -> tuple[tuple[float, float], ...]:
        return tuple(
            (cell["context"], round(sum(allocated(cell["arms"][arm]).values()) / MIB, 3))
            for cell in cells
        )

    stock, ours = points("dense"), points("sparda-32")
    times = cells[-1]["context"] / cells[0]["context"]
    return Picture(
        "memory-context",
        f"{times:.0f}x the context takes {stock[-1][1] / stock[0][1]:.1f}x of stock's memory, "
        f"{ours[-1][1] / ours[0][1]:.1f}x of SPARDA's",
        "Random model of two layers, 32 blocks read; counted on the live tensors of one request, "
        "SPARDA's with the whole default slab and staging. " + machine("sparda-memory-tiny"),
        "tokens",
        "MiB on the device",
        (Series("stock", stock), Series("SPARDA", ours)),
        ("sparda-memory-tiny",),
        ticks=tuple(cell["context"] for cell in cells),
    )


def capacity() -> Picture:
    """Requests that a pool runs at once."""
    found = result("capacity")
    stock, ours = found["arms"]["dense"], found["arms"]["rocket-512"]
    needed = -(-(found["prompt_tokens"] + found["generated_tokens"]) // found["block_tokens"])
    held = ours["blocks_per_decoding_request"]
    return Picture(
        "capacity",
        f"As many bytes run {ours['peak_running']} requests at once instead of "
        f"{stock['peak_running']}: {held:.1f} blocks each, 25 % larger, not {needed}",
        f"SmolLM2-135M, {found['requests']} requests of {found['prompt_tokens']} + "
        f"{found['generated_tokens']} tokens, {found['pool_blocks']} blocks of "
        f"{found['block_tokens']} tokens of stock's, t = 512. {machine('capacity')}",
        "most requests running at once",
        "",
        (
            Series("stock", ((0, stock["peak_running"]), (1, 0)), role="bar"),
            Series("ROCKETKV", ((0, 0), (1, ours["peak_running"])), role="bar"),
        ),
        ("capacity",),
        ("stock", "ROCKETKV"),
    )
