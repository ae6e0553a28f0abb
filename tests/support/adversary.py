# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Triton's interpreter as a kernel's adversary: what a GPU may do, and the interpreter does not.

Programs of a grid run in shuffled order. The first launches of a kernel are run again in other
orders from the same memory, and must leave the same bits: else some program reads what another one
writes, or takes what another one counts. No lane may touch a byte outside the tensors that the
kernel was given, and lanes that are masked off without a value for them get one that shows.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import pkgutil
import random
from bisect import bisect_right
from collections import Counter
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch

# Launches of each variant of a kernel that are run in all orders.
_THOROUGH = 2

# Outside anything that a kernel may index.
_FAR = 1 << 30

# Kernels whose memory, but not whose result, depends on the order of programs; and why.
EXPLAINED: dict[str, str] = {}


# How often each kernel was launched in this process.
LAUNCHES: Counter[str] = Counter()

# How often each variant was since :func:`start_over`.
_VARIANTS: Counter[Any] = Counter()


def start_over(launches: int = _THOROUGH) -> None:
    """Run so many launches of each variant in all orders, whatever was launched before."""
    global _THOROUGH
    _THOROUGH = launches
    _VARIANTS.clear()


class OrderError(AssertionError):
    """What a kernel leaves depends on the order in which its programs run."""


class OutsideError(AssertionError):
    """A kernel touches memory that it was not given."""


class _Span(NamedTuple):
    start: int
    end: int
    name: str


class _Memory:
    """Where the tensors of the running kernel are."""

    def __init__(self) -> None:
        self._spans: list[_Span] = []
        self._starts: list[int] = []
        self._kernel = ""

    def enter(self, kernel: str, tensors: dict[str, torch.Tensor]) -> None:
        found = sorted(
            _Span(tensor.data_ptr(), tensor.data_ptr() + _extent(tensor), name)
            for name, tensor in tensors.items()
            if tensor.numel()
        )
        spans: list[_Span] = []
        for span in found:  # views of one storage may overlap
            if spans and span.start <= spans[-1].end:
                last = spans.pop()
                span = _Span(last.start, max(last.end, span.end), f"{last.name}, {span.name}")
            spans.append(span)
        self._kernel, self._spans, self._starts = kernel, spans, [span.start for span in spans]

    def leave(self) -> None:
        self._kernel = ""

    def check(self, what: str, pointers: Any, mask: Any) -> None:
        """Raise unless every lane that is not masked off is inside one of the tensors."""
        if not self._kernel:
            return
        lanes = pointers.data[mask.data]
        if not lanes.size:
            return
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        low, high = int(lanes.min()), int(lanes.max())
        if self._inside(low) is self._inside(high) is not None and self._fits(high, size):
            return
        for address in lanes.ravel().tolist():
            if not self._fits(address, size):
                raise OutsideError(f"{self._kernel}: {what} of {size} bytes {self._place(address)}")

    def _inside(self, address: int) -> _Span | None:
        index = bisect_right(self._starts, address) - 1
        return self._spans[index] if index >= 0 else None

    def _fits(self, address: int, size: int) -> bool:
        span = self._inside(address)
        return span is not None and address + size <= span.end

    def _place(self, address: int) -> str:
        def distance(span: _Span) -> int:
            return max(span.start - address, address - span.end + 1)

        nearest = min(self._spans, key=distance)
        side = "before" if address < nearest.start else "after the end of"
        return f"{distance(nearest)} bytes {side} {nearest.name}"


