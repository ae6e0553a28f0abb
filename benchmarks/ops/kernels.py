# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Where the kernels are: the only module of the benchmarks that says so.

Kernels are looked up when they are called, so that a test may put another one in their place.
"""

from __future__ import annotations

import importlib
import inspect
from typing import TYPE_CHECKING, Any

from vllm_sparse.kernels.layout import PageLayout as PageLayout
from vllm_sparse.kernels.reference.paging import PageTable as PageTable
from vllm_sparse.kernels.reference.rows import Rows as Rows
from vllm_sparse.kernels.reference.selection import Blocks as Blocks
from vllm_sparse.kernels.reference.selection import Ranking as Ranking
from vllm_sparse.kernels.reference.sparda_steps import Selected as Selected
from vllm_sparse.kernels.reference.sparda_steps import Unframed as Unframed

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

# By kernel: modules of vllm_sparse.kernels.reference and vllm_sparse.kernels.triton.
MODULES = {
    "append_tokens": ("rocketkv", "append"), "score_pages": ("stage2", "pages"),
    "select_slots": ("stage2", "pages"), "attend_slots": ("stage2", "attention"),
    "decode_attention": ("rocketkv", "rocketkv"), "plan_rows": ("rows", "rows"),
    "score_prompt": ("prompt", "prompt"), "top_indices": ("prompt", "topk"),
    "compact_tokens": ("prompt", "compaction"), "compact_prompts": ("prompt", "rocketkv"),
    "select_blocks": ("sparda_steps", "sparda_select"),
    "resolve": ("sparda_steps", "sparda_paging"),
    "copy_pieces": ("sparda_steps", "sparda_paging"),
    "attend_frames": ("sparda_steps", "sparda_attention"),
    "attend_part": ("sparda_steps", "sparda_prefill"),
    "write_tokens": ("sparda_steps", "sparda_tokens"),
    "update_windows": ("sparda_steps", "sparda_tokens"),
    "record_queries": ("sparda_steps", "sparda_tokens"),
}  # fmt: skip


def reference(name: str) -> Callable[..., Any]:
    """The PyTorch reference of a kernel."""
    return getattr(_module("reference", MODULES[name][0]), name)


def triton(name: str) -> Callable[..., Any]:
    """The Triton kernel."""
    return getattr(_module("triton", MODULES[name][1]), name)


def launches() -> ModuleType:
    """The module that says how Triton kernels are launched."""
    return _module("triton", "launch")


def cpu(module: str) -> ModuleType:
    """A module of kernels for CPUs."""
    return _module("cpu", module)


def _module(*path: str) -> ModuleType:
    return importlib.import_module(".".join(("vllm_sparse.kernels", *path)))


def call(kernel: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """Calls a kernel with those of the arguments that it has."""
    names = inspect.signature(kernel).parameters
    return kernel(**{name: arguments[name] for name in names if name in arguments})
