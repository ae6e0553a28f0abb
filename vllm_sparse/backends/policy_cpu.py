# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Policies on top of vLLM's CPU backend."""

from __future__ import annotations

from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from vllm_sparse.backends.asked import has_layers
from vllm_sparse.backends.base import prompt_lengths, withdraw
from vllm_sparse.backends.controls import controls
from vllm_sparse.backends.drafting import note_rows, rows_of_pass, with_waiting_queries
from vllm_sparse.backends.policy import Planning, PolicyBackend, set_up_layer
from vllm_sparse.backends.policy_step import attend_step
from vllm_sparse.kernels.cpu.memory import back_with_huge_pages
from vllm_sparse.kernels.dispatch import policy_cpu
from vllm_sparse.kv.host.geometry import GIB
from vllm_sparse.kv.tail.codec import PageCodec

if TYPE_CHECKING:
    from torch import Tensor
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import CommonAttentionMetadata

    from vllm_sparse.kv.spec import PolicySpec
    from vllm_sparse.steps.layer import SparseLayer
    from vllm_sparse.steps.split import StepMetadata

logger = init_logger("vllm.sparse")

_MOST_GIB_AT_ONCE = 64


class PolicyCpuBackend(PolicyBackend, CPUAttentionBackend):
    """Policies on CPUs."""

    @staticmethod
    def get_impl_cls() -> type[PolicyCpuImpl]:
        """The attention implementation."""
        return PolicyCpuImpl

    @staticmethod
    def get_builder_cls() -> type[PolicyCpuBuilder]:
        """The metadata builder."""
        return PolicyCpuBuilder


class PolicyCpuBuilder(CPUAttentionMetadataBuilder):
    """The CPU backend's builder, and huge pages for the cache."""

    def __init__(
        self,
        kv_cache_spec: PolicySpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        withdraw(vllm_config)
        self._drafts = has_layers(vllm_config.speculative_config)
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        spec = kv_cache_spec
        cached = spec.dtype
        if cached == torch.uint8:  # fp8: the kernels are chosen by what is converted
            cached = vllm_config.model_config.dtype
        # Each layer has learnt its instruction set from the stock builder.
        self._planning = Planning(
            spec,
            layer_names,
            vllm_config,
            self.block_size,
            policy_cpu(),
            True,
            lambda layer: _codec(
                layer.isa, spec.block_size, spec.head_size, cached, layer.kv_cache_dtype
            ),
        )
        if self._planning.policy.settings.huge_pages:
            blocks = vllm_config.cache_config.num_gpu_blocks or 0
            at_once = moves_at_once(blocks * spec.page_size_bytes * len(layer_names))
            for layer in self._planning.layers:
                # vLLM binds the cache after this, still before it serves: the time to move it is
                # part of the start, not of the first request.
                layer.bind_kv_cache = partial(_bind_on_huge_pages, layer, at_once)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> StepMetadata:
        """Plan one step."""
        common = common_attn_metadata
        lengths = common.seq_lens[: common.num_reqs]
        rows = lengths, prompt_lengths(common), controls(common)
        if self._drafts:
            note_rows(*rows)
        self._planning.compact_begun(common, *rows)
        return self._planning.split(common, *rows, super().build)

    def build_for_drafting(
        self, common_attn_metadata: CommonAttentionMetadata, draft_index: int
    ) -> StepMetadata:
        """Plan a pass of a drafter."""
        common, planning = common_attn_metadata, self._planning
        lengths = common.seq_lens[: common.num_reqs]
        rows = rows_of_pass(planning.policy, common, lengths)
        step = planning.split(common, lengths, *rows[:2], super().build)
        return with_waiting_queries(step, planning.planner, common, lengths, rows)


def moves_at_once(cache_bytes: int) -> bool:
    """Whether a cache of so many bytes moves to huge pages before the server serves.

    Moving takes a few seconds a GiB, of which the log tells; several API servers wait ten minutes
    for their engines.
    """
    gib = cache_bytes / GIB
    if gib > _MOST_GIB_AT_ONCE:
        logger.info_once(
            f"The KV cache of {gib:.0f} GiB moves to huge pages while it is used, as the kernel "
            "finds time; sparse decode is slower until then"
        )
    elif gib > 1:
        logger.info_once(f"The KV cache of {gib:.1f} GiB moves to huge pages: some seconds a GiB")
    return gib <= _MOST_GIB_AT_ONCE


def _bind_on_huge_pages(layer: Any, at_once: bool, kv_cache: Tensor) -> None:
    type(layer).bind_kv_cache(layer, kv_cache)
    if not back_with_huge_pages(kv_cache, at_once):
        logger.info_once("The KV cache stays on small pages; sparse decode is slower on them")


class PolicyCpuImpl(CPUAttentionBackendImpl):
    """One layer on a CPU, whose stock kernel packs pages its own way.

    Attributes:
        sparse: What is not dense; set by the builder, once the block size is final.
    """

    sparse: SparseLayer

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        set_up_layer(get_current_vllm_config(), CPUAttentionBackendImpl, args, kwargs)
        super().__init__(*args, **kwargs)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: StepMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attend one step; without metadata, vLLM profiles. See :mod:`.policy_step`."""
        if attn_metadata is None:
            return output.fill_(0)  # what follows may not take NaN
        tensors = query, key, value, kv_cache
        scales = output_scale, output_block_scale
        return attend_step(self.sparse, super(), layer, *tensors, attn_metadata, output, *scales)


@cache
def _codec(
    isa: str, block_size: int, dim: int, dtype: torch.dtype, kv_cache_dtype: str
) -> PageCodec:
    pack, fp8 = partial(_pack, isa, kv_cache_dtype), kv_cache_dtype.startswith("fp8")
    return PageCodec(pack, block_size, dim, dtype, torch.device("cpu"), fp8)


def _pack(isa: str, kv_cache_dtype: str, key: Tensor, value: Tensor, pages: Tensor) -> None:
    """The stock kernel's write, into one page; lets the codec find out how it packs."""
    from vllm import _custom_ops as ops

    key_pages, value_pages = pages.chunk(2, 2)
    slots = torch.arange(key.shape[0])
    ops.cpu_attn_reshape_and_cache(
        key, value, key_pages, value_pages, slots, isa, kv_cache_dtype=kv_cache_dtype
    )
