# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""SPARDA at forced miss rates, every arm with the same device memory for keys and values.

On a large GPU everything fits, and offloading has nothing to gain; so the device memory for KV is a
stated figure, and each arm serves as many requests as it can with it. With random weights the
choice of blocks is random too, so the share of new blocks in each step is forced. The slab is
exactly the working set of a step, or the misses would not be those that were forced.

One engine fetches in turns a layer ahead and when a layer runs, each also without copying anything:
what a step takes longer than that is the time for which it waits for copies.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from benchmarks import arms, commands, harness, live, predictions
from benchmarks.arms import GIB
from benchmarks.gpu import llms, shapes
from benchmarks.gpu.stages import NotAvailableError
from benchmarks.live import Way
from benchmarks.ops import timings
from vllm_sparse.planner import bounds

if TYPE_CHECKING:
    import argparse

    from benchmarks.gpu.stages import Report

BLOCK, WINDOW_STRIDE, INIT_BLOCKS = 64, 16, 1
# What the targets are about comes first, in case time runs out.
RATES = (0.1, 0.05, 0.2, 0.02, 0.4, 0.0)
# The first layer's choice cannot look ahead; in the arm `first` it is resident.
ARMS = ("resident", "offload", "first")
WAYS = {
    "blocking": Way(prefetch=False),
    "prefetch": Way(prefetch=True),
    "blocking, nothing copied": Way(prefetch=False, copies=False),
    "prefetch, nothing copied": Way(prefetch=True, copies=False),
}
CHUNK = 16384
TURNS = 2
RESERVE_S, DECODE_S = 10.0, 9.0  # the second for each way to fetch
MOST_OF_HOST = 0.85


class Steps(NamedTuple):
    """Of one turn: unmeasured after another rate or way; counted but not timed, because reading
    counters has emptied the engine's queue; counted and timed.
    """

    settling: int = 3
    drained: int = 2
    timed: int = 64


class Plan(NamedTuple):
    """What an arm serves and holds.

    Requests, tokens of each at the end, and how many of them are generated; host memory for keys
    and values; device memory for frames, None if every block is resident, and that for frames and
    compressed keys together.
    """

    batch: int
    context: int
    generated: int
    host_gib: float
    slab_gib: float | None
    device_gib: float