def _extent(tensor: torch.Tensor) -> int:
    """Bytes from a view's first element to the end of its last."""
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _poison(shape: tuple[int, ...], element: Any, kind: Any) -> Any:
    """What a lane that is masked off may hold: anything."""
    if element.is_bf16():
        return np.full(shape, 0x7FC0, kind)
    if element.is_floating():
        return np.full(shape, np.nan, kind)
    return np.full(shape, np.iinfo(kind).max // 2 if kind != np.bool_ else True, kind)


def install() -> None:
    """Change the interpreter of this process; before `interpreter.install`."""
    from triton.runtime import interpreter

    memory = _Memory()
    stock, builder = interpreter.GridExecutor.__call__, interpreter.InterpreterBuilder
    load, store, exchange, modify = (
        builder.create_masked_load, builder.create_masked_store,
        builder.create_atomic_cas, builder.create_atomic_rmw,
    )  # fmt: skip

    def create_masked_load(self: Any, pointers: Any, mask: Any, other: Any, *how: Any) -> Any:
        memory.check("a load", pointers, mask)
        if other is None and memory._kernel and not mask.data.all():
            element = pointers.get_element_ty()
            kind = interpreter._get_np_dtype(element)
            poison = _poison(pointers.data.shape, element, kind)
            other = interpreter.TensorHandle(poison, element)
        return load(self, pointers, mask, other, *how)

    def create_masked_store(self: Any, pointers: Any, value: Any, mask: Any, *how: Any) -> Any:
        memory.check("a store", pointers, mask)
        return store(self, pointers, value, mask, *how)

    def create_atomic_rmw(self: Any, kind: Any, pointers: Any, value: Any, mask: Any, *how: Any):
        memory.check("an atomic", pointers, mask)
        return modify(self, kind, pointers, value, mask, *how)

    def create_atomic_cas(self: Any, pointers: Any, *how: Any) -> Any:
        whole = interpreter.TensorHandle(np.ones_like(pointers.data, dtype=bool), None)
        memory.check("an atomic", pointers, whole)
        return exchange(self, pointers, *how)

    def launch(self: Any, *args: Any, **options: Any) -> None:
        if self.fn.__globals__["__name__"].startswith("vllm."):
            return stock(self, *args, **options)
        accepted = inspect.signature(self.fn).parameters
        options = {key: value for key, value in options.items() if key in accepted}
        bound = inspect.getcallargs(self.fn, *args, **options)
        tensors = {key: x for key, x in bound.items() if isinstance(x, torch.Tensor)}
        constants = tuple((key, str(bound[key])) for key in self.constexprs)
        variant = self.fn.__name__, constants
        _VARIANTS[variant] += 1
        LAUNCHES[self.fn.__name__] += 1
        scope = interpreter._patch_lang(self.fn)
        memory.enter(self.fn.__name__, tensors)
        try:
            converted = {
                key: value if key in self.constexprs else interpreter._implicit_cvt(value)
                for key, value in bound.items()
            }
            grid = self.grid(converted) if callable(self.grid) else self.grid
            grid = (*grid, *([1] * (3 - len(grid))))
            interpreter.interpreter_builder.set_grid_dim(*grid)

            def run(programs: list[tuple[int, ...]]) -> None:
                for program in programs:
                    interpreter.interpreter_builder.set_grid_idx(*program)
                    self.fn(**converted)

            orders = _orders(grid, seed=_VARIANTS.total())
            if _VARIANTS[variant] > _THOROUGH or len(orders[0]) == 1:
                run(orders[-1])
            else:
                _in_every_order(self.fn.__name__, tensors, orders, run)
        finally:
            memory.leave()
            scope.restore()
        return None

    builder.create_masked_load = create_masked_load
    builder.create_masked_store = create_masked_store
    builder.create_atomic_rmw = create_atomic_rmw
    builder.create_atomic_cas = create_atomic_cas
    interpreter.GridExecutor.__call__ = launch


def poison_scratch() -> None:
    """Fill what the kernels' callers allocate and do not set; tests have fixtures for that."""

    def poisoned(allocate: Any) -> Any:
        def filled(*args: Any, **options: Any) -> torch.Tensor:
            tensor = allocate(*args, **options)
            return tensor.fill_(torch.nan if tensor.is_floating_point() else _FAR)

        return filled

    class Poisoned(ModuleType):
        empty = staticmethod(poisoned(torch.empty))
        empty_like = staticmethod(poisoned(torch.empty_like))

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

    package = importlib.import_module("vllm_sparse.kernels.triton")
    for found in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        module = importlib.import_module(found.name)
        if hasattr(module, "torch"):
            module.torch = Poisoned("torch")  # type: ignore[attr-defined]


def _orders(grid: tuple[int, ...], seed: int) -> list[list[tuple[int, ...]]]:
    """Programs backwards, and shuffled twice."""
    programs = list(itertools.product(*map(range, grid)))
    shuffled = [random.Random(2 * seed + i).sample(programs, len(programs)) for i in range(2)]
    return [programs[::-1], *shuffled]


def _in_every_order(kernel: str, tensors: dict[str, torch.Tensor], orders: Any, run: Any) -> None:
    """Run a kernel in several orders from the same memory.

    Raises:
        OrderError: It leaves something else.
    """
    named = {tensor.untyped_storage().data_ptr(): name for name, tensor in tensors.items()}
    storages = {
        tensor.untyped_storage().data_ptr(): torch.empty(0, dtype=torch.uint8).set_(
            tensor.untyped_storage()
        )
        for tensor in tensors.values()
        if tensor.untyped_storage().nbytes()
    }
    before = {at: storage.clone() for at, storage in storages.items()}
    left: dict[int, torch.Tensor] = {}
    for order in orders:
        for at, storage in storages.items():
            storage.copy_(before[at])
        run(order)
        for at, storage in storages.items():
            if at in left and not storage.equal(left[at]) and kernel not in EXPLAINED:
                count = int((storage != left[at]).sum())
                raise OrderError(
                    f"{kernel} leaves {count} other bytes in {named[at]} when its programs run in "
                    "another order"
                )
        left = {at: storage.clone() for at, storage in storages.items()}
