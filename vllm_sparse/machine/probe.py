# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What can be learnt only by importing torch and vLLM, said stage by stage.

In a process of its own, because an import may hang, crash or take long. Each stage is a line of
JSON on the standard output; what is printed by others goes to the standard error.
"""

from __future__ import annotations

import importlib
import json
import os
import time
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from vllm_sparse.machine.versions import MEDIA

if TYPE_CHECKING:
    from collections.abc import Callable


def torch_facts() -> dict[str, Any]:
    """Whether torch imports, and the devices that it sees."""
    import torch

    devices = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        found = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "name": found.name,
                "capability": [found.major, found.minor],
                "memory": found.total_memory,
            }
        )
    return {"cuda": torch.version.cuda, "devices": devices}


def kernel_facts() -> dict[str, Any]:
    """Which kernels run: the launches of each GPU, or the compiled library of a CPU."""
    import torch

    if torch.cuda.is_available():
        from vllm_sparse.kernels.triton import launch

        devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
        return {"launches": [launch.launches(device).origin for device in devices]}
    from vllm_sparse.kernels.cpu import build

    compiler = build.find_compiler()
    library = build.compiled_path(compiler) if compiler else None
    compiled = library is not None and library.exists()
    if compiled:
        build.load()
    return {"compiler": compiler, "library": str(library or ""), "compiled": compiled}


def built_facts() -> dict[str, Any]:
    """Compiles the kernels of a CPU, if they are not yet."""
    import torch

    if not torch.cuda.is_available():
        from vllm_sparse.kernels.cpu import build

        build.load()
    return kernel_facts()


def media_facts() -> dict[str, Any]:
    """Packages that vLLM imports if they are there, and why they cannot be."""
    broken = {}
    for name in MEDIA:
        if find_spec(name) is None:
            continue
        try:
            importlib.import_module(name)
        except Exception as problem:  # whatever a library's own start-up may raise
            broken[name] = said(problem)
    return {"broken": broken}


def vllm_facts() -> dict[str, Any]:
    """Whether vLLM imports."""
    vllm = importlib.import_module("vllm")
    return {"version": vllm.__version__, "folder": os.path.dirname(vllm.__file__ or "")}


def plugin_facts() -> dict[str, Any]:
    """Loads the plugin as vLLM does in each of its processes."""
    from vllm_sparse.registry import entries

    importlib.import_module("vllm.plugins").load_general_plugins()
    platforms = importlib.import_module("vllm.platforms")
    kinds = importlib.import_module("vllm.v1.attention.backends.registry").AttentionBackendEnum
    platform = type(platforms.current_platform)
    return {
        "missing": [name for name in entries() if name not in kinds.__members__],
        "platform": f"{platform.__module__}.{platform.__qualname__}",
        "listens": hasattr(platform, "_vllm_sparse_stock"),
    }


QUICK: dict[str, Callable[[], dict[str, Any]]] = {
    "torch": torch_facts, "kernels": kernel_facts, "media": media_facts, "vllm": vllm_facts,
}  # fmt: skip
THOROUGH = {
    "torch": torch_facts, "kernels": built_facts, "media": media_facts, "vllm": vllm_facts,
    "plugin": plugin_facts,
}  # fmt: skip


def said(problem: BaseException) -> str:
    """An error in one line; the last says most."""
    lines = str(problem).strip().splitlines() or [""]
    return f"{type(problem).__name__}: {lines[-1] if len(lines) > 1 else lines[0]}"


def run(stages: dict[str, Callable[[], dict[str, Any]]], say: Callable[[str], Any]) -> None:
    """Runs the stages; one that fails costs no other one."""
    for name, stage in stages.items():
        begin = time.monotonic()
        try:
            facts = stage()
        except Exception as problem:  # imports of others: anything may come
            facts = {"error": said(problem)}
        seconds = time.monotonic() - begin
        say(json.dumps({"stage": name, "seconds": round(seconds, 2), **facts}) + "\n")


def main(stages: dict[str, Callable[[], dict[str, Any]]]) -> None:
    """The program: what others print is kept apart from what the stages say."""
    results = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    run(stages, results.write)
