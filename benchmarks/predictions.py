# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What the cost model expects of whatever a GPU program measures, to stand beside it.

Estimates: none of them was compared with a GPU yet. What :mod:`benchmarks.cost` counts are the
kernels of a ROCKETKV step; everything else follows from launches, bytes and operations alone, and
is therefore closer to the least that a thing can take.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from benchmarks import cost
from vllm_sparse.planner import bounds

if TYPE_CHECKING:
    import torch

    from benchmarks.cost import Case
    from benchmarks.gpu.shapes import Shape
    from vllm_sparse.planner.bounds import Split

FLOPS_PER_S = 6e14  # of bfloat16 that matrix products and FlashAttention reach, an estimate
# Norms, projections, rotary embedding, activation: what a layer launches besides its attention.
OTHER_LAUNCHES = 9
# FlashAttention's three launches: write, attend over splits, merge them.
DENSE_LAUNCHES = 3
# Of SPARDA's layer beside the copies: product of the tap, write, score, choose, look up, fill,
# attend; they do not overlap.
PAGED_LAUNCHES = 7
# What programs of them wait for, one after the other, in loads from memory.
PAGED_WAITS = 16
# Launches of what is timed alone and not in the cost model.
LAUNCHES = {"score prompt": 4, "top indices": 1, "compact tokens": 2, "whole stage 1": 9}
PAGED_KERNELS = {"select blocks": (2, 6), "resolve": (2, 8), "copy pieces": (1, 2)}
PAGED_KERNELS["attend frames"] = (1, 3)


class Expected(NamedTuple):
    """A GPU as the cost model sees it.

    Attributes:
        machine: Its constants, of which measured ones have taken the place of published ones.
        overlapped: Whether launches overlap.
    """

    machine: cost.Machine
    overlapped: bool


def expected_of(device: torch.device, copy_bytes_per_s: float) -> Expected:
    """The GPU at hand; the one that the model was made for if there is none.

    Args:
        device: Where things are measured.
        copy_bytes_per_s: That a large copy has reached there.
    """
    import torch

    machine = cost.Machine()
    if device.type != "cuda":
        return Expected(machine, True)
    found = torch.cuda.get_device_properties(device)
    khz = getattr(found, "clock_rate", 0)  # older versions of PyTorch do not tell
    return Expected(
        machine._replace(
            name=found.name, multiprocessors=found.multi_processor_count,
            bytes_per_s=copy_bytes_per_s, clock_ghz=khz / 1e6 or machine.clock_ghz,
        ),
        found.major >= 9,
    )  # fmt: skip


def facts(expected: Expected) -> dict[str, object]:
    """What a prediction rests on, for a result file."""
    return {"predicted_for": {**expected.machine._asdict(), "overlapped": expected.overlapped}}


def kernel_us(
    name: str, least_bytes: int, expected: Expected, case: Case | None, shape: Shape
) -> float | None:
    """Microseconds of an operation that is timed alone; ``None`` if nothing is expected of it.

    Args:
        name: Of the operation.
        least_bytes: That it must move.
        expected: On what.
        case: The shape of a decode step of ROCKETKV; ``None`` for SPARDA.
        shape: Of the model.
    """
    machine = expected.machine
    moved = 1e6 * least_bytes / machine.bytes_per_s
    if case is not None:
        parts = rocket_parts(case, expected, shape)
        parts["whole step"] = sum(parts.values())
        if name in parts:
            return parts[name]
        if name == "attend all kept":
            split = cost.split_of(case, shape)
            split = split._replace(top_k=split.held)
            return rocket_parts(case, expected, shape, split)["attend slots"]
        if name.startswith("FlashAttention"):
            return 2 * machine.launch_us + moved
        return LAUNCHES[name] * machine.launch_us + moved if name in LAUNCHES else None
    if name not in PAGED_KERNELS:
        return None
    launches, waits = PAGED_KERNELS[name]
    return launches * machine.launch_us + max(moved, waits * machine.memory_us)


def rocket_parts(
    case: Case, expected: Expected, shape: Shape, split: Split | None = None
) -> dict[str, float]:
    """Microseconds of a layer's launches, by the name of the operation that is timed."""
    names = ("append", "select slots", "attend slots")
    launched = cost.layer(case, expected.machine, shape, split)
    times = [cost.microseconds(kernel, *expected) for kernel in launched]
    return dict(zip(names, times, strict=True))


def rest_ms(shape: Shape, batch: int, expected: Expected) -> float:
    """A decode step without attention: weights, or products if there are many rows; launches."""
    read = 1e3 * shape.step_weight_bytes(batch) / expected.machine.bytes_per_s
    computed = 1e3 * batch * shape.step_weight_bytes(1) / FLOPS_PER_S  # two for each two bytes
    return max(read, computed) + shape.layers * OTHER_LAUNCHES * expected.machine.launch_us / 1e3


def dense_layer_us(shape: Shape, batch: int, tokens: int, expected: Expected) -> float:
    """Attention of a layer that reads all tokens."""
    moved = 1e6 * bounds.attend_bytes(shape, batch, tokens) / expected.machine.bytes_per_s
    return DENSE_LAUNCHES * expected.machine.launch_us + moved


def step_ms(
    shape: Shape, batch: int, context: int, split: Split | None, longest: int, expected: Expected
) -> float:
    """A decode step of stock vLLM, or of ROCKETKV if there is a split.

    Args:
        shape: Of the model.
        batch: Requests.
        context: Tokens of each prompt.
        split: What is held and read of each.
        longest: Longest request of the engine.
        expected: On what.
    """
    if split is None or not split.stage2:
        read = context if split is None else split.held
        layer = dense_layer_us(shape, batch, read, expected)
    else:
        case = cost.Case(context, 2 * split.top_k, batch, longest)
        layer = sum(rocket_parts(case, expected, shape, split).values())
    return rest_ms(shape, batch, expected) + shape.layers * layer / 1e3


def paged_step_ms(
    shape: Shape, bound: bounds.PagedStep, batch: int, expected: Expected, *, prefetch: bool
) -> float:
    """A decode step of SPARDA.

    Args:
        shape: Of the model.
        bound: What its bytes take.
        batch: Requests.
        expected: On what.
        prefetch: Whether copies run beside the computation.
    """
    machine = expected.machine
    waited = PAGED_LAUNCHES * machine.launch_us + PAGED_WAITS * machine.memory_us
    weights_ms = 1e3 * shape.step_weight_bytes(batch) / machine.bytes_per_s
    computed = rest_ms(shape, batch, expected) + shape.layers * waited / 1e3
    computed += max(0.0, bound.compute_ms - weights_ms)
    return max(computed, bound.transfer_ms) if prefetch else computed + bound.transfer_ms


def prefill_s(shape: Shape, context: int) -> float:
    """A cold prompt: its products and causal attention; the logits are of one token."""
    weights = (shape.step_weight_bytes(1) - 2 * shape.hidden * shape.vocab) / 2
    attention = 2 * shape.layers * shape.heads * shape.head_dim * context**2
    return (2 * weights * context + attention) / FLOPS_PER_S
