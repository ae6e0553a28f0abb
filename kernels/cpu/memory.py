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


def back_with_huge_pages(tensor: Tensor) -> bool:
    """Put an unused, all-zero CPU tensor on huge pages; it is zero afterwards.

    Sparse decode reads scattered kilobytes: with 4 KiB pages nearly every one of them misses the
    TLB first. PyTorch has touched the memory already, so it is given back to the kernel, which
    hands out huge pages when it is touched again.

    Args:
        tensor: Anonymous private memory, which :class:`torch.Tensor` allocates by default.

    Returns:
        Whether the kernel agreed. The parts of a huge page at both ends keep small pages.
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
    return all(
        advise(first, size, advice) == 0 for advice in (mmap.MADV_HUGEPAGE, mmap.MADV_DONTNEED)
    )
