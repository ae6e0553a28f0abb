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
# Of both versions: the limit, what is used, statistics, and in those what is only cached. Files
# that were read twice are "active", and given back as the others are once memory is short.
_FILES = (
    ("memory.max", "memory.current", "memory.stat", ("inactive_file", "active_file")),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat",
     ("total_inactive_file", "total_active_file")),
)  # fmt: skip
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
    begin = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % _HUGE_PAGE
    # The storage begins there, too: that is where PyTorch looks whether a tensor is pinned, and of
    # one that is not, vLLM gives a device a pinned copy.
    pages = torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=begin)
    return pages[: count * dtype.itemsize].view(dtype).view(shape)


def container_limit(cgroup: Path = _CGROUP) -> int | None:
    """Bytes that this container may use; ``None``: no limit, or none that can be seen.

    Args:
        cgroup: Folder of the process's control groups.
    """
    for file, *_ in _FILES:
        try:
            text = (cgroup / file).read_text().strip()
        except OSError:
            continue
        return int(text) if text.isdigit() else None
    return None


def available_bytes(cgroup: Path = _CGROUP) -> int:
    """The smaller of what the machine has available and what the container's limit leaves.

    Args:
        cgroup: Folder of the process's control groups.
    """
    available, limit = int(psutil.virtual_memory().available), container_limit(cgroup)
    if limit is None:
        return available
    for _, use, statistics, cache in _FILES:
        try:
            used = int((cgroup / use).read_text())
            lines = (cgroup / statistics).read_text().splitlines()
        except (OSError, ValueError):
            continue
        found = dict(line.split() for line in lines)
        return min(available, limit - used + sum(int(found.get(name, "0")) for name in cache))
    return available
