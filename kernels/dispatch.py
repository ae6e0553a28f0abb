# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Which implementation of a kernel runs where."""

from __future__ import annotations

import importlib
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from vllm_sparse.kernels.reference import attention, decode, rows

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from vllm_sparse.kernels.types import Resolution, Selected


class PolicyKernels(NamedTuple):
    """What policies run that keep keys and values on the device.

    Attributes:
        decode: RocketKV's whole decode step; with ``read_all`` that of any policy which reads all
            it kept.
        plan_rows: Plans a batch of single tokens on the device.
        attend_slots: Attention over selected places of plain pages.
        compact_prompts: RocketKV's stage 1; ``None`` has it composed of the policy's functions.
        decode_scratch_bytes: What ``decode`` holds at a time; ``None`` where nobody plans for it.
        name: For the start-up line.
        note: Why it is not the fastest one, if it is not.
    """

    decode: Callable[..., None]
    plan_rows: Callable[..., None]
    attend_slots: Callable[..., None]
    compact_prompts: Callable[..., None] | None
    decode_scratch_bytes: Callable[..., int] | None
    name: str
    note: str = ""


@cache
def policy_cpu() -> PolicyKernels:
    """The fused C++ kernels, or the PyTorch reference on a machine without a compiler."""
    fused, note = _fused("cpu")
    if not fused:
        run, attend = decode.decode_attention, attention.attend_slots
        return PolicyKernels(run, rows.plan_rows, attend, None, None, "reference", note)
    from vllm_sparse.kernels.cpu import attention as fused_attention
    from vllm_sparse.kernels.cpu import decode as fused_decode

    run, attend = fused_decode.decode_attention, fused_attention.attend_slots
    return PolicyKernels(run, rows.plan_rows, attend, None, None, "cpu")


@cache
def policy_triton(device: torch.device) -> PolicyKernels:
    """The Triton kernels.

    Args:
        device: A GPU; or a CPU where Triton's interpreter was chosen before Triton was imported.

    Raises:
        ValueError: The device cannot run them.
    """
    _check_triton(device)
    from vllm_sparse.kernels.triton import attention, compaction, decode, launch, rows

    return PolicyKernels(
        decode.decode_attention,
        rows.plan_rows,
        attention.attend_slots,
        compaction.compact_prompts,
        decode.decode_scratch_bytes,
        f"triton, launches {launch.launches(device).origin}",
    )


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


class SpardaKernels(NamedTuple):
    """What SparDA runs; the contracts are those of ``kernels.reference.sparda_*``.

    Attributes:
        name: Which kernels these are, for the start-up line.
        note: Why they are slow, if they are.
    """

    select_blocks: Callable[..., Selected]
    choose_blocks: Callable[..., torch.Tensor]
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
    note = ""
    if kernels == "reference":
        folder = name = "reference"
    elif device.type != "cpu" or kernels == "triton":
        _check_triton(device)
        from vllm_sparse.kernels.triton import launch

        folder, name = "triton", f"triton, launches {launch.launches(device).origin}"
    else:
        fused, note = _fused(device.type)
        if not fused:
            return sparda_kernels(device, "reference")._replace(note=note)
        folder = name = "cpu"
    select, choose, paging, tokens, attention, prefill = (
        _implementation(folder, f"sparda_{part}")
        for part in ("select", "choose", "paging", "tokens", "attention", "prefill")
    )
    return SpardaKernels(
        select.select_blocks, choose.choose_blocks, paging.resolve, paging.copy_pieces,
        tokens.write_tokens, tokens.update_windows, tokens.record_queries,
        attention.attend_frames, prefill.attend_part, name, note,
    )  # fmt: skip


def _implementation(folder: str, name: str) -> Any:
    """One file's functions, of ``reference``, ``cpu`` or ``triton``."""
    return importlib.import_module(f"vllm_sparse.kernels.{folder}.{name}")


def _check_triton(device: torch.device) -> None:
    import triton

    if device.type != "cuda" and not triton.knobs.runtime.interpret:
        raise ValueError(
            f"Triton kernels need a CUDA device, not {device.type!r}; on a CPU they run in Triton's"
            " interpreter, with TRITON_INTERPRET=1 in the environment"
        )
