# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What may not happen while a CUDA graph is captured, as far as a CPU can see it.

All tensors are taken for the device's, which `pretend_gpu` tells from those of the host.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections import Counter
from typing import TYPE_CHECKING, Any

from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from support.forbidden import UPLOADS, is_masked, reads_back
from vllm_sparse.counters import DeviceCounters
from vllm_sparse.kv.host.pager import LayerPager
from vllm_sparse.upload import upload

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# With poison, which looks at everything, nothing is captured.
_POISON = "poison_fresh", "poison_frames"


class CaptureError(AssertionError):
    """What ran could not be captured."""


_captures = _allowed = 0


@contextlib.contextmanager
def allowed() -> Iterator[None]:
    """For what stands in for a kernel, and for checks that nobody runs in graphs."""
    global _allowed
    _allowed += 1
    try:
        yield
    finally:
        _allowed -= 1


def allow(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function in which everything may happen."""

    def free(*args: Any, **options: Any) -> Any:
        with allowed():
            return function(*args, **options)

    return free


def _refuse(what: str, why: str) -> None:
    if _captures and not _allowed:
        raise CaptureError(f"{what} {why}, which no captured graph can")


class _Calls(TorchFunctionMode):
    """What Python calls: not all of it reaches PyTorch's operators, or looks the same there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if reads_back(name, kwargs or {}):
            _refuse(name, "reads a tensor back")
        if name in UPLOADS:
            _refuse(name, "copies from pageable memory")
        if name == "pin_memory":
            _refuse(name, "copies from memory of this one step")
        return func(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if reads_back(name, kwargs or {}):
            _refuse(name, "reads a tensor back")
        index = args[1] if name.startswith("index") and len(args) > 1 else None
        if isinstance(index, list | tuple) and is_masked(index):
            _refuse(name, "asks how many elements of a mask are set")
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def capturing() -> Iterator[None]:
    """Everything in here is captured.

    Raises:
        CaptureError: It cannot be.
    """
    patched: list[tuple[Any, str, Any]] = [
        (DeviceCounters, "publish", _refused("DeviceCounters.publish", "asks an event")),
        *((LayerPager, name, allow(getattr(LayerPager, name))) for name in _POISON),
        *(
            (module, "upload", _refused("upload", "copies from memory of this one step"))
            for path, module in list(sys.modules.items())
            if path.startswith("vllm_sparse.") and vars(module).get("upload") is upload
        ),
    ]
    if "triton" in sys.modules:  # interpreted, a launch is all that a capture sees of a kernel
        executor = importlib.import_module("triton.runtime.interpreter").GridExecutor
        patched.append((executor, "__call__", allow(executor.__call__)))
    saved = [(owner, name, getattr(owner, name)) for owner, name, _ in patched]
    global _captures
    _captures += 1
    try:
        for owner, name, function in patched:
            setattr(owner, name, function)
        with _Calls(), _Operators():
            yield
    finally:
        _captures -= 1
        for owner, name, function in saved:
            setattr(owner, name, function)


def _refused(what: str, why: str) -> Callable[..., None]:
    return lambda *_, **__: _refuse(what, why)


FREE = ("aten::empty", "aten::new_empty", "aten::alias", "aten::detach", "aten::_unsafe_view")


class Operations(TorchDispatchMode):
    """Counts what would be launched on a device: no views, and nothing that only allocates."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not (func.is_view or func._schema.name.startswith(FREE)):
            self.found[func._schema.name] += 1
        return func(*args, **(kwargs or {}))
