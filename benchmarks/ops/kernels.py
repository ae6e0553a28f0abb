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
from vllm_sparse.kernels.types import Blocks as Blocks
from vllm_sparse.kernels.types import PageTable as PageTable
from vllm_sparse.kernels.types import Probes as Probes
from vllm_sparse.kernels.types import Ranking as Ranking
from vllm_sparse.kernels.types import Rows as Rows
from vllm_sparse.kernels.types import Selected as Selected
from vllm_sparse.kernels.types import Unframed as Unframed

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

# The file of each kernel, the same in every folder of implementations.
FILES = {
    **dict.fromkeys(("append_tokens", "probe_pages"), "append"),
    "decode_attention": "decode",
    "select_slots": "pages",
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


def reference(name: str) -> Callable[..., Any]:
    """The PyTorch reference of a kernel."""
    return getattr(_module("reference", FILES[name]), name)


def triton(name: str) -> Callable[..., Any]:
    """The Triton kernel."""
    return getattr(_module("triton", FILES[name]), name)


def launches() -> ModuleType:
    """The module that says how Triton kernels are launched."""
    return _module("triton", "launch")


def grid() -> ModuleType:
    """The module that says how rows are shared out among programs."""
    return _module("triton", "grid")


def cpu(module: str) -> ModuleType:
    """A module of kernels for CPUs."""
    return _module("cpu", module)


def _module(*path: str) -> ModuleType:
    return importlib.import_module(".".join(("vllm_sparse.kernels", *path)))


def call(kernel: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """Calls a kernel with those of the arguments that it has."""
    names = inspect.signature(kernel).parameters
    return kernel(**{name: arguments[name] for name in names if name in arguments})
