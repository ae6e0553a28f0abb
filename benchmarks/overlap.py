# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Waiting and step time at forced miss rates: the part ``overlap`` of `benchmarks.offload`.

How many blocks a step has to fetch depends on trained weights and real text; with forced block
sets it is a given number. All arms choose the same blocks, so they differ only in whether these
are fetched, and when. The slab is exactly the working set of a step. After every turn the bytes
that passed through the copy engine must be the forced misses times the size of a piece.
"""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING

from benchmarks import corpus, harness, live, speed
from benchmarks.engine import Worker
from benchmarks.harness import GIB, Arm

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator
    from pathlib import Path

BLOCK = 64
SETTLING_STEPS = 3  # after the miss rate has changed
LINK_MISS_RATE = 0.15  # at which the copies of a layer take as long as the layer


# Commands, executed in the worker process.


def begin_forced(llm, prompts: list[list[int]], max_tokens: int) -> dict:
    """Brings requests to decode, then takes over the selection."""
    speed.begin(llm, prompts, max_tokens)
    llm.collective_rpc(live.force_selection)
    return llm.collective_rpc(live.shape)[0]


def forced(llm, rate: float, steps: int, batch: int) -> dict:
    """Decodes at a forced miss rate and returns the seconds of each step, and what was counted."""
    llm.collective_rpc(live.set_rate, args=(rate,))
    speed.decode(llm, 0, batch, dropped=SETTLING_STEPS)
    before = llm.collective_rpc(live.forced_counts)[0]
    seconds = speed.decode(llm, steps, batch)
    after = llm.collective_rpc(live.forced_counts)[0]
    return {"seconds": seconds, "counts": {key: after[key] - before[key] for key in after}}


# The benchmark.


def arms_of(options: argparse.Namespace, settings: dict) -> dict[str, dict]:
    """Returns the settings of each arm but the link's rate and the sizes of the pools."""
    common = {"init_blocks": 1, "local_blocks": 2, **settings}
    # The selection that is forced later is known a layer ahead, whatever the engine starts with.
    common |= {"dense_len": 0, "selector": "query", "top_k": options.top_k}
    return {
        "resident": {**common, "resident": True},
        "no prefetch": {**common, "prefetch": False},
        "prefetch": common,
        "no prefetch, layer 0 resident": {
            **common,
            "prefetch": False,
            "resident_first_layer": True,
        },
        "prefetch, layer 0 resident": {**common, "resident_first_layer": True},
    }


def run(options: argparse.Namespace, settings: dict) -> Iterator[dict]:
    """Runs ``overlap``: all arms are alive at once and measured in turns."""
    model = harness.resolve_model(options.model)
    turns = options.rounds * len(options.rates)
    generated = turns * (options.steps + SETTLING_STEPS) + options.link_steps + SETTLING_STEPS
    generated += 64  # what the first request generates before the last one begins
    prompts = corpus.documents_for(model, options.batch, options.context - generated)
    arguments = harness.engine_args(
        model,
        options.context,
        options.batch * options.context,
        enforce_eager=options.eager,
        max_num_seqs=options.batch,
    )
    sizes = _sizes(model, options)
    link = options.link_gb_per_s
    frames: dict[str, list[int]] = {}
    rows: dict[tuple[str, float], list[dict]] = {}
    with contextlib.ExitStack() as stack:
        workers = []
        for name, own in arms_of(options, settings).items():
            own = {**own, "host_gib": sizes["host_gib"]}
            if name != "resident":
                own["link_gb_per_s"] = link
                first = own.get("resident_first_layer", False)
                own["slab_gib"] = sizes["slab_gib_first" if first else "slab_gib"]
            arm = Arm(name, own, "SPARDA")
            worker = stack.enter_context(Worker("benchmarks.overlap", arm, arguments))
            shape = worker.call("begin_forced", prompts=prompts, max_tokens=generated)
            frames[name] = shape.pop("frames")
            harness.progress(f"{name}: frames in each layer {frames[name]}")
            if name == "resident" and link is None:
                link = _link(worker, options, shape)
                harness.progress(f"link: {link:.3f} GB/s")
            worker.pause()
            workers.append(worker)
        for turn in range(turns):
            rate = options.rates[turn % len(options.rates)]
            for worker in workers if turn % 2 == 0 else workers[::-1]:
                with worker.running():
                    found = worker.call(
                        "forced", rate=rate, steps=options.steps, batch=options.batch
                    )
                _check(worker.arm, rate, found["counts"], shape["piece_bytes"])
                rows.setdefault((worker.arm.name, rate), []).append(found)
            harness.progress(f"turn {turn + 1} of {turns}")
    settings_of = {worker.arm.name: worker.arm.settings for worker in workers}
    cells = [_row(name, rate, found) for (name, rate), found in rows.items()]
    yield {
        "model": options.model,
        "context": options.context,
        "batch": options.batch,
        "top_k": options.top_k,
        "link_gb_per_s": link,
        "shape": shape,
        "frames": frames,
        "settings": settings_of,
        "rows": cells,
    }


