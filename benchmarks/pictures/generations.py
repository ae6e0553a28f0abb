# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Long generations: what a request holds and what its steps cost, against what it has generated."""

from __future__ import annotations

from benchmarks.pictures.picture import Picture, Series, machine
from benchmarks.published import result

FILE, CELL = "generations", "512+5000"  # prompt and generated tokens
PROMPT = CELL.partition("+")[0]
MIB = 1 << 20


def held() -> Picture:
    """Device bytes of one request against what it has generated."""
    names = {"dense": "stock", "rocketkv-512": "ROCKETKV", "sparda-32": "SPARDA"}
    series = _curves(names, "device_bytes", MIB, 3)
    (last, most), ours = series[0].points[-1], series[-1].points
    return Picture(
        "generations",
        f"After {last:,} generated tokens a request holds {most:.1f} MiB of stock's device memory; "
        f"of SPARDA's a step needs {ours[-1][1]:.1f}",
        "SPARDA: the frames of a step; its default slab has as many again, for the next one. "
        f"Random model, a prompt of {PROMPT} tokens (dense in ROCKETKV, "
        f"in blocks with room for key extrema); t = 512, 32 blocks. {machine(FILE)}",
        "generated tokens",
        "MiB on the device",
        series,
        (FILE,),
    )


def steps() -> Picture:
    """CPU time of a step against what its request has generated."""
    names = {"dense": "stock", "stage2-512": "ROCKETKV, stage1 off", "sparda-32": "SPARDA"}
    series = _curves(names, "cpu_ms", 1, 2)
    (last, most), *ours = (each.points[-1] for each in series)
    return Picture(
        "generations-steps",
        f"After {last:,} generated tokens a step takes {most:.1f} ms of CPU time with stock, "
        f"{ours[0][1]:.1f} with ROCKETKV, {ours[1][1]:.1f} with SPARDA",
        "Means over the tokens since the point before, arms in turns. Random model, a prompt of "
        f"{PROMPT} tokens; t = 512, nothing evicted; 32 blocks. {machine(FILE)}",
        "generated tokens",
        "CPU time of a step, ms",
        series,
        (FILE,),
    )


def _curves(names: dict[str, str], what: str, unit: float, digits: int) -> tuple[Series, ...]:
    arms = result(FILE)["cells"][CELL]["arms"]
    return tuple(
        Series(
            name,
            tuple(
                (point["generated"], round(point[what] / unit, digits))
                for point in arms[arm]["curve"]
            ),
        )
        for arm, name in names.items()
    )
