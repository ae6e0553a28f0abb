# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""ROCKETKV on top of vLLM's CPU backend."""

from __future__ import annotations

from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from vllm_sparse.backends.base import prompt_lengths
from vllm_sparse.backends.rocketkv import RocketKVBackend, RocketKVLayer, RocketKVPlanning
from vllm_sparse.kernels.cpu.memory import back_with_huge_pages
from vllm_sparse.kernels.dispatch import rocketkv_decode
from vllm_sparse.kv.tail.codec import PageCodec
from vllm_sparse.kv.tail.compaction import compact_prompt

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import CommonAttentionMetadata

    from vllm_sparse.kv.spec import RocketKVSpec
    from vllm_sparse.steps.tail import PromptEnd, StepMetadata

logger = init_logger("vllm.sparse.rocketkv")


class RocketKVCpuBackend(RocketKVBackend, CPUAttentionBackend):
    """ROCKETKV on CPUs."""

    @staticmethod
    def get_impl_cls() -> type[RocketKVCpuImpl]:
        """The attention implementation."""
        return RocketKVCpuImpl

    @staticmethod
    def get_builder_cls() -> type[RocketKVCpuBuilder]:
        """The metadata builder."""
        return RocketKVCpuBuilder


class RocketKVCpuBuilder(RocketKVPlanning, CPUAttentionMetadataBuilder):
    """The CPU backend's builder, and huge pages for the cache."""

    def __init__(
        self,
        kv_cache_spec: RocketKVSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        if self.settings.huge_pages:
            for layer in self.layers:
                # vLLM binds the cache after this, still before it serves: the time to move it is
                # part of the start, not of the first request.
                layer.bind_kv_cache = partial(_bind_on_huge_pages, layer)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> StepMetadata:
        """Plan one step."""
        common = common_attn_metadata
        return self.split(common, common.seq_lens[: common.num_reqs], prompt_lengths(common))


def _bind_on_huge_pages(layer: Any, kv_cache: Tensor) -> None:
    type(layer).bind_kv_cache(layer, kv_cache)
    if not back_with_huge_pages(kv_cache):
        logger.info_once("The KV cache stays on small pages; sparse decode is slower on them")


class RocketKVCpuImpl(RocketKVLayer, CPUAttentionBackendImpl):
    """One layer on a CPU, whose stock kernel packs pages its own way."""

    def prepare(
        self, layer: Any, spec: RocketKVSpec, layer_index: int, device: torch.device
    ) -> None:
        """See :class:`RocketKVLayer`."""
        super().prepare(layer, spec, layer_index, device)
        # The stock builder has set the instruction set.
        self._codec = _codec(layer.isa, spec.block_size, spec.head_size, spec.dtype)
        self.kernel = rocketkv_decode(device.type, spec.dtype)

    def compact(self, cache: Tensor, prompt: PromptEnd, window: Tensor) -> None:
        """See :class:`RocketKVLayer`."""
        compact_prompt(
            cache,
            prompt.blocks,
            prompt.prompt_len,
            prompt.dropped_blocks,
            window.transpose(0, 1),
            codec=self._codec,
            layout=self.layouts[prompt.page_size],
            pool_kernel=self.settings.pool_kernel,
        )


@cache
def _codec(isa: str, block_size: int, dim: int, dtype: torch.dtype) -> PageCodec:
    return PageCodec(partial(_pack, isa), block_size, dim, dtype, torch.device("cpu"))


def _pack(isa: str, key: Tensor, value: Tensor, pages: Tensor) -> None:
    """The stock kernel's write, into one page; lets the codec find out how it packs."""
    from vllm import _custom_ops as ops

    key_pages, value_pages = pages.chunk(2, 2)
    slots = torch.arange(key.shape[0])
    ops.cpu_attn_reshape_and_cache(key, value, key_pages, value_pages, slots, isa)