def _sizes(model: Path, options: argparse.Namespace) -> dict[str, float]:
    """Host and slab GiB; the slab is exactly the working set of one step."""
    config = json.loads((model / "config.json").read_text())
    layers, kv_heads = config["num_hidden_layers"], config["num_key_value_heads"]
    piece = BLOCK * harness.kv_bytes_per_token(model) // (layers * kv_heads)
    blocks = options.batch * -(-options.context // BLOCK) + 2
    working_set = options.batch * kv_heads * options.top_k
    half = 0.5 * piece  # against rounding
    return {
        "host_gib": (blocks * kv_heads * layers * piece + half) / GIB,
        "slab_gib": (working_set * layers * piece + half) / GIB,
        "slab_gib_first": ((working_set * (layers - 1) + blocks * kv_heads) * piece + half) / GIB,
    }


def _link(worker: Worker, options: argparse.Namespace, shape: dict) -> float:
    """The rate at which the misses of a layer take as long as a layer of the resident arm."""
    found = worker.call("forced", rate=0.0, steps=options.link_steps, batch=options.batch)
    layer_seconds = harness.summary(found["seconds"])["median"] / shape["layers"]
    settings = worker.arm.settings
    free_picks = options.top_k - settings["init_blocks"] - settings["local_blocks"] - 1
    misses = round(LINK_MISS_RATE * free_picks)
    pieces = max(1, misses) * options.batch * shape["kv_heads"]
    return pieces * shape["piece_bytes"] / layer_seconds / 1e9


def _check(arm: Arm, rate: float, counts: dict, piece_bytes: int) -> None:
    """Raises unless exactly the forced misses were moved."""
    misses = counts["expected_misses"]
    if not (
        counts["frame_misses"] == misses
        and counts["host_to_device_bytes"] == misses * piece_bytes
        and counts["engine_bytes"] == misses * piece_bytes
    ):
        raise RuntimeError(f"{arm.name} at {rate:.0%}: {misses} misses were forced, but {counts}")


def _row(name: str, rate: float, turns: list[dict]) -> dict:
    """Joins the turns of one arm at one rate."""
    seconds = [second for turn in turns for second in turn["seconds"]]
    steps = len(seconds)
    total = {key: sum(turn["counts"][key] for turn in turns) for key in turns[0]["counts"]}
    issued = total["prefetch_issued"]
    return {
        "arm": name,
        "rate": rate,
        "step_ms": harness.summary([1e3 * second for second in seconds]),
        "exposed_wait_ms_per_step": 1e3 * total["exposed_wait_seconds"] / steps,
        "late_share": total["prefetch_late"] / issued if issued else None,
        "misses_per_step": total["frame_misses"] / steps,
        "hits_per_step": total["frame_hits"] / steps,
        "bytes_per_step": total["engine_bytes"] / steps,
        "miss_share_of_free_picks": (
            total["frame_misses"] / total["free_picks"] if total["free_picks"] else 0.0
        ),
        "bytes_equal_misses_times_piece_bytes": True,  # or the run would have ended
        "totals": total,
    }