def plan(
    shape: shapes.Shape,
    arm: str,
    *,
    context: int,
    top_k: int,
    device_kv_gib: float,
    most_host_gib: float,
    generated: int,
) -> Plan:
    """As many requests as the device memory for keys and values allows.

    Args:
        shape: Of the model.
        arm: One of `ARMS`.
        context: Tokens of each request at the end.
        top_k: Blocks that a step reads of each request and KV head.
        device_kv_gib: Device memory for frames and compressed keys.
        most_host_gib: Host memory that there is.
        generated: Tokens that each request generates.

    Raises:
        NotAvailableError: Not even one fits.
    """
    per_layer = BLOCK * shape.kv_bytes_per_token // shape.layers
    per_block = per_layer * shape.layers
    blocks = -(-context // BLOCK)
    compressed = per_block // (2 * WINDOW_STRIDE)  # one key of so many tokens, and no values
    resident = {"resident": shape.layers, "first": 1, "offload": 0}[arm]
    frames = resident * blocks + (shape.layers - resident) * min(top_k, blocks)
    per_request = frames * per_layer + blocks * compressed
    spare = 2 * (compressed + resident * per_layer)  # null block, rounding
    batch = int((device_kv_gib * GIB - spare) // per_request)
    if arm != "resident":
        batch = min(batch, int(most_host_gib * GIB // (blocks * per_block)))
    if batch < 1:
        raise NotAvailableError(
            f"{device_kv_gib} GiB hold no request of {context} tokens, which takes "
            f"{per_request / GIB:.2f} GiB"
        )
    half = 0.5 * per_layer / shape.kv_heads  # of a piece, against rounding
    slab = (batch * frames + 2 * resident) * per_layer + half
    return Plan(
        batch, context, generated, ((batch * blocks + 2) * per_block + half) / GIB,
        None if arm == "resident" else slab / GIB, (batch * per_request + spare) / GIB,
    )  # fmt: skip


def measure(arm: str, report: Report, options: argparse.Namespace) -> None:
    """Measures one arm at all rates.

    Raises:
        CheckFailedError: Steps are not what they are to be.
        NotAvailableError: The engine refuses, or there is no time; says why.
    """
    device, size = torch.device(options.device), 0.01 if options.tiny else 1.0
    copy, link = timings.copy_bytes_per_s(device, size), timings.link_bytes_per_s(device, size)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    subject = _Subject(arm, copy, link["host_to_device"], report, options)
    report.note(
        copy_gb_per_s=round(copy / 1e9, 1),
        link_gb_per_s={key: round(value / 1e9, 2) for key, value in link.items()},
        seed=options.seed,
        **predictions.facts(predictions.expected_of(device, copy)),
    )
    subject.start()
    subject.begin()
    for rate in subject.rates:
        if report.left_s < RESERVE_S / 2:
            report.add(rate=rate, skipped="no time")
        else:
            subject.measure(rate)
    commands.finish(subject.llm)


class _Subject:
    """An engine under measurement."""

    llm: Any

    def __init__(
        self, arm: str, copy: float, link: float, report: Report, options: argparse.Namespace
    ) -> None:
        tiny, available = options.tiny, _available_gib()
        self._arm, self._copy, self._link = arm, copy, link
        self._report, self._options = report, options
        self._shape = shapes.TINY if tiny else shapes.MINICPM
        self.rates = (0.25,) if tiny else RATES
        # Nothing is copied where everything is resident, so its rates and ways are alike.
        self._ways = {"resident": WAYS["prefetch"]} if arm == "resident" else WAYS
        self._steps = Steps(1, 1, 2) if tiny else Steps()
        self._chunk = 256 if tiny else CHUNK
        self._top_k, local = (8, 2) if tiny else (96, 32)
        device_kv_gib = 0.0012 if tiny else options.device_kv_gib
        turns = TURNS * len(self._ways) * len(self.rates)
        self._plan = plan(
            self._shape, arm, context=640 if tiny else options.sparda_context, top_k=self._top_k,
            device_kv_gib=device_kv_gib,
            most_host_gib=min(options.host_gib, MOST_OF_HOST * available),
            # While the last prompt is computed, the first request generates.
            generated=sum(self._steps) * turns + (16 if tiny else 256),
        )  # fmt: skip
        self._settings: dict[str, Any] = {
            **{"init_blocks": INIT_BLOCKS, "local_blocks": local, "top_k": self._top_k},
            # It costs what a Forecast costs, and its choice is replaced.
            **{"dense_len": 0, "selector": "lookahead-query"},
            "host_gib": self._plan.host_gib,
            "resident": arm == "resident",
            "resident_first_layer": arm == "first",
            "kernels": "auto" if options.device == "cuda" else "triton",
        }
        if self._plan.slab_gib is not None:
            self._settings["slab_gib"] = self._plan.slab_gib
        report.note(
            shape=self._shape.name, settings=self._settings, device_kv_gib=device_kv_gib,
            host_available_gib=round(available, 1), plan=self._plan._asdict(),
        )  # fmt: skip

    def start(self) -> None:
        """Starts the engine, and compiles what prompts need.

        Raises:
            CheckFailedError: Steps would not run in graphs.
            NotAvailableError: The engine refuses; says why.
        """
        options, sized = self._options, self._plan
        on_cpu = options.device == "cpu"
        mode = llms.EAGER if on_cpu or options.sparda_eager else llms.GRAPHS
        arguments: dict[str, Any] = {
            "load_format": "dummy",
            "max_model_len": sized.context,
            "max_num_seqs": sized.batch,
            "max_num_batched_tokens": self._chunk,
            "enable_prefix_caching": False,  # blocks that requests share have one frame
            **mode,
        }
        if on_cpu:
            arguments["kv_cache_memory_bytes"] = 64 << 20
        else:
            # SPARDA's blocks are in pools of its own; what vLLM allocates are compressed keys.
            arguments |= {"cudagraph_capture_sizes": [sized.batch], "gpu_memory_utilization": 0.5}
        model = shapes.write_config(options.work / "sparda-shape", self._shape, sized.context)
        started = time.perf_counter()
        arm = arms.Arm(self._arm, self._settings, "SPARDA")
        try:
            self.llm = llms.build(arm, options, model, **arguments)
        except Exception as error:
            refusal = _refusal(error)
            if refusal is None:
                raise
            reason = " ".join(str(refusal).split())
            raise NotAvailableError(f"the engine refuses: {reason}") from error
        held = self.llm.collective_rpc(live.device_bytes)[0]
        self._report.note(**llms.facts(self.llm, started), device_bytes=held)
        llms.check_graphs(self._report.facts, mode)
        for length in (BLOCK, self._chunk + BLOCK):
            commands.prefill(self.llm, self._prompt(10**6, length))

    def begin(self) -> None:
        """Brings all requests to decode; with shorter prompts if there is little time.

        Raises:
            NotAvailableError: There is too little time.
        """
        sized, report = self._plan, self._report
        length = sized.context - sized.generated
        seconds = commands.prefill(self.llm, self._prompt(10**5, length))
        report.note(prefill_s=round(seconds, 2))
        left_s = report.left_s - RESERVE_S - DECODE_S * len(self._ways)
        share = left_s / (seconds * sized.batch)
        blocks = self._top_k + int(max(self.rates) * self._top_k) + 2
        if share < 1:
            length = int(length * share)
            if length < blocks * BLOCK:
                raise NotAvailableError(f"no time: a prompt takes {seconds:.1f} s")
        report.note(prompt_tokens=length)
        self.llm.collective_rpc(live.force, args=(length,))
        for way in self._ways.values():
            self.llm.collective_rpc(live.fetch, args=(way,))
        self._context = length
        prompts = [self._prompt(number, length) for number in range(sized.batch)]
        commands.begin(self.llm, prompts, sized.generated)

    def measure(self, rate: float) -> None:
        """Measures all ways at one rate, in turns, and adds a row for each that copies."""
        (share,) = self.llm.collective_rpc(live.set_rate, args=(rate,))
        found: dict[str, list[dict]] = {name: [] for name in self._ways}
        for turn in range(TURNS):
            for name in list(self._ways)[:: 1 if turn % 2 == 0 else -1]:
                self.llm.collective_rpc(live.fetch, args=(self._ways[name],))
                found[name].append(self._turn())
        for name, way in self._ways.items():
            if way.copies:
                row = self._row(name, found[name], found.get(f"{name}, nothing copied"))
                self._report.add(arm=name, rate=rate, new_share=share, **row)

    def _turn(self) -> dict:
        batch = self._plan.batch
        settling = commands.decode(self.llm, self._steps.settling, batch)
        before = self.llm.collective_rpc(live.counts)[0]
        seconds = commands.decode(self.llm, self._steps.drained + self._steps.timed, batch)
        after = self.llm.collective_rpc(live.counts)[0]
        return {
            "settling": settling,
            "seconds": seconds[self._steps.drained :],
            "counts": {key: (after[key] - before[key]) / len(seconds) for key in after},
        }

    def _row(self, name: str, turns: list[dict], nothing: list[dict] | None) -> dict[str, Any]:
        """One measurement, next to its bound."""
        batch, steps = self._plan.batch, _milliseconds(turns)
        counts = harness.mean_of([turn["counts"] for turn in turns], tuple(turns[0]["counts"]))
        moved = counts["host_to_device_bytes"]
        bound = bounds.paged_step(
            self._shape, batch, self._context, (self._top_k, BLOCK, WINDOW_STRIDE), moved,
            self._copy, self._link,
        )  # fmt: skip
        expected = predictions.expected_of(torch.device(self._options.device), self._copy)
        least = bound.blocking_ms if name == "blocking" else bound.prefetched_ms
        row = {
            "batch": batch,
            "context": self._context,
            "step_ms": (step := harness.summary(steps)),
            # The step after the rate has changed, with (nearly) all free picks new.
            "refill_ms": 1e3 * max(turns[0]["settling"]),
            "tokens_per_s": 1e3 * batch * len(steps) / sum(steps),
            "fetched_mib": moved / 2**20,
            "bound_ms": least,
            "predicted_ms": predictions.paged_step_ms(
                self._shape, bound, batch, expected, prefetch=name != "blocking"
            ),
            "share_of_bound": least / step["median"],
            "as_forced": counts["frame_misses"] == counts["expected_misses"],
            "counts_per_step": counts,
        }
        if nothing is not None:
            without = harness.summary(_milliseconds(nothing))
            exposed = step["median"] - without["median"]
            row |= {"nothing_copied_ms": without, "exposed_wait_ms": exposed}
            if name == "blocking" and exposed > 0:  # nothing else runs while blocks are copied
                row["in_flight_gb_per_s"] = moved / exposed / 1e6
        return row

    def _prompt(self, number: int, length: int) -> list[int]:
        return shapes.random_prompt(self._options.seed + number, length, self._shape.vocab)


def _refusal(error: Exception) -> Exception | None:
    """What the plugin refuses: the error, or what validating vLLM's configuration has wrapped."""
    from vllm_sparse.errors import VllmSparseError

    found = error.errors() if hasattr(error, "errors") else []
    wrapped = (item.get("ctx", {}).get("error") for item in found)
    return next((e for e in (error, *wrapped) if isinstance(e, VllmSparseError)), None)


def _milliseconds(turns: list[dict]) -> list[float]:
    return [1e3 * second for turn in turns for second in turn["seconds"]]


def _available_gib() -> float:
    from vllm_sparse.kv.host.memory import available_bytes

    return available_bytes() / GIB
