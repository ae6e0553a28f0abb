# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""SPARDA at forced miss rates, every arm with the same device memory for keys and values.

On a large GPU everything fits, and offloading has nothing to gain; so the device memory for KV is a
stated figure, and each arm serves as many requests as it can with it. With random weights the
choice of blocks is random too, so the share of new blocks in each step is forced. The slab is
exactly the working set of a step, or the misses would not be those that were forced.
"""

from __future__ import annotations

import argparse
import time
import traceback
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from benchmarks import harness, live, overlap, speed
from benchmarks.gpu import bounds, engines, models, timing
from benchmarks.gpu.stages import NotAvailableError

if TYPE_CHECKING:
    from benchmarks.gpu.stages import Report

BLOCK = overlap.BLOCK
RATES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4)
STEPS = 20
WINDOW_STRIDE = 16
ARMS = {"resident": "resident", "blocking": "no prefetch", "prefetch": "prefetch"}
RESERVE_S = 10.0


class Plan(NamedTuple):
    """What an arm serves and holds.

    Attributes:
        batch: Requests.
        context: Tokens of each at the end.
        generated: Of which generated.
        host_gib: Host memory for keys and values.
        slab_gib: Device memory for frames; None if every block is resident.
        device_gib: Device memory for frames and compressed keys together.
    """

    batch: int
    context: int
    generated: int
    host_gib: float
    slab_gib: float | None
    device_gib: float


def plan(
    shape: models.Shape,
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
        arm: Key of `ARMS`.
        context: Tokens of each request at the end.
        top_k: Blocks that a step reads of each request and KV head.
        device_kv_gib: Device memory for frames and compressed keys.
        most_host_gib: Host memory that there is.
        generated: Tokens that each request generates.

    Raises:
        NotAvailableError: Not even one fits.
    """
    piece = BLOCK * shape.kv_bytes_per_token // (shape.layers * shape.kv_heads)
    per_block = piece * shape.layers * shape.kv_heads
    blocks = -(-context // BLOCK)
    compressed = per_block // (2 * WINDOW_STRIDE)  # one key of so many tokens, and no values
    frames = blocks if arm == "resident" else min(top_k, blocks)
    per_request = frames * per_block + blocks * compressed
    spare = 2 * (compressed + (per_block if arm == "resident" else 0))  # null block, rounding
    batch = int((device_kv_gib * harness.GIB - spare) // per_request)
    if arm != "resident":
        batch = min(batch, int(most_host_gib * harness.GIB // (blocks * per_block)))
    if batch < 1:
        raise NotAvailableError(
            f"{device_kv_gib} GiB hold no request of {context} tokens, which takes "
            f"{per_request / harness.GIB:.2f} GiB"
        )
    held = batch * blocks + 2
    half = 0.5 * piece  # against rounding
    slab = None if arm == "resident" else (batch * frames * per_block + half) / harness.GIB
    return Plan(
        batch,
        context,
        generated,
        (held * per_block + half) / harness.GIB,
        slab,
        (batch * per_request + spare) / harness.GIB,
    )


def measure(name: str, report: Report, options: argparse.Namespace) -> None:
    """Measures one arm at all rates.

    Raises:
        NotAvailableError: The engine refuses; says why.
    """
    shape = models.TINY if options.tiny else models.MINICPM
    rates = (0.0, 0.2) if options.tiny else RATES
    steps = 3 if options.tiny else STEPS
    top_k, local = (8, 2) if options.tiny else (96, 32)
    slack = 64 if options.tiny else 256  # what the first request generates before the last begins
    device = torch.device(options.device)
    size = 0.01 if options.tiny else 1.0
    copy, link = timing.copy_bytes_per_s(device, size), timing.link_bytes_per_s(device, size)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    device_kv_gib = 0.01 if options.tiny else options.device_kv_gib
    sized = plan(
        shape,
        name,
        context=1024 if options.tiny else options.sparda_context,
        top_k=top_k,
        device_kv_gib=device_kv_gib,
        most_host_gib=options.host_gib,
        generated=(len(rates) + 1) * (steps + overlap.SETTLING_STEPS) + slack,
    )
    settings = overlap.arms_of(argparse.Namespace(top_k=top_k), {"local_blocks": local})
    own = {**settings[ARMS[name]], "host_gib": sized.host_gib}
    if sized.slab_gib is not None:
        own["slab_gib"] = sized.slab_gib
    report.note(
        shape=shape.name,
        settings=own,
        device_kv_gib=device_kv_gib,
        plan=sized._asdict(),
        copy_gb_per_s=round(copy / 1e9, 1),
        link_gb_per_s={key: round(value / 1e9, 2) for key, value in link.items()},
        seed=options.seed,
    )
    llm = _engine(name, own, sized, shape, report, options)
    vocab, length = shape.vocab, sized.context - sized.generated
    prompts = [models.random_prompt(options.seed + n, length, vocab) for n in range(sized.batch)]
    first = speed.prefill(llm, prompts[0])
    report.note(prefill_s=round(first, 2))
    if first * sized.batch > report.left_s - RESERVE_S:
        raise NotAvailableError(
            f"no time: {sized.batch} prompts take {first:.1f} s each; lower --sparda-context"
        )
    speed.begin(llm, prompts, sized.generated)
    row = partial(_row, name, sized, shape, top_k, copy, link["host_to_device"])
    # As the random weights have it; the same on every host, whatever can be forced.
    natural = {"seconds": speed.decode(llm, steps, sized.batch, 3), "counts": {}}
    report.add(**row(None, natural))
    try:
        llm.collective_rpc(live.force_selection)
        for rate in rates:
            if report.left_s < RESERVE_S / 2:
                report.add(rate=rate, skipped="no time")
                continue
            report.add(**row(rate, overlap.forced(llm, rate, steps, sized.batch)))
    except Exception as error:
        traceback.print_exc()
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        report.note(forced_rates=f"not available: {reason}")
        return
    speed.finish(llm)


def _engine(
    name: str,
    own: dict[str, Any],
    sized: Plan,
    shape: models.Shape,
    report: Report,
    options: argparse.Namespace,
) -> Any:
    model = models.write_config(options.work / "sparda-shape", shape, sized.context)
    arguments: dict[str, Any] = {
        "load_format": "dummy",
        "max_model_len": sized.context,
        "max_num_seqs": sized.batch,
        "max_num_batched_tokens": 1024 if options.tiny else 16384,
        "enable_prefix_caching": False,  # blocks that requests share have one frame
        # SPARDA's blocks are in pools of its own; what vLLM allocates are the compressed keys.
        "gpu_memory_utilization": 0.5,
        **(engines.EAGER if options.device == "cpu" or options.sparda_eager else engines.GRAPHS),
    }
    if options.device == "cpu":
        arguments |= {"kv_cache_memory_bytes": 64 << 20}
        del arguments["gpu_memory_utilization"]
    started = time.perf_counter()
    try:
        llm = engines.build(harness.Arm(name, own, "SPARDA"), options, model, **arguments)
    except Exception as error:
        raise NotAvailableError(f"the engine refuses: {' '.join(str(error).split())}") from error
    report.note(**engines.facts(llm, started))
    return llm


def _row(
    arm: str,
    sized: Plan,
    shape: models.Shape,
    top_k: int,
    device_bytes_per_s: float,
    link_bytes_per_s: float,
    rate: float | None,
    found: dict,
) -> dict:
    """One measurement, next to its bound; of a natural choice of blocks only the time is known."""
    step = harness.summary([1e3 * second for second in found["seconds"]])
    counts, steps = found["counts"], len(found["seconds"])
    measured = {"rate": rate, "batch": sized.batch, "step_ms": step}
    measured["tokens_per_s"] = 1e3 * sized.batch / step["median"]
    unknown = ("bound_ms", "exposed_wait_ms", "fetched_mib", "link_gb_per_s", "as_forced")
    if not counts:
        return {**measured, **dict.fromkeys(unknown)}
    fetched = counts["engine_bytes"] / steps
    bound = bounds.paged_step(
        shape, sized.batch, top_k * BLOCK, fetched, device_bytes_per_s, link_bytes_per_s
    )
    least = bound.blocking_ms if arm == "blocking" else bound.prefetched_ms
    return {
        **measured,
        "bound_ms": least,
        "share_of_bound": least / step["median"],
        "exposed_wait_ms": 1e3 * counts["exposed_wait_seconds"] / steps,
        "fetched_mib": fetched / 2**20,
        "link_gb_per_s": fetched / step["median"] / 1e6,
        "as_forced": counts["frame_misses"] == counts["expected_misses"],
        "counts": counts,
    }
