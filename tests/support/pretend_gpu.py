# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""A GPU in software: ``torch.cuda`` with tensors on "cuda", streams, events and captured graphs.

Memory is the host's and everything runs in order, so nothing is learnt about time or races. But
what Python gets wrong on a GPU shows: calls that do not exist, tensors on the wrong device, host
reads and copies that a capture forbids, and what a replayed graph does not see, as a replay runs
the captured operations and kernels on the addresses of the capture. (The capture itself computes,
too, which a real one does not, and no memory of a graph is used twice.)
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import inspect
import os
import time
import types
from typing import TYPE_CHECKING, Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from support.forbidden import UPLOADS, is_masked, reads_back

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
MEMORY_BYTES = 8 << 30
PROPERTIES = types.SimpleNamespace(
    name="Pretended GPU", total_memory=MEMORY_BYTES, multi_processor_count=4, major=9, minor=0,
    clock_rate=1_980_000, is_integrated=0, warp_size=32,
)  # fmt: skip

_DEVICE, _IS_CUDA, _IS_CPU = (
    getattr(torch.Tensor, name).__get__ for name in ("device", "is_cuda", "is_cpu")
)
_MOVES = {torch.Tensor.to, torch.Tensor.cuda, torch.Tensor.cpu}
# Operations that may see tensors of both sides.
_MIXED = {"copy_", "__getitem__", "__setitem__", "to", "set_", "__set__", "index_put_", "__get__"}


class _Sides:
    """Which storages are on the GPU, and which are pinned."""

    def __init__(self) -> None:
        self._refs: dict[int, StorageWeakRef] = {}

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        self._refs[storage._cdata] = StorageWeakRef(storage)
        if len(self._refs) % 4096 == 0:  # or they would be remembered for ever
            self._refs = {key: ref for key, ref in self._refs.items() if not ref.expired()}

    def __contains__(self, tensor: torch.Tensor) -> bool:
        # The reference keeps another storage from getting the same address.
        return tensor.untyped_storage()._cdata in self._refs


_there, _pinned = _Sides(), _Sides()
_registered: set[int] = set()  # addresses
_capturing: list[tuple[Callable[..., Any], Any, Any, Any]] | None = None


def _is_cuda(item: Any) -> bool:
    if isinstance(item, torch.device):
        return item.type == "cuda"
    return isinstance(item, str) and item.partition(":")[0] == "cuda"


def _tensors(*items: Any) -> Iterator[torch.Tensor]:
    for leaf in tree_leaves(items):
        if isinstance(leaf, torch.Tensor):
            yield leaf


def _wanted(func: Any, args: Any, kwargs: Any) -> bool | None:
    """Whether a call says that its result is on the GPU; ``None`` if it says nothing."""
    if func is torch.Tensor.cuda or func is torch.Tensor.cpu:
        return func is torch.Tensor.cuda
    found = kwargs.get("device")
    if func is torch.Tensor.to and isinstance(args[1] if len(args) > 1 else None, torch.Tensor):
        return args[1] in _there
    if isinstance(found, int):  # the number of a GPU
        return True
    for item in (found, *args):
        if _is_cuda(item):
            return True
        if isinstance(item, torch.device) or (item == "cpu" if isinstance(item, str) else False):
            return False
    return None


