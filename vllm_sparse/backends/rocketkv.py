# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""ROCKETKV on top of a stock attention backend: what CPUs and GPUs have in common.

Prompts run through the stock kernels, exactly and densely. In the step that completes a prompt,
each layer compacts it into the request's private tail; from then on the request's rows are split
off and served by the sparse decode kernel, whatever else is in the batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec

from vllm_sparse import metrics
from vllm_sparse.backends.base import SparseBackend, ask_for_prompt_lengths, withdraw
from vllm_sparse.backends.guard import check_layer
from vllm_sparse.config import RocketKVSettings, load_settings
from vllm_sparse.errors import UnsupportedError
from vllm_sparse.kv.spec import RocketKVSpec
from vllm_sparse.kv.tail.compaction import QueryParking
from vllm_sparse.kv.tail.retention import RetentionRule
from vllm_sparse.steps.tail import PromptEnd, SparseRows, StepMetadata, StepPlanner
from vllm_sparse.upload import upload

if TYPE_CHECKING:
    from vllm.v1.attention.backend import CommonAttentionMetadata

    from vllm_sparse.kernels.dispatch import DecodeKernel
    from vllm_sparse.kernels.layout import PageLayout
    from vllm_sparse.kernels.reference.rows import Rows

# A child of vLLM's logger: others have no handler in its processes.
logger = init_logger("vllm.sparse.rocketkv")


class RocketKVBackend(SparseBackend):
    """Goes before the stock backend that serves dense tokens."""

    # Set by the first layer that is built: customize_spec gets nothing but the spec, and is called
    # outside vLLM's config context.
    _settings: ClassVar[RocketKVSettings | None] = None
    _group_size: ClassVar[int] = 1
    _max_model_len: ClassVar[int] = 0
    _instance_id: ClassVar[str] = ""

    @staticmethod
    def get_name() -> str:
        """The registered name."""
        return "ROCKETKV"

    @classmethod
    def remember(cls, config: VllmConfig, group_size: int) -> RocketKVSettings:
        """Keep what :meth:`customize_spec` will need.

        Args:
            config: vLLM's configuration.
            group_size: Query heads per KV head.

        Returns:
            The settings.
        """
        settings = load_settings(config.additional_config, "rocketkv")
        RocketKVBackend._settings = settings
        RocketKVBackend._group_size = group_size
        RocketKVBackend._max_model_len = config.model_config.max_model_len
        RocketKVBackend._instance_id = config.instance_id
        return settings

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Attach the retention rule and the extrema's bytes to full-attention specs."""
        if not isinstance(spec, FullAttentionSpec) or isinstance(spec, RocketKVSpec):
            return spec
        settings = cls._settings
        assert settings is not None, "a ROCKETKV layer is built before its spec is asked for"
        block_size, smallest = spec.block_size, min(settings.page_sizes)
        if block_size > 1:  # vLLM probes sizes with a block of one token
            _check_block_size(settings, block_size, cls._group_size)
        if 2 * spec.head_size % smallest:
            raise UnsupportedError(
                f"head size {spec.head_size} does not divide into page_sizes={smallest}"
            )
        rule = RetentionRule(
            **settings.model_dump(
                include={
                    "token_budget",
                    "window",
                    "page_sizes",
                    "min_context",
                    "generation_reserve",
                    "stage1",
                    "stage2",
                }
            ),
            head_dim=spec.head_size,
            group_size=cls._group_size,
            block_size=block_size,
            max_model_len=cls._max_model_len,
        )
        return RocketKVSpec.wrap(spec, rule, cls._instance_id)


