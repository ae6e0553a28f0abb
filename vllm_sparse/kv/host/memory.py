# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Host memory: how much there still is, and some that is fit to be pinned."""

from __future__ import annotations

import contextlib
import math
import mmap
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_CGROUP = Path("/sys/fs/cgroup")
_HUGE_PAGE = 2 << 20


def page_aligned(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised host tensor that shares its pages with nothing else, huge ones if possible.

    What is pinned are whole pages, and the fewer there are, the fewer addresses a device has to
    translate.

    Args:
        shape: Of the tensor.
        dtype: Of its elements.
    """
    import torch  # here, because how much memory there is can be asked without it

    count = math.prod(shape)
    size = -(-count * dtype.itemsize // _HUGE_PAGE) * _HUGE_PAGE
    memory = mmap.mmap(-1, size + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # A fork shares pages until somebody writes; the parent would then write to new ones, while a
    # device keeps to the old ones, which are pinned.
    memory.madvise(mmap.MADV_DONTFORK)
    with contextlib.suppress(OSError):  # where the kernel was built without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)  # holds on to the memory
    begin = -whole.data_ptr() % _HUGE_PAGE
    return whole[begin : begin + count * dtype.itemsize].view(dtype).view(shape)


def available_bytes(cgroup: Path = _CGROUP) -> int:
    """The smaller of what the machine has available and what the container's limit leaves.

    Args:
        cgroup: Folder of the process's control group (version 2).
    """
    available = int(psutil.virtual_memory().available)
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        used = int((cgroup / "memory.current").read_text())
        cached = dict(
            line.split() for line in (cgroup / "memory.stat").read_text().splitlines()
        ).get("inactive_file", "0")
    except (OSError, ValueError):
        return available
    if limit == "max":
        return available
    return min(available, int(limit) - used + int(cached))
