# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Where the kernels are: the only module of the benchmarks that says so.

Kernels are looked up when they are called, so that a test may put another one in their place.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from typing import TYPE_CHECKING, Any

from vllm_sparse.kernels.layout import PageLayout
from vllm_sparse.kernels.types import Blocks, PageTable, Ranking, Rows, Selected, Unframed

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

__all__ = [
    "Blocks",
    "PageLayout",
    "PageTable",
    "Ranking",
    "Rows",
    "Selected",
    "Unframed",
    "call",
    "cpu_decode_attention",
    "launches",
    "reference",
    "triton",
]

# The file of each kernel, the same in every folder of implementations.
_FILES = {
    "append_tokens": "append",
    "decode_attention": "decode",
    **dict.fromkeys(("score_pages", "select_slots"), "pages"),
    "attend_slots": "attention",
    "score_prompt": "prompt",
    "top_indices": "topk",
    **dict.fromkeys(("compact_tokens", "compact_prompts"), "compaction"),
    "plan_rows": "rows",
    "select_blocks": "sparda_select",
    **dict.fromkeys(("resolve", "copy_pieces"), "sparda_paging"),
    "attend_frames": "sparda_attention",
    "attend_part": "sparda_prefill",
    **dict.fromkeys(("write_tokens", "update_windows", "record_queries"), "sparda_tokens"),
}


@functools.cache
def _module(folder: str, kernel: str) -> ModuleType:
    return importlib.import_module(f"vllm_sparse.kernels.{folder}.{_FILES[kernel]}")


def reference(name: str) -> Callable[..., Any]:
    """The PyTorch reference of a kernel."""
    return getattr(_module("reference", name), name)


def triton(name: str) -> Callable[..., Any]:
    """The Triton kernel."""
    return getattr(_module("triton", name), name)


def call(kernel: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """Calls a kernel with those of the arguments that it has."""
    names = inspect.signature(kernel).parameters
    return kernel(**{name: arguments[name] for name in names if name in arguments})


def launches() -> Any:
    """The module that says how kernels are launched."""
    from vllm_sparse.kernels.triton import launch

    return launch


def cpu_decode_attention() -> tuple[Callable[..., None], Callable[..., None]]:
    """ROCKETKV's fused decode kernel for CPUs, and what puts its cache on huge pages."""
    from vllm_sparse.kernels.cpu.decode import decode_attention
    from vllm_sparse.kernels.cpu.memory import back_with_huge_pages

    return decode_attention, back_with_huge_pages
