# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Times what the layers of a live engine on a CPU do, where calls return when the work is done.

The functions run in the model's worker, through `LLM.collective_rpc`.
"""

from __future__ import annotations

import time
from functools import wraps
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

_spent: dict[str, float] = {}


def _timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def run(*arguments: Any, **options: Any) -> Any:
        begin = time.perf_counter()
        try:
            return function(*arguments, **options)
        finally:
            _spent[name] = _spent.get(name, 0.0) + time.perf_counter() - begin

    return run


def attach(worker: Any) -> None:
    """Times every attention layer from now on and, inside, SPARDA's selection in prompts."""
    context = worker.model_runner.vllm_config.compilation_config.static_forward_context
    impls = [layer.impl for layer in context.values() if hasattr(layer, "impl")]
    for impl in impls:
        impl.forward = _timed("attention", impl.forward)
    if hasattr(impls[0], "layer"):
        runtime = impls[0].layer.runtime
        for name in ("choose_blocks", "attend_part"):
            timed = _timed(name, getattr(runtime.kernels, name))
            runtime.kernels = runtime.kernels._replace(**{name: timed})


def spent(worker: Any) -> dict[str, float]:
    """Seconds by part since the last call, and ``cpu``: those of all threads of the worker."""
    last, now = _spent.get("before", 0.0), time.process_time()
    parts = {name: seconds for name, seconds in _spent.items() if name != "before"}
    _spent.clear()
    _spent["before"] = now
    return {**parts, "cpu": now - last}
