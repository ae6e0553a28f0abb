# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""SPARDA on GPUs: the host pool is pinned memory, and a side stream fetches a layer ahead."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.utils.torch_utils import get_accelerator_view_from_cpu_tensor
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends import flash_attn
from vllm.v1.simple_kv_offload.cuda_mem_ops import pin_tensor

from vllm_sparse.backends.gpu import GpuBackend, warn_of_gpus
from vllm_sparse.backends.refusals import check_block_size
from vllm_sparse.backends.sparda import SpardaBackend, SpardaBuilder
from vllm_sparse.backends.sparda_setup import Machine
from vllm_sparse.config import load_settings
from vllm_sparse.device_room import working_bytes
from vllm_sparse.errors import ConfigError
from vllm_sparse.kernels.dispatch import sparda_kernels
from vllm_sparse.kv.host.geometry import GIB, staging_pieces
from vllm_sparse.prefetch.lane import LateLane, StreamLane

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheSpec

    from vllm_sparse.kv.host.geometry import Geometry
    from vllm_sparse.policies.sparda import SpardaSettings
    from vllm_sparse.steps.host_step import FreshRows


_LEAST_TILE = 16  # tokens that a tensor core multiplies at a time

logger = init_logger("vllm.sparse")


class SpardaGpuBackend(SpardaBackend, GpuBackend):
    """SPARDA on NVIDIA GPUs; FlashAttention only says what the device can do."""

    @staticmethod
    def get_builder_cls() -> type[SpardaGpuBuilder]:
        """The metadata builder."""
        return SpardaGpuBuilder


class SpardaGpuBuilder(SpardaBuilder):
    """For GPUs, whose graphs of batches of single tokens are captured."""

    @staticmethod
    def machine(
        config: VllmConfig, settings: SpardaSettings, geometry: Geometry, device: torch.device
    ) -> Machine:
        """A GPU; or on a CPU, what is most like one."""
        warn_of_gpus("SPARDA")
        check_block_size("SPARDA", geometry.block_size)
        if settings.sparse_prefill and geometry.block_size < _LEAST_TILE:
            raise ConfigError(
                f"vllm_sparse.block_size: sparse prompts on a GPU take blocks of at least "
                f"{_LEAST_TILE} tokens, not {geometry.block_size}. Raise it, or leave out "
                "sparse_prefill"
            )
        kernels = sparda_kernels(device, "triton")
        version = flash_attn.get_flash_attn_version(head_size=geometry.head_dim)
        fresh = None if version is None else partial(_attend_fresh, version)
        if device.type != "cuda":
            return Machine(
                kernels,
                LateLane(),
                captured=True,
                truncates=False,
                view=lambda host: host,  # one memory, but layers lie where they do on a GPU
                attend_fresh=fresh,
            )
        _check_memory(geometry, settings, device, working_bytes(config))
        pinned: list[Tensor] = []
        return Machine(
            kernels,
            StreamLane(device),
            captured=True,
            truncates=False,
            view=partial(_pinned_view, pinned),
            attend_fresh=fresh,
            release=partial(_unpin, pinned),
        )

    @classmethod
    def get_cudagraph_support(
        cls, vllm_config: VllmConfig, kv_cache_spec: KVCacheSpec
    ) -> AttentionCGSupport:
        """Whole decode steps, except while looking for mistakes."""
        if load_settings(vllm_config.additional_config, "sparda").poison:
            return AttentionCGSupport.NEVER  # poisoning waits for the device
        return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE


def _attend_fresh(
    version: int, query: Tensor, key: Tensor, value: Tensor, rows: FreshRows, scale: float
) -> Tensor:
    """Causal attention of rows without a past, ``[T, H, D]``, by FlashAttention."""
    output = torch.empty_like(query)
    flash_attn.flash_attn_varlen_func(
        q=query,
        k=key,
        v=value,
        out=output,
        cu_seqlens_q=rows.starts,
        cu_seqlens_k=rows.starts,
        max_seqlen_q=rows.longest,
        max_seqlen_k=rows.longest,
        softmax_scale=scale,
        causal=True,
        fa_version=version,
    )
    return output


def _check_memory(
    geometry: Geometry, settings: SpardaSettings, device: torch.device, working: int
) -> None:
    """Refuse a slab that the GPU has no room for; vLLM does not know of it.

    Args:
        geometry: Of the slab.
        settings: Of the staging area.
        device: The GPU.
        working: Bytes that a step takes beside them.

    Raises:
        ConfigError: With the arithmetic.
    """
    pieces = staging_pieces(settings, geometry.num_kv_heads)
    needed = geometry.slab_bytes + pieces * geometry.piece_bytes
    free, _ = torch.cuda.mem_get_info(device)
    if needed + working > free:
        raise ConfigError(
            f"vllm_sparse.slab_gib: {geometry.slab_bytes / GIB:.2f} GiB of frames and "
            f"{(needed - geometry.slab_bytes) / GIB:.2f} GiB of staging do not fit the "
            f"{free / GIB:.2f} GiB that are free on this GPU, of which a step of "
            f"--max-num-batched-tokens takes about {working / GIB:.2f}. Lower slab_gib, "
            "--max-num-seqs, top_k or dense_len"
        )


def _pinned_view(pinned: list[Tensor], host: Tensor) -> Tensor:
    """Pin host memory, note it, and return it as the GPU sees it.

    Not with PyTorch's allocator for pinned memory, which rounds sizes up to a power of two.
    """
    if host.nbytes > GIB:  # one thread faults all of it in, and nothing else tells of it
        logger.info(
            "Pinning %.1f GiB of host memory: minutes, if it is hundreds", host.nbytes / GIB
        )
    pin_tensor(host)
    pinned.append(host)
    view: Tensor = get_accelerator_view_from_cpu_tensor(host)
    return view


def _unpin(pinned: list[Tensor]) -> None:
    """Memory that was freed while it is pinned would haunt who gets its addresses next."""
    if pinned:
        torch.cuda.synchronize()
    while pinned:
        torch.cuda.cudart().cudaHostUnregister(pinned.pop().data_ptr())
