# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Huge pages for tensors that are read at random."""

from __future__ import annotations

import ctypes
import mmap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_HUGE = 2 << 20
_MADV_COLLAPSE = 25  # Linux 6.1; not in the mmap module yet


def back_with_huge_pages(tensor: Tensor, at_once: bool = True) -> bool:
    """Move a CPU tensor's memory to huge pages; its content stays.

    Sparse decode reads scattered kilobytes: with 4 KiB pages nearly every one of them misses the
    TLB first.

    Args:
        tensor: A large contiguous tensor.
        at_once: Before this returns, some seconds a GiB; else the kernel does it in the background.

    Returns:
        Whether the kernel agreed. Without support for collapsing at once (before Linux 6.1) the
        kernel does it in the background, if at all.
    """
    supported = hasattr(mmap, "MADV_HUGEPAGE") and tensor.device.type == "cpu"
    if not supported or not tensor.is_contiguous():
        return False
    begin = tensor.data_ptr()
    first = -(-begin // _HUGE) * _HUGE
    size = (begin + tensor.nbytes) // _HUGE * _HUGE - first
    if size <= 0:
        return False
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    advised = advise(first, size, mmap.MADV_HUGEPAGE) == 0
    return advised and (not at_once or advise(first, size, _MADV_COLLAPSE) == 0)
