# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Whether the plugin is right on this GPU: installation, kernels, whole engines, memory accesses.

``make gpu-check``, or ``python -m benchmarks.gpu.check``. Prints one table last and writes
``gpu-check.json`` and ``gpu-check.log`` to the folder given by ``--out``.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import re
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.gpu import machine, runner, stages, tokens
from benchmarks.tables import table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.gpu.stages import Report

MODULE, NAME = "benchmarks.gpu.check", "gpu-check"
PARITY = "kernel-parity"
MOST_JOBS, CORES_EACH = 4, 4
GROUPS = ("vllm.general_plugins", "vllm.platform_plugins")
SANITIZERS = ("compute-sanitizer", "/usr/local/cuda/bin/compute-sanitizer")
WHEEL = "nvidia/*/**/compute-sanitizer"  # of nvidia-cuda-sanitizer-api
# What compute-sanitizer prints where it cannot watch, as in many virtual machines.
REFUSALS = ("Device not supported", "Unable to find injection library", "not permitted to access")


def smoke(report: Report, options: argparse.Namespace) -> None:
    """Is there a GPU, a vLLM, and is the plugin installed as it is in this checkout?

    Raises:
        CheckFailedError: No; says what to run.
    """
    import torch

    if options.device == "cuda":
        if not torch.cuda.is_available():
            raise stages.CheckFailedError("torch finds no CUDA device")
        properties = torch.cuda.get_device_properties(0)
        report.note(
            device=properties.name,
            memory_gib=round(properties.total_memory / 2**30, 1),
            multiprocessors=properties.multi_processor_count,
            capability=f"{properties.major}.{properties.minor}",
            cuda=torch.version.cuda,
        )
        doubled = torch.randn(1 << 20, device="cuda").mul(2).sum()
        if not bool(torch.isfinite(doubled)):
            raise stages.CheckFailedError("the GPU does not compute")
    install = machine.install_command(options.site)
    vllm = importlib.util.find_spec("vllm")
    if vllm is None or vllm.origin is None:
        raise stages.CheckFailedError(
            f"no vLLM on PYTHONPATH; it is expected at {options.site}, for example "
            f"PYTHONPATH=$PWD:{options.site}"
        )
    plugin = importlib.util.find_spec("vllm_sparse")
    if plugin is None or plugin.origin is None:
        raise stages.CheckFailedError(f"the plugin is not installed; run: {install}")
    package = Path(plugin.origin).parent
    for group in GROUPS:
        if not importlib.metadata.entry_points(group=group, name="vllm_sparse"):
            raise stages.CheckFailedError(
                f"vLLM will not find the plugin: no entry point in {group}; run: {install}"
            )
    stale = machine.stale_files(package)
    if stale:
        raise stages.CheckFailedError(
            f"{package} is not this checkout ({len(stale)} files differ, {stale[0]} first); "
            f"run: {install}"
        )
    from vllm_sparse.kv.host.memory import available_bytes

    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    report.note(
        vllm=importlib.metadata.version("vllm"),
        host_memory_gib=round(total / 2**30, 1),
        host_available_gib=round(available_bytes() / 2**30, 1),
    )
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    import vllm_sparse
    from benchmarks.ops.kernels import triton
    from vllm_sparse.plugin import register
    from vllm_sparse.registry import entries

    triton("decode_attention")
    register()
    found = [name for name in entries() if name in AttentionBackendEnum.__members__]
    report.note(
        backends=found, platform=type(current_platform).__name__, version=vllm_sparse.__version__
    )
    if sorted(found) != sorted(entries()):
        raise stages.CheckFailedError(f"only {found} are registered with vLLM")


def kernels(report: Report, options: argparse.Namespace) -> None:
    """Kernel parity."""
    from benchmarks.ops import parity

    parity.check(report, options)


def sanitized(report: Report, options: argparse.Namespace) -> None:
    """Every kernel once with a small shape, for a memory checker to watch."""
    from benchmarks.ops import parity

    parity.check(report, options, parity.cases_of("SANITIZED"), graphs=False)


def raced(report: Report, options: argparse.Namespace) -> None:
    """Every kernel once with a small shape, while Triton's GSan looks for races between programs.

    Raises:
        NotAvailableError: This Triton has none.
    """
    try:
        gsan = importlib.import_module("triton.experimental.gsan")
    except ImportError as error:
        raise stages.NotAvailableError(f"this Triton has no GSan ({error})") from error
    if options.device != "cuda":
        raise stages.NotAvailableError("GSan needs a GPU")
    import torch

    from benchmarks.ops import parity

    with torch.cuda.use_mem_pool(gsan.create_mem_pool()):
        parity.check(report, options, parity.cases_of("SANITIZED"), graphs=False)


