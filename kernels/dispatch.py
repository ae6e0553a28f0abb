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
    from vllm_sparse.kernels.types import Resolution, Selected


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
    from vllm_sparse.kernels.cpu import rocketkv

    return DecodeKernel(rocketkv.decode_attention, "cpu")


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


class SpardaKernels(NamedTuple):
    """What SparDA runs; the contracts are those of ``kernels.reference.sparda_*``.

    Attributes:
        name: Which kernels these are, for the start-up line.
        note: Why they are slow, if they are.
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
    note: str = ""


@cache
def sparda_kernels(device: torch.device, kernels: str = "auto") -> SpardaKernels:
    """SparDA's kernels for a device.

    Args:
        device: Where they run.
        kernels: The setting of that name: ``triton`` runs Triton's kernels on a CPU as well. For
            comparisons also ``reference``.

    Returns:
        Triton's on a GPU, or in Triton's interpreter if that was chosen before Triton was imported;
        the C++ ones on a CPU; without a compiler the PyTorch reference.

    Raises:
        ValueError: Triton's kernels are asked for on a CPU without the interpreter.
    """
    if kernels == "reference":
        from vllm_sparse.kernels.reference import (
            sparda_attention,
            sparda_paging,
            sparda_prefill,
            sparda_select,
            sparda_tokens,
        )

        name = kernels
    elif device.type != "cpu" or kernels == "triton":
        _check_triton(device)
        from vllm_sparse.kernels.triton import (
            launch,
            sparda_attention,
            sparda_paging,
            sparda_prefill,
            sparda_select,
            sparda_tokens,
        )

        name = f"triton, launches {launch.launches(device).origin}"
    else:
        from vllm_sparse.kernels.cpu import sparda_prefill

        fused, note = _fused(device.type)
        if not fused:
            slow = sparda_kernels(device, "reference")
            return slow._replace(attend_part=sparda_prefill.attend_part, note=note)
        from vllm_sparse.kernels.cpu import (
            sparda_attention,
            sparda_paging,
            sparda_select,
            sparda_tokens,
        )

        name = "cpu"
    return SpardaKernels(
        sparda_select.select_blocks, sparda_paging.resolve, sparda_paging.copy_pieces,
        sparda_tokens.write_tokens, sparda_tokens.update_windows, sparda_tokens.record_queries,
        sparda_attention.attend_frames, sparda_prefill.attend_part, name,
    )  # fmt: skip


def _check_triton(device: torch.device) -> None:
    import triton

    if device.type != "cuda" and not triton.knobs.runtime.interpret:
        raise ValueError(
            f"Triton kernels need a CUDA device, not {device.type!r}; on a CPU they run in Triton's"
            " interpreter, with TRITON_INTERPRET=1 in the environment"
        )
