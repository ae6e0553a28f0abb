# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Which implementation of a kernel runs where."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from vllm_sparse.kernels.reference import paging as paging_reference
from vllm_sparse.kernels.reference import rocketkv as reference
from vllm_sparse.kernels.reference import selection as selection_reference
from vllm_sparse.kernels.reference import sparda_steps

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from vllm_sparse.kernels.reference.sparda_steps import Resolution, Selected


class DecodeKernel(NamedTuple):
    """A decode kernel and, if it is not the fastest one, why."""

    run: Callable[..., None]
    name: str
    note: str = ""


@cache
def rocketkv_decode(device: str, dtype: torch.dtype) -> DecodeKernel:
    """RocketKV's decode kernel where it does not run on a GPU.

    Args:
        device: ``torch.device.type``.
        dtype: Cache dtype.

    Returns:
        The kernel; on a CPU the fused C++ one, elsewhere (and on a CPU without a compiler) the
        PyTorch reference.
    """
    fused, note = _fused(device)
    if not fused:
        return DecodeKernel(reference.decode_attention, "reference", note)
    from vllm_sparse.kernels.cpu import decode

    return DecodeKernel(decode.decode_attention, "cpu")


def _fused(device: str) -> tuple[bool, str]:
    """Whether the C++ kernels can be had, and if not on a CPU, why."""
    if device != "cpu":
        return False, ""
    from vllm_sparse.kernels.cpu import build

    try:
        build.load()
    except build.KernelBuildError as error:
        return False, str(error)
    return True, ""


class PagingKernels(NamedTuple):
    """What SparDA runs: selection, page table, copies, attention over frames and for prompts."""

    select_blocks: Callable[..., torch.Tensor]
    resolve: Callable[..., paging_reference.Resolved]
    copy_pieces: Callable[..., None]
    attend_frames: Callable[..., None]
    attend_part: Callable[..., tuple[torch.Tensor, torch.Tensor]]
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
    paging, selection, name = paging_reference, selection_reference, "reference"
    attend_part = sparda_steps.attend_part
    if device == "cpu":
        from vllm_sparse.kernels.cpu import prefill

        attend_part = prefill.attend_part
    fused, note = _fused(device)
    if fused:
        from vllm_sparse.kernels.cpu import paging as fused_paging
        from vllm_sparse.kernels.cpu import selection as fused_selection

        paging, selection, name = fused_paging, fused_selection, "cpu"
    return PagingKernels(
        selection.select_blocks,
        paging.resolve,
        paging.copy_pieces,
        paging.attend_frames,
        attend_part,
        name,
        note,
    )


class RocketKVGpuKernels(NamedTuple):
    """What RocketKV runs on a GPU."""

    decode: DecodeKernel
    decode_scratch_bytes: Callable[..., int]
    plan_rows: Callable[..., None]
    compact_prompts: Callable[..., None]


@cache
def rocketkv_gpu(device: torch.device) -> RocketKVGpuKernels:
    """The Triton kernels.

    Args:
        device: A GPU; or a CPU where Triton's interpreter was chosen before Triton was imported.

    Raises:
        ValueError: The device cannot run them.
    """
    _check_triton(device)
    from vllm_sparse.kernels.triton import launch, rocketkv, rows

    name = f"triton, launches {launch.launches(device).origin}"
    return RocketKVGpuKernels(
        DecodeKernel(rocketkv.decode_attention, name),
        rocketkv.decode_scratch_bytes,
        rows.plan_rows,
        rocketkv.compact_prompts,
    )


class SpardaGpuKernels(NamedTuple):
    """What SparDA runs on a GPU; contracts in ``kernels.reference.sparda_steps`` and ``paging``.

    Attributes:
        name: For the start-up line.
    """

    select_blocks: Callable[..., Selected]
    resolve: Callable[..., Resolution]
    copy_pieces: Callable[..., None]
    write_tokens: Callable[..., None]
    update_windows: Callable[..., None]
    record_queries: Callable[..., None]
    attend_frames: Callable[..., None]
    attend_part: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    name: str


@cache
def sparda_gpu(device: torch.device) -> SpardaGpuKernels:
    """The Triton kernels.

    Args:
        device: See :func:`rocketkv_gpu`.

    Raises:
        ValueError: The device cannot run them.
    """
    _check_triton(device)
    from vllm_sparse.kernels.triton import (
        launch,
        sparda_attention,
        sparda_paging,
        sparda_prefill,
        sparda_select,
        sparda_tokens,
    )

    return SpardaGpuKernels(
        sparda_select.select_blocks,
        sparda_paging.resolve,
        sparda_paging.copy_pieces,
        sparda_tokens.write_tokens,
        sparda_tokens.update_windows,
        sparda_tokens.record_queries,
        sparda_attention.attend_frames,
        sparda_prefill.attend_part,
        f"triton, launches {launch.launches(device).origin}",
    )


def _check_triton(device: torch.device) -> None:
    import triton

    if device.type != "cuda" and not triton.knobs.runtime.interpret:
        raise ValueError(
            f"Triton kernels need a CUDA device, not {device.type!r}; on a CPU they run in Triton's"
            " interpreter, with TRITON_INTERPRET=1 in the environment"
        )
