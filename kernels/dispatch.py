# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Which implementation of a kernel runs where."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from vllm_sparse.kernels.reference import paging as paging_reference
from vllm_sparse.kernels.reference import rocketkv as reference
from vllm_sparse.kernels.reference import selection as selection_reference

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


class PagingKernels(NamedTuple):
    """What SparDA's decode runs: block selection, page table, copies, attention over frames."""

    select_blocks: Callable[..., torch.Tensor]
    resolve: Callable[..., paging_reference.Resolved]
    copy_pieces: Callable[..., None]
    attend_frames: Callable[..., None]
    name: str
    note: str = ""


@cache
def sparda_paging(device: str) -> PagingKernels:
    """The paging kernels for a device type.

    Args:
        device: ``torch.device.type``.

    Returns:
        The kernels; on a CPU the C++ ones, elsewhere (and on a CPU without a compiler) the PyTorch
        reference.
    """
    paging, selection, name, note = paging_reference, selection_reference, "reference", ""
    if device == "cpu":
        from vllm_sparse.kernels.cpu import build
        from vllm_sparse.kernels.cpu import paging as fused_paging
        from vllm_sparse.kernels.cpu import selection as fused_selection

        try:
            build.load()
            paging, selection, name = fused_paging, fused_selection, "cpu"
        except build.KernelBuildError as error:
            note = str(error)
    return PagingKernels(
        selection.select_blocks,
        paging.resolve,
        paging.copy_pieces,
        paging.attend_frames,
        name,
        note,
    )


def attend_part(device: str) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Attention over a part of the keys for a device type, as in ``kernels.reference.prefill``."""
    if device == "cpu":
        from vllm_sparse.kernels.cpu import prefill as flash

        return flash.attend_part
    from vllm_sparse.kernels.reference import prefill

    return prefill.attend_part


@cache
def rocketkv_triton_decode(device: str, *, interpret: bool = False) -> DecodeKernel:
    """The Triton decode kernels, for GPUs.

    Args:
        device: ``torch.device.type``.
        interpret: Allow a CPU, where Triton's interpreter must have been chosen before Triton was
            imported (``TRITON_INTERPRET=1``).

    Raises:
        ValueError: The device cannot run them.
    """
    if device != "cuda" and not interpret:
        raise ValueError(f"Triton kernels need a CUDA device, not {device!r}")
    from vllm_sparse.kernels.triton import rocketkv as gpu

    return DecodeKernel(gpu.decode_attention, "triton")
