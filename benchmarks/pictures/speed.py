# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Steps, prompts and copies against stock."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.pictures.picture import MODELS, K, Picture, Series, machine
from benchmarks.published import result
from benchmarks.serving import medians

if TYPE_CHECKING:
    from collections.abc import Callable

SPEEDS = (
    ("speed-smollm2", 1),
    ("speed-smollm2-8k-shared", 0),
    ("speed-smollm2-8k-alone", 0),
    ("speed-qwen-16k", 0),
)


def speed() -> Picture:
    """Decode steps against stock, with what any sparse method could reach."""
    categories, gains, bounds = [], [], []
    for place, (file, number) in enumerate(SPEEDS):
        found = result(file)["cells"][number]
        cell = found["cell"]
        shared = ", one shared document" if cell["shared"] else ""
        categories.append(
            f"{MODELS[cell['model']]}, {cell['context'] // K}K, batch {cell['batch']}{shared}"
        )
        gains.append((place, round(found["arms"]["rocket-512"]["speedup"], 3)))
        bounds.append((place, round(found["bound"], 3)))
    most = max(gain for _, gain in gains)
    shares = [
        100 * gain / bound
        for (_, gain), (_, bound) in zip(gains, bounds, strict=True)
        if bound > 1.01
    ]
    files = tuple(file for file, _ in SPEEDS)
    return Picture(
        "speed",
        f"A decode step of ROCKETKV is up to {most:.1f}x as fast as stock's: {min(shares):.0f} to "
        f"{max(shares):.0f} % of what any sparse method could gain",
        "t = 512; bound: stock's step at this context over its step at 128 tokens. Below "
        f"min_context it is dense. {machine(*files)}",
        "times stock's speed",
        "",
        (
            Series("ROCKETKV", tuple(gains), role="bar"),
            Series("bound", tuple(bounds), role="bound"),
        ),
        files,
        tuple(categories),
        shown="{:.2f}x",
    )


PROMPTS = ("prompts-qwen-8k", "prompts-qwen-16k")


def prompts() -> Picture:
    """CPU seconds of whole prompts."""
    cells = [cell for file in PROMPTS for cell in result(file)["cells"]]
    names = {"dense": "stock", "prompts-64": "SPARDA, 64 blocks", "prompts-32": "SPARDA, 32 blocks"}
    series = tuple(
        Series(
            name,
            tuple(
                (cell["context"], round(cell["arms"][arm]["cpu"]["median"], 2)) for cell in cells
            ),
        )
        for arm, name in names.items()
    )
    last = cells[-1]
    gain = last["arms"]["prompts-32"]["speedup_cpu"]
    return Picture(
        "prompts",
        f"Reading a prompt of {last['context'] // K}K sparsely takes {gain:.1f}x less CPU time "
        "than stock",
        "Qwen2.5-Coder-0.5B, selector query, sparse_prefill, one prompt each; accuracy of such "
        f"prompts is hardly measured. {machine(*PROMPTS)}",
        "prompt tokens",
        "CPU seconds of the whole prompt",
        series,
        PROMPTS,
        ticks=tuple(cell["context"] for cell in cells),
    )


SERVING = "serving-smollm2-4k"


def serving() -> Picture:
    """Throughput of all users against that of each, with so many of them."""
    found = result(SERVING)
    rows = medians(found["points"])
    names = {"dense": "stock", "rocketkv-512": "ROCKETKV"}
    series = []
    for arm, name in names.items():
        own = [row for row in rows if row["arm"] == arm]
        points = tuple(
            (round(1e3 / row["tpot"][0], 2), round(row["output_throughput"], 2)) for row in own
        )
        marks = tuple(f"{row['users']} user{'s' if row['users'] > 1 else ''}" for row in own)
        series.append(Series(name, points, marks=marks))
    stock, ours = ([y for _, y in each.points] for each in series)
    gains = [100 * new / old - 100 for old, new in zip(stock, ours, strict=True)]
    rounds = len({point["round"] for point in found["points"]})
    return Picture(
        "serving",
        f"Tokens per second of all users: {min(gains):+.0f} to {max(gains):+.0f} % against stock "
        "in as many bytes of KV cache",
        f"SmolLM2-135M, prompts of {found['context'] - found['output']:,} tokens, replies of "
        f"{found['output']}, t = 512, vllm bench serve, rounds: {rounds}; a user's are those after "
        f"the first token (median). {machine(SERVING)}",
        "tokens per second of a user",
        "tokens per second of all users",
        tuple(series),
        (SERVING,),
    )


OVERLAP = "sparda-overlap"
HIDDEN = 0.9  # of a wait: nearly all
FETCHED = {"no prefetch": "fetched when needed", "prefetch": "a layer ahead"}


def _by_misses(of: Callable[[dict], float], names: dict[str, str]) -> tuple[Series, ...]:
    """What a row has, against the misses that were counted at its rate."""
    rows = {(row["arm"], row["rate"]): row for row in result(OVERLAP)["rows"]}
    rates = sorted({rate for _, rate in rows})
    share = {
        rate: round(100 * rows["no prefetch", rate]["miss_share_of_free_picks"], 2)
        for rate in rates
    }
    return tuple(
        Series(name, tuple((share[rate], round(of(rows[arm, rate]), 2)) for rate in rates))
        for arm, name in names.items()
    )


def _slowed_copies() -> str:
    found = result(OVERLAP)
    return (
        f"SmolLM2-135M, {found['context'] // K}K, batch {found['batch']}, {found['top_k']} blocks, "
        f"copies slowed to {found['link_gb_per_s']:.2f} GB/s, all arms choose alike. "
        + machine(OVERLAP)
    )


def waits() -> Picture:
    """What a step waits for copies, at forced miss rates."""
    series = _by_misses(lambda row: row["exposed_wait_ms_per_step"], FETCHED)
    needed, ahead = (dict(each.points) for each in series)
    hidden = {at: 1 - ahead[at] / needed[at] for at in needed if needed[at]}
    furthest = max(at for at in hidden if hidden[at] > HIDDEN)
    most = max(hidden)
    return Picture(
        "waits",
        f"Fetching a layer ahead hides {100 * hidden[furthest]:.0f} % of the wait for copies at "
        f"{furthest:.0f} % misses, {100 * hidden[most]:.0f} % at {most:.0f} %, where the copies "
        "take longer than the layers",
        _slowed_copies(),
        "misses among the free picks, %",
        "wait that a step shows, ms",
        series,
        (OVERLAP,),
    )


def overlap() -> Picture:
    """Steps at forced miss rates."""
    names = {**FETCHED, "resident": "resident"}
    series = _by_misses(lambda row: row["step_ms"]["median"], names)
    needed, ahead, _ = (dict(each.points) for each in series)
    gains = {at: needed[at] / ahead[at] for at in needed}
    best = max(gains, key=lambda at: gains[at])
    return Picture(
        "overlap",
        f"Fetching a layer ahead makes a step up to {gains[best]:.2f}x as fast "
        f"({best:.0f} % misses)",
        _slowed_copies(),
        "misses among the free picks, %",
        "decode step, ms",
        series,
        (OVERLAP,),
    )