def sanitizer() -> str | None:
    """Where compute-sanitizer is, if it is."""
    in_wheels = (
        str(file)
        for entry in sys.path
        for file in Path(entry or ".").glob(WHEEL)
        if os.access(file, os.X_OK) and file.is_file()
    )
    return next(filter(None, map(shutil.which, SANITIZERS)), None) or next(in_wheels, None)


def no_sanitizer(report: Report, options: argparse.Namespace) -> None:
    """Says that there is none."""
    raise stages.NotAvailableError(
        "compute-sanitizer is neither on PATH nor in a wheel (nvidia-cuda-sanitizer-api)"
    )


def plan(options: argparse.Namespace) -> list[stages.Stage]:
    """All stages, the most valuable first."""
    interpreted = {"TRITON_INTERPRET": "1"} if options.device == "cpu" else {}
    checker = sanitizer()
    prefix: tuple[str, ...] = ()
    if checker:
        prefix = (checker, "--tool=memcheck", "--report-api-errors=no", "--error-exitcode=9")
    # Freed blocks of PyTorch's allocator would look valid.
    watched = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", **interpreted}
    return [
        stages.Stage("smoke", smoke, 60, about="GPU, vLLM, installed plugin"),
        stages.Stage(PARITY, kernels, 190, env=interpreted, about="Triton kernels = references"),
        stages.Stage(
            "sanitizer", sanitized if checker else no_sanitizer, 150, needs=("smoke",),
            prefix=prefix, env=watched, unavailable=REFUSALS, about="small steps under memcheck",
        ),
        stages.Stage(
            "gsan", raced, 150, needs=("smoke",),
            env={"TRITON_INSTRUMENTATION_MODE": "gsan", **interpreted},
            about="small steps under Triton's sanitizer of races",
        ),
        *tokens.stages(options),
    ]  # fmt: skip


def summary(results: dict[str, dict], log: Path | None = None) -> tuple[str, dict]:
    """Returns the tables to print last, and a verdict for the result file."""
    parts, errors = [], None
    rows = results.get(PARITY, {}).get("rows", [])
    worst: dict[str, dict] = {}
    for row in rows:
        if row["error"] >= worst.get(row["kernel"], row)["error"]:
            worst[row["kernel"]] = row
    if worst:
        columns = {
            **{"kernel": "kernel", "largest error": "error", "limit": "limit"},
            "ok": lambda row: "yes" if row["ok"] else "NO",
            "in": "case",
        }
        parts.append(table(worst.values(), columns, aligned=True))
    engines = [
        {**result["facts"], "name": name, "gaps": [row["gap"] for row in result["rows"]]}
        for name, result in results.items()
        if "same" in result["facts"]
    ]
    if engines:
        columns = {
            "engine": "name",
            "same": "{same}/{requests}",
            "parted": lambda row: len(row["gaps"]),
            "largest gap": lambda row: max(row["gaps"], default=None),
            "graphs": lambda row: row["graphs"].removeprefix("CUDAGraphMode."),
        }
        parts.append(table(engines, columns, aligned=True))
    if log is not None and log.exists():
        found = re.findall(r"ERROR SUMMARY: (\d+) error", log.read_text(errors="replace"))
        errors = int(found[-1]) if found else None
        if errors is not None:
            parts.append(f"compute-sanitizer: {errors} errors")
    passed = all(result["status"] in stages.PASSED for result in results.values())
    return "\n\n".join(parts), {"passed": passed, "sanitizer_errors": errors}


def parser_of() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__)
    stages.add_options(parser, NAME)
    add_options(parser)
    parser.set_defaults(jobs=jobs_at_once())  # nothing is timed
    return parser


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of engines whose tokens are compared."""
    parser.add_argument("--dtype", choices=tokens.NEAR_TIE, default="bfloat16", help="of engines")


def jobs_at_once() -> int:
    """Stages that may run at once: an engine's start keeps a few cores busy."""
    return max(1, min(MOST_JOBS, len(os.sched_getaffinity(0)) // CORES_EACH))


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line entry point; returns the exit status: 1 is wrong, 2 not all was checked."""
    parser = parser_of()
    finish = partial(summary, log=parser.parse_args(arguments).out / f"{NAME}.log")
    return runner.main(MODULE, NAME, parser, plan, finish, arguments, complete=True)


if __name__ == "__main__":
    sys.exit(main())
