# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Cores, and how many of them will compute."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_sparse.machine.findings import fine, warning

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vllm_sparse.machine.findings import Finding

SUBJECT = "cores"
_FEW = 4  # of fewer, the one that vLLM leaves free is a large part


def quota(folder: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Cores that the container may use at a time; ``None``: no limit, or none that can be seen."""
    try:
        share, period = (folder / "cpu.max").read_text().split()
    except (OSError, ValueError):
        return None
    return None if share == "max" else int(share) / int(period)


def core_findings(on_gpu: bool | None, share: float | None) -> Iterator[Finding]:
    """Cores and threads.

    Args:
        on_gpu: Attention is not computed by them; ``None``: nobody knows.
        share: See :func:`quota`.
    """
    allowed = sorted(os.sched_getaffinity(0))
    usable = len(allowed)
    shown = f"{usable} usable of {os.cpu_count()}"
    if share is not None and share < usable:
        yield warning(
            SUBJECT, f"{shown}, but the container's quota is {share:.1f} of them",
            "a thread for each core then waits for others that are held back",
            "docker run --cpuset-cpus instead of --cpus, or VLLM_CPU_OMP_THREADS_BIND with so many",
        )  # fmt: skip
    else:
        yield fine(SUBJECT, shown)
    if on_gpu is not False:
        return
    bound = os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "auto")
    kept = os.environ.get("VLLM_CPU_NUM_OF_RESERVED_CPU", "1")
    if bound == "auto" and kept != "0" and usable <= _FEW:
        yield warning(
            "threads", f"vLLM's CPU build keeps {kept} of {usable} cores free for its scheduler",
            "on few cores that is a large part of decoding's speed",
            f"VLLM_CPU_OMP_THREADS_BIND={','.join(map(str, allowed))} computes on all of them",
        )  # fmt: skip
    else:
        yield fine("threads", f"VLLM_CPU_OMP_THREADS_BIND={bound}")
