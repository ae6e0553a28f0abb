# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""ROCKETKV on top of FlashAttention.

A batch in which every row is one token is planned on the device, into buffers that never move: a
captured CUDA graph reads them, and nothing waits for the host. Any other batch is split on the host
as on a CPU.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from vllm_sparse import metrics
from vllm_sparse.backends.base import most_rows, prompt_lengths, sequence_lengths
from vllm_sparse.backends.gpu import GpuBackend, check_block_size, warn_of_gpus
from vllm_sparse.backends.rocketkv import RocketKVBackend, RocketKVLayer, RocketKVPlanning
from vllm_sparse.errors import UnsupportedError
from vllm_sparse.kernels.dispatch import rocketkv_gpu
from vllm_sparse.kernels.layout import PageLayout
from vllm_sparse.kernels.reference.rows import Rows
from vllm_sparse.steps.counters import DeviceCounters
from vllm_sparse.steps.tail import PromptEnd, SparseRows, StepMetadata
from vllm_sparse.upload import upload

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import CommonAttentionMetadata

    from vllm_sparse.kv.spec import RocketKVSpec

# A 32-byte sector holds a channel's extrema of 16 pages, 64 tokens with the default page size.
_PREFERRED_BLOCK_SIZE = 64


class RocketKVGpuBackend(RocketKVBackend, GpuBackend):
    """ROCKETKV on NVIDIA GPUs."""

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        """Where the user leaves the choice: reading few channels should move few sectors."""
        return max(super().get_preferred_block_size(default_block_size), _PREFERRED_BLOCK_SIZE)

    @staticmethod
    def get_impl_cls() -> type[RocketKVGpuImpl]:
        """The attention implementation."""
        return RocketKVGpuImpl

    @staticmethod
    def get_builder_cls() -> type[RocketKVGpuBuilder]:
        """The metadata builder."""
        return RocketKVGpuBuilder