class _Mode(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _call(func, args, kwargs or {})


def _call(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if func in (_DEVICE, _IS_CUDA, _IS_CPU):
        there = args[0] in _there
        return {_DEVICE: CUDA if there else func(*args), _IS_CUDA: there, _IS_CPU: not there}[func]
    if func is torch.device:
        return func(*args, **kwargs)
    name = getattr(func, "__name__", "")
    if name == "pin_memory":
        _pinned.add(found := args[0].clone())
        return found
    if name == "is_pinned":
        return args[0] in _pinned
    if name in ("data_ptr", "untyped_storage", "record_stream", "get_device"):
        return {"get_device": -1}.get(name) or (func(*args) if name != "record_stream" else None)
    tensors = list(_tensors(args, kwargs))
    wanted = _wanted(func, args, kwargs)
    there = [tensor in _there for tensor in tensors]
    _check(name, tensors, there)
    if _capturing is not None and (any(there) or wanted):
        _check_capture(func, name, args, kwargs, tensors, there, wanted)
    pinned = kwargs.pop("pin_memory", False)
    if wanted is not None:
        args = [CPU if _is_cuda(item) else item for item in args]
        if "device" in kwargs:
            kwargs = {**kwargs, "device": CPU}
    if isinstance(kwargs.get("generator"), _Generator):
        assert wanted is None or kwargs["generator"].there == wanted, "a generator of another side"
    if func is torch.Tensor.cuda:
        func, args, kwargs = torch.Tensor.to, (args[0], CPU), {}
    result = func(*args, **kwargs)
    place = any(there) if wanted is None else wanted
    if func in _MOVES and there and there[0] != place and result is args[0]:
        result = result.clone()
    for tensor in _tensors(result):
        if place and tensor.device.type == "cpu":
            _there.add(tensor)
        if pinned:
            _pinned.add(tensor)
    if _capturing is not None and _does_something(name, result):
        _capturing.append((func, args, kwargs, result))
    return result


def _does_something(name: str, result: Any) -> bool:
    """Whether a call is more than a question, a view that Python asks for, or an allocation."""
    if name == "__get__" or name.startswith(("empty", "new_empty")):
        return False
    return result is None or next(_tensors(result), None) is not None


def _check(name: str, tensors: list[Any], there: list[bool]) -> None:
    """Raise where a GPU would."""
    sides = {side for tensor, side in zip(tensors, there, strict=True) if tensor.dim()}
    if name not in _MIXED and len(sides) == 2:
        raise RuntimeError(f"{name}: expected all tensors to be on the same device")
    if name == "__getitem__" and not there[0] and any(there):
        raise RuntimeError("indices should be on the CPU, as the indexed tensor is")


def _check_capture(
    func: Any, name: str, args: Any, kwargs: Any, tensors: list[Any], there: list[bool],
    wanted: bool | None,
) -> None:  # fmt: skip
    """Raise where a GPU would not capture a call."""
    masks = name in ("__getitem__", "__setitem__") and is_masked(_tensors(args[1]))
    uploads = (func in _MOVES and wanted and not there[0] and tensors[0] not in _pinned) or (
        name in UPLOADS and wanted
    )
    mixed = name == "copy_" and len(set(there)) == 2
    copies = mixed and tensors[there.index(False)] not in _pinned
    reads = reads_back(name, kwargs) or (func in _MOVES and wanted is False)
    if reads or masks or uploads or copies:
        raise RuntimeError(f"{name}: operation not permitted when stream is capturing")


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that stands for a kernel: captured as a whole, whatever it does inside."""

    def launched(*args: Any, **kwargs: Any) -> Any:
        with torch._C.DisableTorchFunction():
            result = function(*args, **kwargs)
        for tensor in _tensors(result):
            _there.add(tensor)
        if _capturing is not None:
            _capturing.append((function, args, kwargs, result))
        return result

    return launched


class _Generator(torch.Generator):
    there: bool

    def __new__(cls, device: Any = "cpu") -> _Generator:
        made = super().__new__(cls, "cpu")
        made.there = _is_cuda(device)
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return CUDA if self.there else CPU


class _Stream:
    """In order with everything else."""

    def __init__(self, device: Any = None, priority: int = 0, **_: Any) -> None:
        self.device, self.cuda_stream = CUDA, id(self)
        self.priority = priority

    def wait_stream(self, stream: _Stream) -> None:
        assert isinstance(stream, _Stream)

    def wait_event(self, event: _Event) -> None:
        assert event.recorded, "an event that nobody recorded is waited for by nobody"

    def record_event(self, event: _Event | None = None) -> _Event:
        event = event or _Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        _forbid_in_capture("synchronize")

    def query(self) -> bool:
        return True


class _Event:
    def __init__(
        self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False
    ) -> None:
        self.recorded, self._timing, self._at = False, enable_timing, 0.0

    def record(self, stream: _Stream | None = None) -> None:
        assert stream is None or isinstance(stream, _Stream)
        self.recorded, self._at = True, time.perf_counter()

    def wait(self, stream: _Stream | None = None) -> None:
        pass

    def query(self) -> bool:
        _forbid_in_capture("query")
        return True

    def synchronize(self) -> None:
        _forbid_in_capture("synchronize")

    def elapsed_time(self, end: _Event) -> float:
        assert all((self._timing, end._timing, self.recorded, end.recorded))
        return 1e3 * (end._at - self._at)


def _forbid_in_capture(what: str) -> None:
    if _capturing is not None:
        raise RuntimeError(f"{what}: operation not permitted when stream is capturing")


class Graph:
    """What was captured, to be run again on the same tensors."""

    replays = 0  # of all graphs

    def __init__(self, keep_graph: bool = False) -> None:
        self._steps: list[tuple[Callable[..., Any], Any, Any, Any]] = []

    def capture_begin(self, pool: Any = None, **_: Any) -> None:
        global _capturing
        assert _capturing is None, "captures do not nest"
        _capturing = self._steps

    def capture_end(self) -> None:
        global _capturing
        assert _capturing is self._steps
        _capturing = None

    def replay(self) -> None:
        Graph.replays += 1
        with torch._C.DisableTorchFunction():
            for function, args, kwargs, result in self._steps:
                again = function(*args, **kwargs)
                for old, new in zip(_tensors(result), _tensors(again), strict=True):
                    if old.untyped_storage()._cdata != new.untyped_storage()._cdata:
                        old.copy_(new)

    def pool(self) -> tuple[int, int]:
        return (0, 0)

    def reset(self) -> None:
        self._steps.clear()


@contextlib.contextmanager
def _graph(graph: Graph, pool: Any = None, stream: Any = None, **_: Any) -> Iterator[None]:
    assert isinstance(graph, Graph)
    graph.capture_begin(pool)
    try:
        yield
    finally:
        graph.capture_end()


def view_of_host(host: torch.Tensor) -> torch.Tensor:
    """Host memory as the GPU sees it: the same bytes, another tensor."""
    assert host not in _there
    # It is asked of the storage's beginning whether memory is pinned; else vLLM pins a copy.
    assert host in _pinned or host.untyped_storage().data_ptr() in _registered
    size = host.numel() * host.element_size()
    memory = (ctypes.c_char * size).from_address(host.data_ptr())
    memory.owner = host  # type: ignore[attr-defined]
    seen = torch.frombuffer(memory, dtype=torch.uint8).view(host.dtype).view(host.shape)
    _there.add(seen)
    return seen


def _launches() -> None:
    """Triton's interpreter, whose launches are captured and take tensors of the GPU only."""
    from triton import language
    from triton.runtime import interpreter

    launch = interpreter.GridExecutor.__call__

    def run(self: Any, *args: Any, **kwargs: Any) -> None:
        names = [*inspect.signature(self.fn).parameters]
        kwargs = {name: value for name, value in kwargs.items() if name in names}
        for name, value in {**dict(zip(names, args, strict=False)), **kwargs}.items():
            if isinstance(value, torch.Tensor) and value not in _there:
                raise ValueError(f"{self.fn.__name__}: {name} cannot be accessed from Triton")
        kernel(launch)(self, *args, **kwargs)

    interpreter.GridExecutor.__call__ = run
    for name in ("gdc_wait", "gdc_launch_dependents"):
        setattr(language.extra.cuda, name, lambda *_, **__: None)


def install() -> None:
    """Give this process a GPU, for good."""
    # The compiler has an idea of its own of what torch is.
    importlib.import_module("torch._dynamo")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    nothing = lambda *_, **__: None  # noqa: E731
    stream = _Stream()
    current = [stream]

    @contextlib.contextmanager
    def on(stream: _Stream | None) -> Iterator[None]:
        before, current[0] = current[0], stream or current[0]
        try:
            yield
        finally:
            current[0] = before

    def set_stream(stream: _Stream) -> None:
        current[0] = stream

    def synchronize(*_: Any) -> None:
        _forbid_in_capture("synchronize")

    stats = {"allocated_bytes.all.peak": 1 << 28, "allocated_bytes.all.current": 1 << 28}
    runtime = types.SimpleNamespace(
        cudaHostRegister=lambda address, *_: types.SimpleNamespace(
            value=_registered.add(address) or 0
        ),
        cudaHostUnregister=_registered.discard,
    )
    for name, value in {
        **{"is_available": lambda: True, "device_count": lambda: 1, "init": nothing},
        **{"is_initialized": lambda: True, "current_device": lambda: 0, "set_device": nothing},
        "get_device_properties": lambda *_: PROPERTIES,
        "get_device_name": lambda *_: PROPERTIES.name,
        "get_device_capability": lambda *_: (PROPERTIES.major, PROPERTIES.minor),
        "mem_get_info": lambda *_: (MEMORY_BYTES, MEMORY_BYTES),
        "memory_stats": lambda *_: stats,
        **{"memory_allocated": lambda *_: 1 << 28, "memory_reserved": lambda *_: 1 << 28},
        **{"max_memory_allocated": lambda *_: 1 << 28, "reset_peak_memory_stats": nothing},
        **{"Stream": _Stream, "Event": _Event, "CUDAGraph": Graph, "graph": _graph},
        **{"stream": on, "set_stream": set_stream, "current_stream": lambda *_: current[0]},
        **{"default_stream": lambda *_: stream, "synchronize": synchronize},
        **{"empty_cache": nothing, "graph_pool_handle": lambda: (0, 0), "_sleep": nothing},
        **{"manual_seed": nothing, "manual_seed_all": nothing, "cudart": lambda: runtime},
        "is_current_stream_capturing": lambda: _capturing is not None,
        "use_mem_pool": lambda *_: contextlib.nullcontext(),
    }.items():
        setattr(torch.cuda, name, value)
    for name, value in {
        **{"is_available": lambda: True, "device_count": lambda: 1, "empty_cache": nothing},
        **{"synchronize": synchronize, "set_device_index": nothing, "empty_host_cache": nothing},
        "current_accelerator": lambda *_: torch.device("cuda"),
        **{"current_device_index": lambda: 0, "get_memory_info": torch.cuda.mem_get_info},
        **{"memory_stats": lambda *_: stats, "reset_peak_memory_stats": nothing},
        **{"memory_reserved": lambda *_: 1 << 28, "memory_allocated": lambda *_: 1 << 28},
        "max_memory_allocated": lambda *_: 1 << 28,
        **{"current_stream": lambda *_: current[0], "set_stream": set_stream},
    }.items():
        setattr(torch.accelerator, name, value)
        setattr(torch.accelerator.memory, name, value)
    torch.cuda.memory.get_allocator_backend = lambda: "pretended"
    torch.version.cuda = "13.0"
    torch.Generator = _Generator  # type: ignore[misc]
    _launches()
    _Mode().__enter__()
