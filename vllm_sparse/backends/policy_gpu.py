# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Policies on top of FlashAttention.

A batch in which every request has one token, or with drafts so many more, is planned on the
device, token by token, into buffers that never move: a captured CUDA graph reads them, and nothing
waits for the host. Any other batch is split on the host as on a CPU.

Where drafts are served, the host knows lengths of requests that decode as upper bounds only: the
runner plans ahead of what is rejected. So these come from the device in any batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.v1.attention.backend import AttentionCGSupport, MultipleOf
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import is_quantized_kv_cache

from vllm_sparse.backends.asked import has_layers
from vllm_sparse.backends.base import (
    holds_prompts,
    is_rehearsal,
    most_rows,
    prompt_lengths,
    rehearsed,
    sequence_lengths,
    withdraw,
)
from vllm_sparse.backends.controls import controls, replayed
from vllm_sparse.backends.drafting import note_rows, rows_of_pass
from vllm_sparse.backends.gpu import GpuBackend, warn_of_gpus
from vllm_sparse.backends.policy import Planning, PolicyBackend, count_nothing, set_up_layer
from vllm_sparse.backends.policy_room import scoring_parts, step_bytes
from vllm_sparse.backends.policy_step import attend_step
from vllm_sparse.backends.policy_warm_up import warm_up
from vllm_sparse.backends.prompts import is_warm_up, prompt_lengths_on_host
from vllm_sparse.backends.refusals import check_stock_layers
from vllm_sparse.buffers import vectors
from vllm_sparse.counters import DeviceCounters
from vllm_sparse.features import POLICIES, refuse
from vllm_sparse.kernels.dispatch import policy_triton
from vllm_sparse.kernels.fp8 import FP8, encode
from vllm_sparse.kernels.types import Rows
from vllm_sparse.kv.tail.codec import PlainReader
from vllm_sparse.steps.split import StepMetadata
from vllm_sparse.upload import upload

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.kv_cache_interface import KVCacheSpec

    from vllm_sparse.kv.spec import PolicySpec
    from vllm_sparse.steps.layer import SparseLayer

# Kernels have tiles for blocks of at most this many tokens, if they are parts of larger ones.
_LARGEST_PART = 128
# A 32-byte sector holds a channel's extrema of 16 pages, 64 tokens with ROCKETKV's page size.
_PREFERRED_BLOCK_SIZE = 64
# Each is some forty launches in every layer of a graph.
_MOST_PARTS = 8
# A child of vLLM's logger: others have no handler in its processes.
logger = init_logger("vllm.sparse")


class PolicyGpuBackend(PolicyBackend, GpuBackend):
    """Policies on NVIDIA GPUs."""

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        """Where the user leaves the choice: reading few channels should move few sectors."""
        return max(super().get_preferred_block_size(default_block_size), _PREFERRED_BLOCK_SIZE)

    @classmethod
    def get_supported_kernel_block_sizes(
        cls, kv_cache_spec: KVCacheSpec | None = None
    ) -> list[int | MultipleOf]:
        """What vLLM may hand over as a block: all of it, or parts if it is no power of two."""
        sizes = super().get_supported_kernel_block_sizes(kv_cache_spec)
        whole = 0 if kv_cache_spec is None else kv_cache_spec.block_size
        part = _part_of(whole)
        return sizes if part == whole or sizes != [MultipleOf(16)] else [part]

    @staticmethod
    def get_impl_cls() -> type[PolicyGpuImpl]:
        """The attention implementation."""
        return PolicyGpuImpl

    @staticmethod
    def get_builder_cls() -> type[PolicyGpuBuilder]:
        """The metadata builder."""
        return PolicyGpuBuilder