class RocketKVGpuBuilder(RocketKVPlanning, FlashAttentionMetadataBuilder):
    """Plans steps; finishes prompts whose last token came alone."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = (
        AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    )
    supports_update_block_table: ClassVar[bool] = False

    def __init__(
        self,
        kv_cache_spec: RocketKVSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        warn_of_gpus("ROCKETKV")
        check_block_size(self.block_size)
        if len(self.rule.page_sizes) > 1:
            raise UnsupportedError(
                f"page_sizes={list(self.rule.page_sizes)}: on GPUs one page size serves all "
                "requests, because a captured graph has one shape. Give one of them"
            )
        layers = vllm_config.compilation_config.static_forward_context.values()
        stock = [getattr(layer, "impl", None) for layer in layers if layer not in self.layers]
        if any(getattr(impl, "vllm_flash_attn_version", None) == 4 for impl in stock):
            # It takes what makes the runner hand over prompt lengths for another kind of window.
            raise UnsupportedError(
                "sliding-window layers stay stock beside ROCKETKV, which FlashAttention 4 does not "
                "allow. Choose an older one with --attention-config.flash_attn_version"
            )
        self._kernels = rocketkv_gpu(device)
        self._rules = self.planner.rules.to(device)
        self._counters = DeviceCounters(
            ("decode_rows", "visible_tokens", "selected_tokens"), device, metrics.counters().add
        )
        # Reads are counted up to this many tokens per row.
        self._read = self.planner.top_k if self.rule.stage2 else self.rule.max_model_len
        self._per_block = self.layers[0].impl.parking.per_block
        self._rows: Rows | None = None
        self._late: list[PromptEnd] = []
        self.layers[0].impl.warm_up(kv_cache_spec, device)
        self._max_rows = most_rows(vllm_config)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> StepMetadata:
        """Plan one step."""
        common = common_attn_metadata
        self._compact_late()
        prompt_lens = prompt_lengths(common)
        if common.max_query_len == 1:
            return self._plan_rows(common, prompt_lens)
        return self.split(common, sequence_lengths(common), prompt_lens.cpu())

    def _plan_rows(self, common: CommonAttentionMetadata, prompt_lens: Tensor) -> StepMetadata:
        count = common.num_reqs
        table = common.block_table_tensor[:count]
        rows = Rows(*(buffer[:count] for buffer in self._buffers(table.shape[1])))
        self._kernels.plan_rows(
            rows,
            common.seq_lens[:count],
            upload(prompt_lens, self.device),
            table,
            self._rules,
            self._counters.values,
            block_size=self.block_size,
            window=self.rule.window if self.rule.stage1 else 0,
            per_block=self._per_block,
            top_k=self._read,
        )
        self._counters.publish()
        prefilling = common.is_prefilling
        if prefilling is not None and bool(prefilling.any()):
            self._note_late(common, prompt_lens.cpu())
        return StepMetadata(count, None, rows=rows)

    def _buffers(self, width: int) -> Rows:
        if self._rows is None or self._rows.block_table.shape[1] != width:
            one = torch.zeros(3, self._max_rows, dtype=torch.int32, device=self.device)
            table = torch.zeros(self._max_rows, width, dtype=torch.int32, device=self.device)
            self._rows = Rows(table, *one)
        return self._rows

    def _note_late(self, common: CommonAttentionMetadata, prompt_lens: Tensor) -> None:
        """Remember prompts whose last token is a row of this step.

        A captured graph may run the step, and compaction is not part of it. The queries are parked
        there; the next step starts by compacting. Blocks that it gives up cannot be written before:
        the scheduler frees them once this step is processed.
        """
        start = common.query_start_loc_cpu[: common.num_reqs + 1]
        lens = sequence_lengths(common)
        count = metrics.counters().add
        self.planner.count_fallbacks(start, lens, prompt_lens, count)
        table = common.block_table_tensor
        for prompt in self.planner.ending_prompts(start, lens, prompt_lens, table, count):
            if prompt.complete:
                parked = self.rule.window if self.rule.stage1 else 0
                self._late.append(replace(prompt, blocks=prompt.blocks.clone(), parked=parked))

    def _compact_late(self) -> None:
        late, self._late = self._late, []
        for prompt in late:
            for layer in self.layers:
                layer.impl.compact_parked(layer.kv_cache, prompt)


class RocketKVGpuImpl(RocketKVLayer, FlashAttentionImpl):
    """One layer on a GPU, whose pages hold plain rows."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.vllm_flash_attn_version is None:
            raise UnsupportedError(
                "ROCKETKV runs prompts through FlashAttention, which this installation of vLLM "
                "lacks for this device. On a CPU leave vllm_sparse.kernels at auto"
            )
        self._config = get_current_vllm_config()

    def reserve(self, device: torch.device) -> None:
        """See :class:`RocketKVLayer`; vLLM has not planned its cache yet."""
        if not self.settings.stage2:
            return
        block_size, page_size = self._config.cache_config.block_size, min(self.settings.page_sizes)
        needed = rocketkv_gpu(device).decode_scratch_bytes(
            most_rows(self._config),
            -(-self._config.model_config.max_model_len // block_size),
            layout=PageLayout(block_size, self.head_size, page_size),
            heads=self.num_heads,
            kv_heads=self.num_kv_heads,
            top_k=self.top_k,
            dtype=self._config.model_config.dtype,
            device=device,
        )
        torch.empty(needed, dtype=torch.uint8, device=device)

    def prepare(
        self, layer: Any, spec: RocketKVSpec, layer_index: int, device: torch.device
    ) -> None:
        """See :class:`RocketKVLayer`."""
        super().prepare(layer, spec, layer_index, device)
        self._kernels = rocketkv_gpu(device)
        self.kernel = self._kernels.decode

    def warm_up(self, spec: RocketKVSpec, device: torch.device) -> None:
        """Compile what vLLM's dummy runs do not reach: a prompt's end, and decode beside prompts.

        The first requests would wait for it otherwise.
        """
        size, blocks = spec.block_size, -(-self.settings.window // spec.block_size) + 2
        layout = self.stock_layout
        content = 2 * layout.head_dim * (1 + layout.page_size) // layout.page_size
        shape = (blocks, self.num_kv_heads, size, content)
        cache = torch.zeros(shape, dtype=spec.dtype, device=device)
        table = torch.arange(blocks, dtype=torch.int32, device=device)
        lengths = torch.tensor([blocks * size, 1], dtype=torch.int32, device=device)
        heads, dim = self.num_heads + 2 * self.num_kv_heads, self.head_size
        tokens = torch.zeros(self.settings.window, heads, dim, dtype=spec.dtype, device=device)
        query, key, value = tokens.split([self.num_heads, *2 * [self.num_kv_heads]], 1)
        prompt = PromptEnd(
            table, blocks * size, 1, layout.page_size, 0, len(tokens), 0, True, lengths
        )
        self.compact(cache, prompt, query)
        row = lengths[:1]
        rows = SparseRows(None, table[None], row, row, row, layout.page_size)
        self._decode(query, key, value, cache, rows, torch.empty_like(query))

    def attend_rows(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        rows: Rows,
        output: Tensor,
    ) -> None:
        """See :class:`RocketKVLayer`."""
        count = len(rows.lengths)
        self.kernel.run(
            kv_cache,
            query[:count],
            key[:count],
            value[:count],
            output[:count],
            rows.block_table,
            rows.lengths,
            rows.lengths,
            rows.top_r,
            layout=self.stock_layout,
            top_k=self.top_k,
            scale=self.scale,
            read_all=self.read_all,
            replays=False,
            parked=rows.parked,
            per_block=self.parking.per_block,
        )

    def compact(self, cache: Tensor, prompt: PromptEnd, window: Tensor) -> None:
        """See :class:`RocketKVLayer`."""
        layout = self.layouts[prompt.page_size]
        keys, values = layout.tokens(cache).split(layout.head_dim, -1)
        length, dropped = prompt.sizes.split(1)
        self._kernels.compact_prompts(
            cache,
            keys,
            values,
            window.transpose(0, 1)[None],
            prompt.blocks[None],
            length,
            dropped,
            layout=layout,
            pool_kernel=self.settings.pool_kernel,
            max_kept=prompt.prompt_len - prompt.dropped_blocks * layout.block_size,
        )

    def compact_parked(self, cache: Tensor, prompt: PromptEnd) -> None:
        """Stage 1 for a prompt all of whose window queries are parked."""
        tail = prompt.blocks[prompt.dropped_blocks :]
        if prompt.parked:
            window = self.parking.load(cache, tail, prompt.parked)
        else:  # everything is kept, so that nothing is scored
            window = torch.zeros(
                1, self.num_heads, self.head_size, dtype=cache.dtype, device=cache.device
            )
        self.compact(cache, prompt, window)
