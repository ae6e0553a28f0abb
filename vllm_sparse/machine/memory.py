# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Host memory, what limits and speeds it, and the folder that kernels are kept in."""

from __future__ import annotations

import os
import platform
import re
import resource
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from vllm_sparse.machine.findings import error, fine, warning
from vllm_sparse.paths import CACHE_ENV, cache_dir

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vllm_sparse.machine.findings import Finding

GIB = 1 << 30
HOST_GIB = 4.0
"""SPARDA's default `host_gib`."""

LEAST_SHARED = GIB
LEAST_CACHE = 64 << 20
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
SHARED = Path("/dev/shm")
_COLLAPSE = (6, 1)  # Linux, from which huge pages are made at once


def memory_findings(available: int, limit: int | None, on_gpu: bool | None) -> Iterator[Finding]:
    """What host memory there is, and whether it can be pinned.

    Args:
        available: Bytes that are free, the container's limit included.
        limit: The container's limit in bytes, if there is one.
        on_gpu: SPARDA's host memory will be pinned; ``None``: nobody knows.
    """
    total = psutil.virtual_memory().total
    shown = f"{available / GIB:.1f} GiB free of {total / GIB:.1f}"
    if limit is not None and limit < total:
        shown += f", of which the container may use {limit / GIB:.1f}"
    if available < HOST_GIB * GIB:
        yield warning(
            "host memory", shown,
            "SPARDA keeps there a pool beyond what the device holds, and the queries of previous"
            if on_gpu
            else f"SPARDA's pool takes {HOST_GIB:.0f} GiB or more unless host_gib is set",
            "set vllm_sparse.host_gib, or end what uses the memory",
        )  # fmt: skip
    else:
        yield fine("host memory", shown)
    yield _pinning(available, on_gpu)
    yield _huge_pages()
    yield _shared()


def _pinning(available: int, on_gpu: bool | None) -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    unlimited = soft == resource.RLIM_INFINITY
    shown = "unlimited" if unlimited else f"{soft / (1 << 20):.0f} MiB"
    if on_gpu is False:
        return fine("locked memory", f"limit {shown}", "nothing is pinned without a GPU")
    if on_gpu is None or unlimited or soft >= available:
        return fine("locked memory", f"limit {shown}")
    return warning(
        "locked memory", f"limit {shown}",
        "SPARDA pins its host pool; whether the limit counts depends on driver and container",
        "if pinning fails at start-up: ulimit -l unlimited, or docker run --ulimit memlock=-1",
    )  # fmt: skip


def _huge_pages() -> Finding:
    try:
        modes = HUGE_PAGES.read_text()
    except OSError:
        modes = ""
    chosen = re.search(r"\[(\w+)\]", modes)
    if chosen is None or chosen[1] == "never":
        return warning(
            "huge pages", f"transparent huge pages: {chosen[1] if chosen else 'not offered'}",
            "with pages of 4 KiB nearly every scattered read of sparse decode misses the TLB",
            f"echo madvise > {HUGE_PAGES}",
        )  # fmt: skip
    release = tuple(int(number) for number in re.findall(r"\d+", platform.release())[:2])
    if release < _COLLAPSE:
        return fine(
            "huge pages", f"transparent huge pages: {chosen[1]}",
            f"Linux {platform.release()} makes them in the background; 6.1 and newer at once",
        )  # fmt: skip
    return fine("huge pages", f"transparent huge pages: {chosen[1]}")


def _shared() -> Finding:
    try:
        free = shutil.disk_usage(SHARED).free
    except OSError:
        return warning(
            "shared memory", f"no {SHARED}", "processes of tensor parallelism talk through it",
            "mount a tmpfs there",
        )  # fmt: skip
    if free < LEAST_SHARED:
        return warning(
            "shared memory", f"{free / (1 << 20):.0f} MiB free in {SHARED}",
            "processes of tensor parallelism talk through it, and die with SIGBUS when it is full",
            "docker run --shm-size 8g (or --ipc host)",
        )  # fmt: skip
    return fine("shared memory", f"{free / GIB:.1f} GiB free in {SHARED}")


def cache_finding(folder: Path | None = None) -> Finding:
    """Whether kernels and models can be kept, and run from there."""
    folder = folder or cache_dir()
    subject, why = "cache folder", "compiled kernels, tuned launches and demo models are kept there"
    todo = f"make it writable, or set {CACHE_ENV} to a folder that is"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        flags = os.statvfs(folder).f_flag
    except OSError as problem:
        return error(subject, f"{folder} cannot be written: {problem}", why, todo)
    if flags & getattr(os, "ST_NOEXEC", 0):
        return error(
            subject, f"{folder} is mounted noexec", "the C++ kernels are loaded from it",
            f"set {CACHE_ENV} to a folder of another file system",
        )  # fmt: skip
    free = shutil.disk_usage(folder).free
    if free < LEAST_CACHE:
        return warning(
            subject,
            f"{folder}: {free / (1 << 20):.0f} MiB free",
            why,
            f"free space, or set {CACHE_ENV}",
        )
    return fine(subject, f"{folder}, {free / GIB:.1f} GiB free")
