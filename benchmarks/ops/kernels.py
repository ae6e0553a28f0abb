# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The kernels, as all operations reach them.

Kernels are looked up when they are called, so that a test may put another one in their place.
"""

from __future__ import annotations

import importlib
import inspect
from functools import partial
from typing import TYPE_CHECKING, Any

from vllm_sparse.kernels.dispatch import FILES, implementation

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

reference = partial(implementation, "reference")
triton = partial(implementation, "triton")


def has_cpp(name: str) -> bool:
    """Whether there is a kernel in C++; where there is none, a CPU runs the reference."""
    try:
        return hasattr(importlib.import_module(f"vllm_sparse.kernels.cpu.{FILES[name]}"), name)
    except ModuleNotFoundError:
        return False


def cpu(name: str) -> Callable[..., Any]:
    """A kernel as a CPU runs it."""
    return implementation("cpu" if has_cpp(name) else "reference", name)


def grid() -> ModuleType:
    """The module that says how rows are shared out among programs."""
    return importlib.import_module("vllm_sparse.kernels.triton.grid")


def accepted(kernel: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """Those of the arguments that a kernel has."""
    names = inspect.signature(kernel).parameters
    return {name: arguments[name] for name in names if name in arguments}


def call(kernel: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """Calls a kernel with those of the arguments that it has."""
    return kernel(**accepted(kernel, arguments))
