# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Where the kernels are: the only module of the benchmarks that says so.

Kernels are looked up when they are called, so that a test may put another one in their place.
"""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any

from vllm_sparse.kernels.layout import PageLayout
from vllm_sparse.kernels.reference import prompt as _prompt
from vllm_sparse.kernels.reference import rocketkv as _rocketkv
from vllm_sparse.kernels.reference import rows as _rows
from vllm_sparse.kernels.reference import sparda_steps as _steps
from vllm_sparse.kernels.reference import stage2 as _stage2
from vllm_sparse.kernels.reference.paging import PageTable
from vllm_sparse.kernels.reference.rows import Rows
from vllm_sparse.kernels.reference.selection import Blocks, Ranking
from vllm_sparse.kernels.reference.sparda_steps import Selected, Unframed

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

_REFERENCE: dict[str, ModuleType] = {
    **dict.fromkeys(("append_tokens", "decode_attention"), _rocketkv),
    **dict.fromkeys(("score_pages", "select_slots", "attend_slots"), _stage2),
    **dict.fromkeys(("score_prompt", "top_indices", "compact_tokens"), _prompt),
    "plan_rows": _rows,
    **dict.fromkeys(("select_blocks", "resolve", "copy_pieces", "attend_frames"), _steps),
    **dict.fromkeys(("attend_part", "write_tokens", "update_windows", "record_queries"), _steps),
}


@functools.cache
def _triton() -> dict[str, ModuleType]:
    from vllm_sparse.kernels.triton import (
        append,
        attention,
        compaction,
        pages,
        prompt,
        rocketkv,
        rows,
        sparda_attention,
        sparda_paging,
        sparda_prefill,
        sparda_select,
        sparda_tokens,
        topk,
    )

    return {
        "append_tokens": append,
        **dict.fromkeys(("score_pages", "select_slots"), pages),
        "attend_slots": attention,
        **dict.fromkeys(("decode_attention", "compact_prompts"), rocketkv),
        "score_prompt": prompt,
        "top_indices": topk,
        "compact_tokens": compaction,
        "plan_rows": rows,
        "select_blocks": sparda_select,
        **dict.fromkeys(("resolve", "copy_pieces"), sparda_paging),
        "attend_frames": sparda_attention,
        "attend_part": sparda_prefill,
        **dict.fromkeys(("write_tokens", "update_windows", "record_queries"), sparda_tokens),
    }


def reference(name: str) -> Callable[..., Any]:
    """The PyTorch reference of a kernel."""
    return getattr(_REFERENCE[name], name)


def triton(name: str) -> Callable[..., Any]:
    """The Triton kernel."""
    return getattr(_triton()[name], name)


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
    from vllm_sparse.kernels.cpu.memory import back_with_huge_pages
    from vllm_sparse.kernels.cpu.rocketkv import decode_attention

    return decode_attention, back_with_huge_pages
