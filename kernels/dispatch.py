# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Which implementation of a kernel runs where."""

from __future__ import annotations

import importlib
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from vllm_sparse.kernels.types import Resolution, Selected

# The file of each kernel, the same in every folder of implementations.
FILES = {
    **dict.fromkeys(("append_tokens", "probe_pages"), "append"),
    "decode_attention": "decode",
    "select_slots": "pages",
    "attend_slots": "attention",
    "score_prompt": "prompt",
    "top_indices": "topk",
    **dict.fromkeys(("compact_tokens", "compact_prompts"), "compaction"),
    "plan_rows": "rows",
    "select_blocks": "sparda_select",
    "choose_blocks": "sparda_choose",
    **dict.fromkeys(("resolve", "copy_pieces"), "sparda_paging"),
    "attend_frames": "sparda_attention",
    "attend_part": "sparda_prefill",
    **dict.fromkeys(("write_tokens", "record_queries", "recall_queries"), "sparda_tokens"),
}


def implementation(folder: str, name: str) -> Callable[..., Any]:
    """A kernel as ``reference``, ``cpu`` or ``triton`` have it."""
    module = importlib.import_module(f"vllm_sparse.kernels.{folder}.{FILES[name]}")
    kernel: Callable[..., Any] = getattr(module, name)
    return kernel


class FusedStep(NamedTuple):
    """Kernels that take the place of a policy's own functions in one folder of implementations.

    Attributes:
        decode: The whole decode step, with the arguments of
            :func:`.reference.decode.decode_attention`.
        compact_prompts: What a prompt's end does, with the arguments of
            :func:`.reference.compaction.compact_prompts`. Where the stock kernel packs pages, as on
            CPUs, and if it is ``None``, that is composed of the policy's functions.
        settings: Settings of the policy that ``compact_prompts`` takes by name, beside them.
        decode_scratch_bytes: Most bytes that ``decode`` holds at a time, with the arguments of
            :func:`.triton.decode.decode_scratch_bytes`; ``None`` if it holds none.
    """

    decode: Callable[..., None]
    compact_prompts: Callable[..., None] | None = None
    settings: tuple[str, ...] = ()
    decode_scratch_bytes: Callable[..., int] | None = None


def _rocketkv(folder: str) -> FusedStep:
    decode = implementation(folder, "decode_attention")
    if folder != "triton":
        return FusedStep(decode)
    from vllm_sparse.kernels.triton.decode import decode_scratch_bytes

    compact = implementation(folder, "compact_prompts")
    return FusedStep(decode, compact, ("pool_kernel",), decode_scratch_bytes)


# By :attr:`Policy.kernel`: the fused step of ``reference``, ``cpu`` or ``triton``. A package adds
# its own where it defines its policy, which every process imports.
FUSED: dict[str, Callable[[str], FusedStep]] = {"rocketkv": _rocketkv}


class PolicyKernels(NamedTuple):
    """What any policy runs that keeps keys and values on the device.

    Attributes:
        decode: A decode step that reads all it kept, if called with ``read_all``.
        plan_rows: Plans a batch of single tokens on the device.
        attend_slots: Attention over selected places of plain pages.
        decode_scratch_bytes: Most bytes that scores and selected places take at a time; ``None``
            where nobody plans for it.
        folder: Where these are, and fused steps.
        name: For the start-up line.
        note: Why it is not the fastest one, if it is not.
    """

    decode: Callable[..., None]
    plan_rows: Callable[..., None]
    attend_slots: Callable[..., None]
    decode_scratch_bytes: Callable[..., int] | None
    folder: str
    name: str
    note: str = ""

    def fused(self, kernel: str) -> FusedStep | None:
        """The fused step of :attr:`Policy.kernel`; ``None`` if that is empty."""
        return FUSED[kernel](self.folder) if kernel else None


@cache
def policy_cpu() -> PolicyKernels:
    """The fused C++ kernels, or the PyTorch reference on a machine without a compiler."""
    fused, note = _fused()
    folder = "cpu" if fused else "reference"
    return PolicyKernels(
        implementation(folder, "decode_attention"),
        implementation("reference", "plan_rows"),
        implementation(folder, "attend_slots"),
        None,
        folder,
        folder,
        note,
    )


@cache
def policy_triton(device: torch.device) -> PolicyKernels:
    """The Triton kernels.

    Args:
        device: A GPU; or a CPU where Triton's interpreter was chosen before Triton was imported.

    Raises:
        ValueError: The device cannot run them.
    """
    _check_triton(device)
    from vllm_sparse.kernels.triton import decode, launch

    return PolicyKernels(
        decode.decode_attention,
        implementation("triton", "plan_rows"),
        implementation("triton", "attend_slots"),
        decode.decode_scratch_bytes,
        "triton",
        f"triton, launches {launch.launches(device).origin}",
    )


def _fused() -> tuple[bool, str]:
    """Whether the C++ kernels can be had, and if not, why."""
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
    record_queries: Callable[..., None]
    recall_queries: Callable[..., None]
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
        from vllm_sparse.kernels.triton import counters, launch

        counters.prepare(device)
        folder, name = "triton", f"triton, launches {launch.launches(device).origin}"
    else:
        fused, note = _fused()
        if not fused:
            return sparda_kernels(device, "reference")._replace(note=note)
        folder = name = "cpu"
    found: dict[str, Any] = {
        kernel: implementation(folder, kernel) for kernel in SpardaKernels._fields[:-2]
    }
    return SpardaKernels(**found, name=name, note=note)


def _check_triton(device: torch.device) -> None:
    import triton

    if device.type != "cuda" and not triton.knobs.runtime.interpret:
        raise ValueError(
            f"Triton kernels need a CUDA device, not {device.type!r}; on a CPU they run in Triton's"
            " interpreter, with TRITON_INTERPRET=1 in the environment"
        )
