# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What an operation is, how its kernel is compared with the reference, and how it is run for time.

Operations come in chains: what one gives or writes is an input of those that follow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.ops.kernels import accepted, call, reference, triton

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    Arguments = dict[str, Any]
    Runs = list[Callable[[], object]]
    Found = tuple[str, float, float]
    Kernels = Callable[[str], Callable[..., Any]]

# Largest ||ours - reference|| / ||reference|| of one kernel.
COMPUTED = {torch.float32: 1e-3, torch.float16: 5e-3, torch.bfloat16: 1e-2}
WRONG = 1e9  # NaN, or not the same where it must be
COLD_BYTES = 256 << 20  # several times the largest cache
MOST_LAYERS = 256


def error(actual: Tensor, expected: Tensor) -> float:
    """Relative error; `WRONG` if it is not a number."""
    actual, expected = actual.double(), expected.double()
    found = float((actual - expected).norm() / expected.norm())
    return found if math.isfinite(found) else WRONG


def same(a: Tensor, b: Tensor) -> bool:
    """Bit by bit, NaN included."""
    kind = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return torch.equal(a.view(kind), b.view(kind))


def unless(equal: bool) -> float:
    """0 if all is equal, else `WRONG`."""
    return 0.0 if equal else WRONG


class Side(NamedTuple):
    """What an operation returned on one side of a comparison, and its arguments as it left them."""

    result: Any
    arguments: Arguments


def result_error(actual: Side, expected: Side) -> float:
    """Relative error of what is returned."""
    return error(actual.result, expected.result)


def output_error(actual: Side, expected: Side) -> float:
    """Relative error of what is written to the output."""
    return error(actual.arguments["output"], expected.arguments["output"])


def cache_unlike(actual: Side, expected: Side) -> float:
    """0 if caches are the same."""
    return unless(same(actual.arguments["cache"], expected.arguments["cache"]))


@dataclass(frozen=True)
class Op:
    """One operation.

    Attributes:
        name: In tables.
        kernel: Its name in `kernels`.
        compare: The error of one side against the other.
        limit: Largest error; None is what computing in the dtype allows.
        writes: Arguments that it changes, tensors.
        gives: Name of its result among the arguments of what follows.
        goes_on: What it writes is input of what follows.
        fixed: Arguments of its own.
        views: Makes those arguments anew that are views of what it writes.
        timed: Further ones when it is timed.
        least: Fewest bytes, from a step's sizes.
    """

    name: str
    kernel: str
    compare: Callable[[Side, Side], float] = result_error
    limit: float | None = None
    writes: tuple[str, ...] = ()
    gives: str | None = None
    goes_on: bool = False
    fixed: Arguments = field(default_factory=dict)
    views: Callable[[Arguments], Arguments] = lambda arguments: arguments
    timed: Arguments = field(default_factory=dict)
    least: Callable[[Any], int] | None = None


def sides(op: Op, arguments: Arguments) -> tuple[Side, Side]:
    """Runs kernel and reference, each on copies of what they write."""
    found = []
    for side in (triton, reference):
        copies = {name: _copy(arguments[name]) for name in op.writes}
        own = op.views({**arguments, **op.fixed, **copies})
        found.append(Side(call(side(op.kernel), own), own))
    return found[0], found[1]


def _copy(value: Any) -> Any:
    if isinstance(value, tuple):
        return type(value)(*map(_copy, value))
    return value.clone() if isinstance(value, torch.Tensor) else value


def differences(ops: Iterable[Op], arguments: Arguments, dtype: torch.dtype) -> Iterator[Found]:
    """Yields name, error and largest error of each operation; all go on from the reference's."""
    for op in ops:
        actual, expected = sides(op, arguments)
        limit = COMPUTED[dtype] if op.limit is None else op.limit
        yield op.name, op.compare(actual, expected), limit
        if op.goes_on:
            arguments |= {name: expected.arguments[name] for name in op.writes}
        if op.gives:
            arguments[op.gives] = expected.result


class Timed(NamedTuple):
    """An operation to be timed: runs on different inputs, and the fewest bytes that each moves.

    `over` says whose bandwidth bounds it: that of a ``copy``, or of the ``link``.
    """

    name: str
    runs: Runs
    least: int
    over: str = "copy"
    further: dict[str, int] = {}  # noqa: RUF012 - a NamedTuple's default is never changed


def timed(
    ops: Iterable[Op],
    steps: list[Arguments],
    sizes: Any,
    kernels: Kernels = triton,
) -> Iterator[Timed]:
    """Yields the operations of a chain, each prepared by the kernels before it.

    Args:
        ops: A chain.
        steps: Arguments of the first operation, once for each input; get what the others need.
        sizes: What bytes are computed from.
        kernels: Where kernels of a name are found: `triton`, `cpu`, `reference`.
    """
    for op in ops:
        kernel = kernels(op.kernel)
        # Which arguments it has is found once: that takes a tenth of what a layer takes on a CPU.
        runs: Runs = [
            partial(kernel, **accepted(kernel, {**step, **op.fixed, **op.timed})) for step in steps
        ]
        assert op.least is not None
        yield Timed(op.name, runs, op.least(sizes))
        if op.goes_on or op.gives:
            results = [run() for run in runs]
            if op.gives:
                for step, result in zip(steps, results, strict=True):
                    step[op.gives] = result


def cold_layers(read: int, device: torch.device, most: int = MOST_LAYERS) -> int:
    """As many inputs as outgrow the cache; two for a try-out on a CPU."""
    return max(1, min(-(-COLD_BYTES // read), most, MOST_LAYERS)) if device.type == "cuda" else 2