class PolicyGpuBuilder(FlashAttentionMetadataBuilder):
    """Plans steps; each begins with the compaction of prompts that ended in the one before."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH
    supports_update_block_table: ClassVar[bool] = False

    def __init__(
        self,
        kv_cache_spec: PolicySpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        withdraw(vllm_config)
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.supports_draft_decode_metadata_update = False
        spec, policy = kv_cache_spec, kv_cache_spec.policy
        warn_of_gpus(spec.backend)
        self._kernels = policy_triton(device)
        reader = PlainReader(spec.layout(policy.page_sizes[0]))
        self._planning = Planning(
            spec,
            layer_names,
            vllm_config,
            self.block_size,
            self._kernels,
            False,
            lambda _: reader,
        )
        self._planner = self._planning.planner
        layers = vllm_config.compilation_config.static_forward_context.values()
        check_stock_layers(layers, PolicyGpuImpl)
        self._rules = self._planner.rules.on_device.to(device)
        self._counters = DeviceCounters(
            ("decode_rows", "visible_tokens", "selected_tokens"), device, self._planning.count
        )
        self._uncounted = torch.zeros_like(self._counters.values)
        # Reads are counted up to this many tokens per row.
        self._read = policy.top_k or policy.shape.max_model_len
        parking = self._layers[0].parking
        self._window, self._per_block = policy.window, parking.per_block if parking else 1
        self._table: Tensor | None = None
        self._max_rows = most_rows(vllm_config)
        self._drafts = vllm_config.num_speculative_tokens
        self._drafted_for = has_layers(vllm_config.speculative_config)
        self._drafting = all(layer.is_draft_layer for layer in self._planning.layers)
        if policy.moves:
            impls = [layer.impl for layer in self._planning.layers]
            variants = {(impl.sparse.reads_all, impl.sinks is None): impl for impl in impls}
            for impl in variants.values():
                warm_up(impl, spec, vllm_config.model_config.dtype, device, self._drafts > 0)

    @classmethod
    def get_cudagraph_support(
        cls, vllm_config: VllmConfig, kv_cache_spec: PolicySpec
    ) -> AttentionCGSupport:
        """Whole decode steps, with two exceptions.

        Where PyTorch scores so much that a graph would never be ready, there are none. Model Runner
        V1 tells steps of drafts by their number of tokens: of a request that was preempted, one may
        hold both sides of its prompt's end, and a graph cannot compact in its midst.
        """
        drafts = vllm_config.speculative_config is not None
        if drafts and kv_cache_spec.policy.moves and not vllm_config.use_v2_model_runner:
            logger.warning_once(
                f"{kv_cache_spec.backend}: decode runs in pieces between CUDA graphs, since Model "
                "Runner V1 would take a step in which a preempted prompt ends for one of drafts. "
                "Drafts of other methods than custom_class and suffix have Model Runner V2"
            )
            return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
        parts = scoring_parts(vllm_config, kv_cache_spec.policy, kv_cache_spec.num_kv_heads)
        if parts <= _MOST_PARTS:
            return cls._cudagraph_support
        logger.warning_once(
            f"{kv_cache_spec.backend}: decode runs without CUDA graphs, since PyTorch scores the "
            f"pages of the largest graph's requests, of {vllm_config.model_config.max_model_len} "
            f"tokens each, in {parts} parts of a layer, and one of more than {_MOST_PARTS} takes "
            "too long to capture. To have graphs, lower --max-model-len or "
            "--max-cudagraph-capture-size"
        )
        return AttentionCGSupport.NEVER

    @property
    def _layers(self) -> list[SparseLayer]:
        return [layer.impl.sparse for layer in self._planning.layers]

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> StepMetadata:
        """Plan one step."""
        common = common_attn_metadata
        lengths, rehearsal = sequence_lengths(common), is_rehearsal(common)
        if rehearsal and self._drafting:  # Model Runner V2 does not say that it drafts
            return self.build_for_drafting(common, 0)
        host = lengths, prompt_lengths_on_host(common), controls(common)
        if self._drafted_for:
            note_rows(*host)
        count, counted = self._counting(common, rehearsal)
        if not rehearsal:
            self._planning.compact_begun(common, *host, count)
        start = common.query_start_loc_cpu[: common.num_reqs + 1]
        straddled = self._drafts and not rehearsal and self._planner.prompts.straddled(start, *host)
        if common.max_query_len <= 1 + self._drafts and not straddled:
            return self._plan_rows(common, *host, count, counted, rehearsal)
        corrected = counted if self._drafts and not rehearsal else None
        return self._planning.split(common, *host, super().build, corrected, count)

    def build_for_drafting(
        self, common_attn_metadata: CommonAttentionMetadata, draft_index: int
    ) -> StepMetadata:
        """Plan a pass of a drafter."""
        common, lengths = common_attn_metadata, sequence_lengths(common_attn_metadata)
        host = lengths, *rows_of_pass(self._planning.policy, common, lengths)[:2]
        if common.max_query_len <= 1 + self._drafts:
            rehearsal = is_rehearsal(common)
            return self._plan_rows(common, *host, count_nothing, self._uncounted, rehearsal)
        return self._planning.split(common, *host, super().build, self._uncounted, count_nothing)

    def build_for_cudagraph_capture(
        self, common_attn_metadata: CommonAttentionMetadata
    ) -> StepMetadata:
        """Plan a dummy run; slots are ours, so that vLLM's empty slot mapping protects nothing."""
        dummy = rehearsed(common_attn_metadata)
        if self._drafting:
            lengths = sequence_lengths(dummy)
            note_rows(lengths, torch.zeros_like(lengths), None)
        return self.build(0, dummy)

    def _counting(
        self, common: CommonAttentionMetadata, rehearsal: bool
    ) -> tuple[Callable[..., None], Tensor]:
        """What takes the counts of a step, on the host and on the device; not of vLLM's own."""
        if rehearsal or is_warm_up(common):
            return count_nothing, self._uncounted
        return self._planning.count, self._counters.values

    def _plan_rows(
        self,
        common: CommonAttentionMetadata,
        lengths: Tensor,
        prompt_lens: Tensor,
        asked: Tensor | None,
        count: Callable[..., None],
        counted: Tensor,
        rehearsal: bool,
    ) -> StepMetadata:
        requests = common.num_reqs
        tokens = common.num_actual_tokens if self._drafts else requests
        table = common.block_table_tensor[:requests]
        rows = self._buffers(table.shape[1], tokens)
        known = prompt_lens if rehearsal else prompt_lengths(common)
        prompts = upload(known, self.device)
        if asked is not None:  # what is dense needs no prompt length, but another rule
            prompts = self._planner.rules.find(prompts, upload(asked, self.device)).int()
        self._kernels.plan_rows(
            rows,
            common.seq_lens[:requests],
            prompts,
            table,
            self._rules,
            counted,
            block_size=self.block_size,
            window=self._window,
            per_block=self._per_block,
            top_k=self._read,
            query_start=common.query_start_loc[: requests + 1] if self._drafts else None,
        )
        self._counters.publish()
        if holds_prompts(common):
            start = common.query_start_loc_cpu[: requests + 1]
            rule = self._planner.rules.find_on_host(prompt_lens, asked)
            host = start, lengths, prompt_lens, rule
            self._planner.prompts.count(*host, count, replayed(common))
        return StepMetadata(tokens, None, rows=rows)

    def _buffers(self, width: int, count: int) -> Rows:
        if self._table is None or self._table.shape[1] != width:
            options: dict[str, Any] = {"dtype": torch.int32, "device": self.device}
            self._table = torch.zeros(self._max_rows, width, **options)
            self._numbers = vectors(4, self._max_rows, **options)
        lengths, top_r, parked, final = self._numbers[:, :count].unbind()
        rows = Rows(self._table[:count], lengths, top_r, parked)
        return rows._replace(final_lengths=final) if self._drafts else rows


