# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Waiting and step time at forced miss rates: the part ``overlap`` of `benchmarks.offload`.

How many blocks a step has to fetch depends on trained weights and real text; with forced block
sets it is a given number. All arms choose the same blocks, so they differ only in whether these
are fetched, and when. The slab is exactly the working set of a step. After every turn the bytes
that passed through the copy engine must be the forced misses times the size of a piece.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from benchmarks import corpus, harness
from benchmarks.arms import GIB, Arm
from benchmarks.commands import SETTLING_STEPS
from benchmarks.results import Recorder
from benchmarks.worker import alive

if TYPE_CHECKING:
    import argparse
    from pathlib import Path

    from benchmarks.worker import Worker

BLOCK = 64
LINK_MISS_RATE = 0.15  # at which the copies of a layer take as long as the layer
FIRST = {"resident_first_layer": True}
# Without the link's rate and the sizes of the pools.
ARMS: dict[str, dict[str, Any]] = {
    "resident": {"resident": True},
    "no prefetch": {"prefetch": False},
    "prefetch": {},
    "no prefetch, layer 0 resident": {"prefetch": False, **FIRST},
    "prefetch, layer 0 resident": FIRST,
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that only this part has."""
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rates", nargs="+", type=float, default=[0.0, 0.05, 0.1, 0.2, 0.4])
    parser.add_argument("--steps", type=int, default=48, help="per turn")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each arm and rate")
    parser.add_argument(
        "--link-gb-per-s",
        type=float,
        help="rate of the copy engine; by default the misses of a layer take as long as the layer "
        f"at {LINK_MISS_RATE:.0%}% misses",
    )
    parser.add_argument("--link-steps", type=int, default=32, help="to find that rate")


def run(options: argparse.Namespace, settings: dict) -> None:
    """Runs ``overlap``: all arms are alive at once and measured in turns."""
    model = harness.resolve_model(options.model)
    turns = options.rounds * len(options.rates)
    generated = turns * (options.steps + SETTLING_STEPS) + options.link_steps + SETTLING_STEPS
    generated += 64  # what the first request generates before the last one begins
    prompts = corpus.documents(
        harness.tokenizer_of(str(model)), options.batch, options.context - generated
    )
    arguments = harness.engine_args(
        model, options.context, options.batch * options.context, enforce_eager=options.eager,
        max_num_seqs=options.batch,
    )  # fmt: skip
    body: dict[str, Any] = {
        "model": options.model, "context": options.context, "batch": options.batch,
        "top_k": options.top_k, "link_gb_per_s": options.link_gb_per_s,
        **{"shape": {}, "frames": {}, "settings": {}, "rows": []},
    }  # fmt: skip
    found: dict[tuple[str, float], list[dict]] = {}

    def prepare(worker: Worker) -> None:
        name = worker.arm.name
        shape = worker.call("begin_forced", prompts=prompts, max_tokens=generated)
        body["frames"][name], body["settings"][name] = shape.pop("frames"), worker.arm.settings
        body["shape"] = shape
        if name == "resident" and body["link_gb_per_s"] is None:
            body["link_gb_per_s"] = _link(worker, options, shape)
            harness.progress(f"link: {body['link_gb_per_s']:.3f} GB/s")

    # One after the other: the first one tells the link of the others.
    every = (_arm(name, settings, model, options, body["link_gb_per_s"]) for name in ARMS)
    with (
        Recorder(options.out, "overlap", body) as record,
        alive(every, arguments, prepare) as workers,
    ):
        for turn in range(turns):
            rate = options.rates[turn % len(options.rates)]
            for worker in harness.alternating(workers, turn):
                with worker.running():
                    one = worker.call("forced", rate=rate, steps=options.steps, batch=options.batch)
                _check(worker.arm, rate, one["counts"], body["shape"]["piece_bytes"])
                found.setdefault((worker.arm.name, rate), []).append(one)
            body["rows"] = [_row(*key, turns_of) for key, turns_of in found.items()]
            record.save()
            harness.progress(f"turn {turn + 1} of {turns}")


def _arm(
    name: str, settings: dict, model: Path, options: argparse.Namespace, link: float | None
) -> Arm:
    """An arm; its slab is exactly the working set of one step."""
    config = json.loads((model / "config.json").read_text())
    layers, kv_heads = config["num_hidden_layers"], config["num_key_value_heads"]
    piece = BLOCK * harness.kv_bytes_per_token(model) // (layers * kv_heads)
    blocks = options.batch * -(-options.context // BLOCK) + 2
    working_set = options.batch * kv_heads * options.top_k
    half = 0.5 * piece  # against rounding
    own = {
        **{"init_blocks": 1, "local_blocks": 2, **settings},
        # It is known a layer ahead, and its choice is replaced.
        **{"dense_len": 0, "selector": "lookahead-query", "top_k": options.top_k},
        **ARMS[name],
        "host_gib": (blocks * kv_heads * layers * piece + half) / GIB,
    }
    if name != "resident":
        resident = bool(own.get("resident_first_layer"))
        frames = working_set * (layers - resident) + blocks * kv_heads * resident
        own |= {"link_gb_per_s": link, "slab_gib": (frames * piece + half) / GIB}
    return Arm(name, own, "SPARDA")


def _link(worker: Worker, options: argparse.Namespace, shape: dict) -> float:
    """The rate at which the misses of a layer take as long as a layer of the resident arm."""
    found = worker.call("forced", rate=0.0, steps=options.link_steps, batch=options.batch)
    layer_seconds = harness.summary(found["seconds"])["median"] / shape["layers"]
    settings = worker.arm.settings or {}
    free_picks = options.top_k - settings["init_blocks"] - settings["local_blocks"] - 1
    misses = round(LINK_MISS_RATE * free_picks)
    pieces = max(1, misses) * options.batch * shape["kv_heads"]
    return pieces * shape["piece_bytes"] / layer_seconds / 1e9


def _check(arm: Arm, rate: float, counts: dict, piece_bytes: int) -> None:
    """Raises unless exactly the forced misses were moved."""
    misses = counts["expected_misses"]
    moved = {counts["host_to_device_bytes"], counts["engine_bytes"]}
    if counts["frame_misses"] != misses or moved != {misses * piece_bytes}:
        raise RuntimeError(f"{arm.name} at {rate:.0%}: {misses} misses were forced, but {counts}")


def _row(name: str, rate: float, turns: list[dict]) -> dict[str, Any]:
    """Joins the turns of one arm at one rate."""
    seconds = [second for turn in turns for second in turn["seconds"]]
    total = {key: sum(turn["counts"][key] for turn in turns) for key in turns[0]["counts"]}
    issued, steps = total["prefetch_issued"], len(seconds)
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
