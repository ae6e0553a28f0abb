# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Methods of vLLM's that ours go on from, where it offers no other place to listen."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType


def replace_once(owner: type | ModuleType, name: str, make: Callable[[Any], Any]) -> None:
    """Replace a method, unless that has been done.

    Args:
        owner: The class, or a module with a function.
        name: Of the method.
        make: Gets the method and returns ours, which calls it.
    """
    stock = getattr(owner, name)
    if not hasattr(stock, "_vllm_sparse_stock"):
        ours: Any = functools.wraps(stock)(make(stock))
        ours._vllm_sparse_stock = stock
        setattr(owner, name, ours)