def _check_block_size(settings: RocketKVSettings, block_size: int, group_size: int) -> None:
    if block_size % max(settings.page_sizes):
        raise UnsupportedError(
            f"--block-size {block_size} is not a multiple of the largest of "
            f"page_sizes={list(settings.page_sizes)}; pages may not straddle blocks"
        )
    if 2 * (block_size // min(settings.page_sizes)) < group_size:
        raise UnsupportedError(
            f"--block-size {block_size} is too small for {group_size} query heads per KV head with "
            f"page_sizes={list(settings.page_sizes)}: window queries that wait for the next chunk "
            "need room in a block. Raise --block-size"
        )


class RocketKVPlanning:
    """Goes before the stock metadata builder: plans every step once for all layers of the group."""

    block_size: int
    device: torch.device

    def __init__(
        self,
        kv_cache_spec: RocketKVSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        withdraw(vllm_config)
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)  # type: ignore[call-arg]
        self.settings = load_settings(vllm_config.additional_config, "rocketkv")
        self.rule = kv_cache_spec.rule
        _check_block_size(self.settings, self.block_size, self.rule.group_size)
        if self.rule.block_size != self.block_size:
            raise UnsupportedError(
                f"vLLM changed the block size from {self.rule.block_size} to "
                f"{self.block_size} to give all layers of this model pages of one size. Choose a "
                f"--block-size that it keeps, for example {self.block_size}"
            )
        self.planner = StepPlanner(self.rule, self.settings.token_budget // 2)
        ask_for_prompt_lengths(vllm_config)

        context = vllm_config.compilation_config.static_forward_context
        self.layers = [context[name] for name in layer_names]
        for name, layer in zip(layer_names, self.layers, strict=True):
            layer.impl.prepare(layer, kv_cache_spec, extract_layer_index(name), device)
        counters = metrics.counters()
        if vllm_config.parallel_config.rank == 0:
            # Every rank does the same; one of them speaks.
            counters.publish_to(metrics.folder(vllm_config.instance_id))
            kernel = self.layers[0].impl.kernel
            logger.info_once(_start_line(self.settings, kv_cache_spec, vllm_config, kernel))

    def split(
        self, common: CommonAttentionMetadata, seq_lens: Tensor, prompt_lens: Tensor
    ) -> StepMetadata:
        """Split the batch into dense tokens, ending prompts and sparse decode tokens.

        Args:
            common: The batch.
            seq_lens: Tokens of each row after the step, on the host, ``[R]``.
            prompt_lens: Prompt tokens of each row's request, on the host, ``[R]``.
        """
        rows = common.num_reqs
        device = common.block_table_tensor.device

        def dense(rows: Tensor | None, tokens: Tensor | None, lens: Tensor | None) -> Any:
            part = common
            if rows is not None:
                assert tokens is not None
                assert lens is not None
                start = torch.searchsorted(tokens, common.query_start_loc_cpu[:-1].long()[rows])
                start = torch.cat((start, torch.tensor([len(tokens)]))).int()
                part = common.replace(
                    query_start_loc=upload(start, device),
                    query_start_loc_cpu=start,
                    seq_lens=upload(lens, device),
                    num_reqs=len(rows),
                    num_actual_tokens=len(tokens),
                    max_query_len=int(start.diff().max()),
                    max_seq_len=int(lens.max()),
                    block_table_tensor=common.block_table_tensor[upload(rows, device)],
                    slot_mapping=common.slot_mapping[upload(tokens, device)],
                )
            return super(RocketKVPlanning, self).build(0, part)  # type: ignore[misc]

        return self.planner.split(
            common.query_start_loc_cpu[: rows + 1],
            seq_lens,
            prompt_lens,
            common.block_table_tensor[:rows],
            dense,
            metrics.counters().add,
        )


def _start_line(
    settings: RocketKVSettings, spec: RocketKVSpec, config: VllmConfig, kernel: DecodeKernel
) -> str:
    longest = config.model_config.max_model_len
    retention = spec.rule(longest)
    held = -(-longest // spec.block_size)
    stages = "+".join(name for name in ("stage1", "stage2") if getattr(settings, name))
    note = f" (slow: {kernel.note.splitlines()[0]})" if kernel.note else ""
    return (
        f"ROCKETKV: {stages}, token budget {settings.token_budget}, block size {spec.block_size}, "
        f"prompts above {max(settings.min_context, settings.window)} tokens compressed; a prompt "
        f"of {longest} tokens keeps {held - retention.dropped_blocks} of {held} blocks; "
        f"key extrema take {100 // (min(settings.page_sizes) + 1)}% of each block; "
        f"decode kernel: {kernel.name}{note}"
    )


class RocketKVLayer:
    """Goes before a stock implementation: one layer's dense attention, compaction, sparse decode.

    Attributes:
        kernel: The sparse decode kernel.
    """

    kernel: DecodeKernel
    scale: float

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        check_layer(
            alibi_slopes=alibi_slopes,
            sinks=sinks,
            logits_soft_cap=logits_soft_cap,
            attn_type=attn_type,
            kv_sharing_target_layer_name=kv_sharing_target_layer_name,
        )
        super().__init__(
            num_heads,
            head_size,
            scale,
            num_kv_heads,
            alibi_slopes,
            sliding_window,
            kv_cache_dtype,
            logits_soft_cap,
            attn_type,
            kv_sharing_target_layer_name,
            sinks,
        )  # type: ignore[call-arg]
        self._group_size = num_heads // num_kv_heads
        self.settings = RocketKVBackend.remember(get_current_vllm_config(), self._group_size)
        self.top_k = self.settings.token_budget // 2

    def prepare(
        self, layer: Any, spec: RocketKVSpec, layer_index: int, device: torch.device
    ) -> None:
        """Called by the builder once the block size is final.

        Args:
            layer: The attention layer.
            spec: The layer's KV cache spec.
            layer_index: Position of the layer in the model.
            device: Where the layer computes.
        """
        skipped = layer_index < self.settings.skip_layers
        self.read_all = skipped or not self.settings.stage2
        if self._group_size != spec.rule.group_size:
            raise UnsupportedError(
                f"layers with {self._group_size} and {spec.rule.group_size} query heads per "
                "KV head share a cache layout; ROCKETKV needs one ratio for the whole model"
            )
        self.layouts: dict[int, PageLayout] = {
            size: spec.layout(size) for size in spec.rule.page_sizes
        }
        self.stock_layout = self.layouts[min(self.layouts)]
        self.parking = QueryParking(self.stock_layout, spec.rule.group_size)

    def compact(self, cache: Tensor, prompt: PromptEnd, window: Tensor) -> None:
        """Stage 1 for one prompt.

        Args:
            cache: ``[blocks, G, block_size, C]``.
            prompt: The prompt.
            window: Post-RoPE queries of its last tokens, ``[w, H, D]``.
        """
        raise NotImplementedError

    def attend_rows(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        rows: Rows,
        output: Tensor,
    ) -> None:
        """Attend a batch of single tokens that was planned on the device; only GPUs have such.

        Args:
            query: ``[tokens, H, D]``; as for the others, padding may follow the rows.
            key: ``[tokens, G, D]``.
            value: ``[tokens, G, D]``.
            kv_cache: ``[blocks, G, block_size, C]``.
            rows: The rows.
            output: Written, ``[tokens, H, D]``.
        """
        raise NotImplementedError

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
        """Attend one step.

        Args:
            layer: The attention layer.
            query: Post-RoPE queries, ``[tokens, H, D]``.
            key: ``[tokens, G, D]``.
            value: ``[tokens, G, D]``.
            kv_cache: ``[blocks, G, block_size, C]``.
            attn_metadata: The step; ``None`` while vLLM profiles.
            output: Written, ``[tokens, H, D]``.
            output_scale: Not supported.
            output_block_scale: Not supported.

        Returns:
            ``output``.
        """
        step = attn_metadata
        if step is None:
            self.reserve(query.device)
            return output.fill_(0)  # what follows may not take NaN
        if step.rows is not None:
            self.attend_rows(query, key, value, kv_cache, step.rows, output)
            return output
        if step.dense is not None:
            pages = self.stock_layout.tokens(kv_cache)
            index = step.dense_index
            if index is None:
                parts = query, key, value, output
            else:
                parts = query[index], key[index], value[index], torch.empty_like(query[index])
            stock: Any = super()
            stock.do_kv_cache_update(layer, parts[1], parts[2], pages, step.dense.slot_mapping)
            stock.forward(
                layer, *parts[:3], pages, step.dense, parts[3], output_scale, output_block_scale
            )
            if index is not None:
                output[index] = parts[3]
            for prompt in step.prompts:
                self._end_prompt(kv_cache, query, prompt)
        for rows in step.sparse:
            self._decode(query, key, value, kv_cache, rows, output)
        return output

    def reserve(self, device: torch.device) -> None:
        """Take as much memory as a step may need, and give it back: vLLM measures the peak."""

    def _end_prompt(self, cache: Tensor, query: Tensor, prompt: PromptEnd) -> None:
        tail = prompt.blocks[prompt.dropped_blocks :]
        window = query[prompt.first_token : prompt.last_token]
        if not prompt.complete:
            self.parking.store(cache, tail, prompt.parked, window)
            return
        if prompt.parked:
            window = torch.cat((self.parking.load(cache, tail, prompt.parked), window))
        self.compact(cache, prompt, window)

    def _decode(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cache: Tensor,
        rows: SparseRows,
        output: Tensor,
    ) -> None:
        index = rows.token_index
        target = output
        if index is not None:
            query, key, value = query[index], key[index], value[index]
            target = torch.empty_like(query)
        else:
            count = len(rows.lengths)
            query, key, value, target = query[:count], key[:count], value[:count], output[:count]
        self.kernel.run(
            cache,
            query,
            key,
            value,
            target,
            rows.block_table,
            rows.lengths,
            rows.final_lengths,
            rows.top_r,
            layout=self.layouts[rows.page_size],
            top_k=self.top_k,
            scale=self.scale,
            read_all=self.read_all,
        )
        if index is not None:
            output[index] = target