class PolicyGpuImpl(FlashAttentionImpl):
    """One layer on a GPU, whose pages hold plain rows.

    Attributes:
        sparse: What is not dense; set by the builder, once the block size is final.
    """

    sparse: SparseLayer
    supports_quant_query_input: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._config = get_current_vllm_config()
        set_up_layer(self._config, FlashAttentionImpl, args, kwargs)
        super().__init__(*args, **kwargs)
        if self.vllm_flash_attn_version is None:
            refuse("flash-attention", POLICIES, True)
        self._cache_dtype = self._config.model_config.dtype
        if is_quantized_kv_cache(self.kv_cache_dtype):
            self._cache_dtype = torch.uint8
        # Only FlashAttention wants queries of fp8: vLLM's layer is not to make them for us all.
        self._quantises = self._cache_dtype == torch.uint8 and self.supports_quant_query_input
        self.supports_quant_query_input = False
        self._dense = _QuantisedQueries(self)

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
            self._reserve(query.device)
            return output.fill_(0)  # what follows may not take NaN
        tensors = query, key, value, kv_cache
        scales = output_scale, output_block_scale
        stock = self._dense if self._quantises else super()
        return attend_step(self.sparse, stock, layer, *tensors, attn_metadata, output, *scales)

    def _reserve(self, device: torch.device) -> None:
        """Take as much memory as a step may need, and give it back: vLLM measures the peak."""
        context, config = PolicyBackend.context, self._config
        assert context is not None
        block_size = _part_of(config.cache_config.block_size)
        policy = context.policy(self.head_size, block_size, self._cache_dtype)
        layers = config.compilation_config.static_forward_context.values()
        ours = sum(isinstance(getattr(layer, "impl", None), PolicyGpuImpl) for layer in layers)
        needed = step_bytes(config, policy, self.num_kv_heads, ours, self._cache_dtype, device)
        torch.empty(needed, dtype=torch.uint8, device=device)


class _QuantisedQueries:
    """FlashAttention over an fp8 cache, which takes queries as numbers of the same kind.

    Args:
        impl: The layer's.
    """

    def __init__(self, impl: PolicyGpuImpl) -> None:
        self._impl = impl

    def do_kv_cache_update(self, *arguments: Any) -> None:
        """Write keys and values into the cache: the stock method."""
        FlashAttentionImpl.do_kv_cache_update(self._impl, *arguments)

    def forward(self, layer: Any, query: Tensor, *arguments: Any) -> Tensor:
        """Attend, after rounding queries to fp8 as vLLM's layer would have done."""
        impl = self._impl
        impl.supports_quant_query_input = True  # so that it multiplies with their scale
        try:
            rounded = encode(query, FP8, layer._q_scale_float, truncates=False)
            attended: Tensor = FlashAttentionImpl.forward(impl, layer, rounded, *arguments)
        finally:
            impl.supports_quant_query_input = False
        return attended


def _part_of(block_size: int) -> int:
    """Tokens of the parts in which kernels take a block: all, unless it is no power of two."""
    power = block_size & -block_size
    return block_size if power == block_size else min(power, _LARGEST_PART)
