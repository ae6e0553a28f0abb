# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Which implementation of a kernel runs where."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from vllm_sparse.kernels.reference import rocketkv as reference

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch


class DecodeKernel(NamedTuple):
    """A decode kernel and, if it is not the fastest one, why."""

    run: Callable[..., None]
    name: str
    note: str = ""


@cache
def rocketkv_decode(device: str, dtype: torch.dtype) -> DecodeKernel:
    """The decode kernel for a device type and cache dtype.

    Args:
        device: ``torch.device.type``.
        dtype: Cache dtype.

    Returns:
        The kernel; on a CPU the fused C++ one, elsewhere (and on a CPU without a compiler) the
        PyTorch reference.
    """
    if device != "cpu":
        return DecodeKernel(reference.decode_attention, "reference")
    from vllm_sparse.kernels.cpu import build
    from vllm_sparse.kernels.cpu import rocketkv as fused

    try:
        build.load()
    except build.KernelBuildError as error:
        return DecodeKernel(reference.decode_attention, "reference", str(error))
    return DecodeKernel(fused.decode_attention, "cpu")
