# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The SPARDA attention backend: KV blocks live on the host, layers fetch what they read.

vLLM's own cache tensor holds only the compressed keys; its block ids address the host pool. Rows
that decode one token read the frames of the device slab; everything else (prompt chunks, and the
replay of a preempted request) streams its earlier blocks back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionImpl, AttentionMetadataBuilder, MultipleOf
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec

from vllm_sparse import metrics
from vllm_sparse.backends.base import SparseBackend, ask_for_prompt_lengths, prompt_lengths
from vllm_sparse.backends.guard import check_layer
from vllm_sparse.backends.sparda_metadata import DecodeRows, PromptRow, SpardaPlanner, SpardaStep
from vllm_sparse.backends.sparda_prompt import attend_prompt
from vllm_sparse.config import SpardaSettings, load_settings
from vllm_sparse.errors import UnsupportedError
from vllm_sparse.kernels.dispatch import PagingKernels, attend_part, sparda_paging
from vllm_sparse.kernels.reference.selection import Blocks, gather_windows
from vllm_sparse.kv.geometry import GIB, Geometry, plan_frames
from vllm_sparse.kv.pager import Pager
from vllm_sparse.kv.spec import SpardaSpec
from vllm_sparse.policies.sparda import select_blocks
from vllm_sparse.prefetch.engine import ThreadCopyEngine
from vllm_sparse.prefetch.scheduler import PrefetchScheduler
from vllm_sparse.prefetch.selectors import (
    ForecastSelector,
    PreviousSelector,
    QuerySelector,
    Selector,
    Tokens,
)
from vllm_sparse.prefetch.stream import PromptStream

if TYPE_CHECKING:
    from vllm.v1.attention.backend import CommonAttentionMetadata

# A child of vLLM's logger: others have no handler in its processes.
logger = init_logger("vllm.sparse.sparda")

# Query tokens whose window scores exist at the same time.
_SCORED_AT_ONCE = 128
_STEPS_PER_GAUGE = 32


class SpardaBackend(SparseBackend):
    """Entry point that vLLM resolves ``--attention-backend SPARDA`` to."""

    _missing_on_gpus: ClassVar[str] = "copy engine and kernels"

    # Set by the first layer that is built: customize_spec gets nothing but the spec, and is called
    # outside vLLM's config context.
    _settings: ClassVar[SpardaSettings | None] = None
    _instance_id: ClassVar[str] = ""

    @staticmethod
    def get_name() -> str:
        """The registered name."""
        return "SPARDA"

    @staticmethod
    def get_impl_cls() -> type[SpardaImpl]:
        """The attention implementation."""
        return SpardaImpl

    @staticmethod
    def get_builder_cls() -> type[SpardaMetadataBuilder]:
        """The metadata builder."""
        return SpardaMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        """Any: start-up makes vLLM use the block size of the settings."""
        return [MultipleOf(1)]

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Let vLLM allocate compressed keys instead of keys and values."""
        if not isinstance(spec, FullAttentionSpec) or isinstance(spec, SpardaSpec):
            return spec
        assert cls._settings is not None, "a SPARDA layer is built before its spec is asked for"
        return SpardaSpec.wrap(spec, cls._settings, cls._instance_id)


@dataclass
class _Runtime:
    """What all layers of one worker share."""

    settings: SpardaSettings
    pager: Pager
    kernels: PagingKernels
    scheduler: PrefetchScheduler
    stream: PromptStream
    selector: Selector
    layers: list[Any]

    def compressed(self, layer: int) -> Tensor:
        """A layer's compressed keys, ``[blocks, G, windows per block, D]``, a view."""
        geometry = self.pager.geometry
        cache: Tensor = self.layers[layer].kv_cache
        return cache.view(geometry.num_blocks, geometry.num_kv_heads, -1, geometry.head_dim)


class SpardaMetadataBuilder(AttentionMetadataBuilder[SpardaStep]):
    """Sets the worker up, and plans every step once for all layers."""

    def __init__(
        self,
        kv_cache_spec: SpardaSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        settings = load_settings(vllm_config.additional_config, "sparda")
        spec, context = kv_cache_spec, vllm_config.compilation_config.static_forward_context
        num_blocks = vllm_config.cache_config.num_gpu_blocks_override
        names = sorted(layer_names, key=extract_layer_index)
        layers = [context[name] for name in names]
        _check_layers(vllm_config, settings, spec, layers)
        pieces = num_blocks * spec.num_kv_heads
        geometry = Geometry(
            len(layers),
            num_blocks,
            spec.num_kv_heads,
            spec.block_size,
            spec.head_size,
            spec.dtype.itemsize,
            plan_frames(
                settings,
                num_layers=len(layers),
                num_pieces=pieces,
                num_kv_heads=spec.num_kv_heads,
                piece_bytes=spec.block_size * 2 * spec.head_size * spec.dtype.itemsize,
                max_num_seqs=vllm_config.scheduler_config.max_num_seqs,
                max_model_len=vllm_config.model_config.max_model_len,
            ),
        )
        kernels = sparda_paging(device.type)
        counters = metrics.counters()
        pager = Pager(geometry, spec.dtype, kernels, settings.poison)
        engine = ThreadCopyEngine(kernels.copy_pieces, settings.link_gb_per_s)
        prefetch = settings.prefetch
        self._planner = SpardaPlanner(settings, num_blocks, counters.add)
        self.runtime = _Runtime(
            settings,
            pager,
            kernels,
            PrefetchScheduler(pager, engine, counters.add, prefetch),
            PromptStream(pager, engine, settings.staging_blocks, counters.add, prefetch),
            _selector(settings, geometry, spec.dtype, layers),
            layers,
        )
        for number, layer in enumerate(layers):
            layer.impl.prepare(self.runtime, number)
        ask_for_prompt_lengths(vllm_config)
        counters.publish_to(metrics.folder(vllm_config.instance_id))
        counters.set_gauge("host_pool_bytes", geometry.host_bytes)
        counters.set_gauge("slab_bytes", geometry.slab_bytes)
        counters.set_gauge("slab_frames", sum(geometry.frames))
        self._steps = 0
        if vllm_config.parallel_config.rank == 0:
            logger.info_once(_start_line(self.runtime, vllm_config))

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> SpardaStep:
        """Plan one step."""
        common = common_attn_metadata
        rows = common.num_reqs
        if self._steps % _STEPS_PER_GAUGE == 0:
            in_use = self.runtime.pager.frames_in_use()
            metrics.counters().set_gauge("slab_frames_in_use", in_use)
        self._steps += 1
        return self._planner.plan(
            common.query_start_loc_cpu[: rows + 1],
            common.seq_lens[:rows].cpu(),
            prompt_lengths(common),
            common.block_table_tensor[:rows].cpu(),
        )


def _check_layers(
    config: VllmConfig, settings: SpardaSettings, spec: SpardaSpec, layers: list[Any]
) -> None:
    if spec.block_size != settings.block_size:
        raise UnsupportedError(
            f"vLLM chose blocks of {spec.block_size} tokens, but vllm_sparse.block_size is "
            f"{settings.block_size}"
        )
    expected = config.model_config.get_num_layers(config.parallel_config)
    if len(layers) != expected:
        raise UnsupportedError(
            f"{len(layers)} of {expected} layers have one kind of attention and one size of KV "
            "heads; SPARDA looks from each layer to the next and needs them all alike"
        )


def _selector(
    settings: SpardaSettings, geometry: Geometry, dtype: torch.dtype, layers: list[Any]
) -> Selector:
    kind, impl = settings.chosen_selector, layers[0].impl
    if kind == "query":
        return QuerySelector(settings.kernel_stride, impl.scale)
    if kind == "previous":
        shape = (geometry.num_layers, geometry.num_blocks, impl.num_heads, geometry.head_dim)
        return PreviousSelector(
            settings.kernel_stride, impl.scale, shape, dtype, geometry.block_size
        )
    missing = [layer.layer_name for layer in layers[:-1] if not hasattr(layer, "sparda_tap")]
    if missing:
        raise UnsupportedError(
            f"selector {kind} needs a projection beside qkv_proj, which these layers lack: "
            f"{', '.join(missing)}. Choose selector query or previous"
        )
    return ForecastSelector([getattr(layer, "sparda_tap", None) for layer in layers])


def _start_line(runtime: _Runtime, config: VllmConfig) -> str:
    settings, geometry = runtime.settings, runtime.pager.geometry
    ranks = config.parallel_config.tensor_parallel_size
    ahead = runtime.selector.ahead
    mode = "a layer ahead" if ahead and settings.prefetch else "when a layer runs"
    if settings.resident:
        mode = "never (resident)"
    note = f" (slow: {runtime.kernels.note.splitlines()[0]})" if runtime.kernels.note else ""
    total = f" per rank, {geometry.host_bytes * ranks / GIB:.2f} GiB in total" if ranks > 1 else ""
    tokens = (geometry.num_blocks - 1) * geometry.block_size
    return (
        f"SPARDA: selector {settings.chosen_selector}, {settings.blocks_read} blocks of "
        f"{geometry.block_size} tokens per KV head ({settings.init_blocks} first, "
        f"{settings.local_blocks} + 1 last), dense up to {settings.dense_len} tokens, prompts "
        f"{'sparse' if settings.sparse_prefill else 'dense'}; host pool "
        f"{geometry.host_bytes / GIB:.2f} GiB{total} for {geometry.num_blocks - 1} blocks = "
        f"{tokens} tokens; device slab {geometry.slab_bytes / GIB:.3f} GiB, "
        f"{geometry.frames[-1]} frames a layer, staging {runtime.stream.nbytes / GIB:.3f} GiB; "
        f"fetched {mode}; kernels: {runtime.kernels.name}{note}"
    )


class SpardaImpl(AttentionImpl[SpardaStep]):
    """One layer."""

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
        self.num_heads = num_heads
        self.head_size = head_size
        self.num_kv_heads = num_kv_heads
        self.scale = float(scale)
        config = get_current_vllm_config()
        SpardaBackend._settings = load_settings(config.additional_config, "sparda")
        SpardaBackend._instance_id = config.instance_id

    def prepare(self, runtime: _Runtime, layer: int) -> None:
        """Called by the builder once the cache's size is final.

        Args:
            runtime: Shared by all layers.
            layer: Position of the layer in the model.
        """
        self._runtime = runtime
        self._layer = layer
        self._pager = runtime.pager.layers[layer]
        self._last = layer + 1 == len(runtime.layers)
        settings = runtime.settings
        self._blocks = Blocks(
            settings.block_size,
            settings.kernel_stride,
            settings.init_blocks,
            settings.local_blocks,
            settings.blocks_read,
        )
        self._attend_part = attend_part(runtime.pager.host.device.type)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: SpardaStep | None,
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
            kv_cache: Compressed keys, ``[blocks, G, 1, windows per block * D]``.
            attn_metadata: The step; ``None`` while vLLM profiles.
            output: Written, ``[tokens, H, D]``.
            output_scale: Not supported.
            output_block_scale: Not supported.

        Returns:
            ``output``.
        """
        step = attn_metadata
        if step is None:
            return output
        runtime, pager = self._runtime, self._pager
        if self._layer == 0:
            runtime.scheduler.begin_step()
            runtime.stream.begin_step(step.tiles)
        query = query[: step.num_tokens]
        rows = torch.cat((key, value), -1)[: step.num_tokens]
        pager.write_host(step.slots, rows)
        metrics.counters().add("device_to_host_bytes", rows.nbytes)
        self._compress(step)
        if pager.resident:
            pager.write_frames(step.slots, rows)
        elif len(step.prompt_blocks):
            pager.drop(step.prompt_blocks)
        if step.decode is not None:
            self._decode(query, rows, step, step.decode, output)
        for prompt in step.prompts:
            self._prompt(query, rows, step, prompt, output)
        runtime.selector.record(self._layer, query, step.slots, step.last_in_block)
        return output

    def _compress(self, step: SpardaStep) -> None:
        """Add the windows that this step completes; they may reach into earlier blocks."""
        if not len(step.window_slots):
            return
        size = self._pager.block_size
        block, offset = step.window_tokens // size, step.window_tokens % size
        keys = self._pager.host[block, :, offset, : self.head_size]
        compressed = self._runtime.compressed(self._layer)
        per_block = compressed.shape[2]
        compressed[step.window_slots // per_block, :, step.window_slots % per_block] = (
            keys.float().mean(1).to(compressed.dtype)
        )

    def _decode(
        self, query: Tensor, rows: Tensor, step: SpardaStep, decode: DecodeRows, output: Tensor
    ) -> None:
        runtime = self._runtime
        ahead = runtime.selector.ahead
        if self._layer == 0 or not ahead:
            blocks = self._choose(self._layer, decode, query)
            runtime.scheduler.announce(self._layer, blocks, ahead=False)
        if ahead and not self._last:
            blocks = self._choose(self._layer + 1, decode, None)
            runtime.scheduler.announce(self._layer + 1, blocks, ahead=True)
        frames = runtime.scheduler.take(self._layer)
        index = decode.tokens.index
        if not self._pager.resident:
            self._pager.write_frames(step.slots[index], rows[index])
        attended = torch.empty_like(query[index])
        runtime.kernels.attend_frames(
            self._pager.slab, query[index], attended, frames, decode.lengths, self.scale
        )
        output[index] = attended

    def _choose(self, layer: int, decode: DecodeRows, query: Tensor | None) -> Tensor:
        """Physical blocks that decode rows read in a layer, ``[R, G, K]``."""
        table = decode.block_table
        everything = torch.arange(decode.width)
        own = decode.tokens.positions // self._pager.block_size
        everything = torch.where(everything <= own[:, None], everything, -1)
        logical = everything.unsqueeze(1).expand(-1, self.num_kv_heads, -1)
        if decode.scored:
            selector = self._runtime.selector
            vectors = selector.vectors(layer, decode.tokens, query)
            positions = decode.tokens.positions
            compressed = self._runtime.compressed(layer)
            if selector.ranking is not None:
                chosen = self._runtime.kernels.select_blocks(
                    compressed, vectors, table, positions, selector.ranking, self._blocks
                )
            else:
                keys = gather_windows(compressed, table)
                scores = selector.scores(vectors.unsqueeze(2), keys, positions[:, None])
                chosen = self._best(scores, positions[:, None]).squeeze(2)
            missing = decode.width - chosen.shape[-1]
            chosen = torch.nn.functional.pad(chosen, (0, max(missing, 0)), value=-1)
            chosen = chosen[..., : decode.width]
            logical = torch.where(decode.everything[:, None, None], logical, chosen)
        physical = table.unsqueeze(1).expand(-1, self.num_kv_heads, -1)
        return torch.where(logical < 0, -1, physical.gather(2, logical.clamp(min=0)))

    def _best(self, scores: Tensor, positions: Tensor) -> Tensor:
        return select_blocks(scores, positions, **self._blocks._asdict())

    def _prompt(
        self, query: Tensor, rows: Tensor, step: SpardaStep, prompt: PromptRow, output: Tensor
    ) -> None:
        stream, settings = self._runtime.stream, self._runtime.settings
        here = slice(prompt.begin, prompt.end)
        chosen = None
        if prompt.sparse_from < prompt.end - prompt.begin:
            chosen = self._choose_prompt(query, prompt)
        output[here] = attend_prompt(
            query[here],
            rows[here],
            ((step.tiles[i], stream.read(self._layer, i)) for i in range(*prompt.tiles)),
            prompt.start,
            prompt.sparse_from,
            chosen,
            block_size=settings.block_size,
            tile_tokens=settings.staging_blocks * settings.block_size,
            attend_part=self._attend_part,
            scale=self.scale,
        )

    def _choose_prompt(self, query: Tensor, prompt: PromptRow) -> Tensor:
        """Blocks that the sparse tokens of a row read, bool ``[G, T, blocks]``."""
        selector = self._runtime.selector
        tokens = prompt.tokens[slice(prompt.sparse_from, None)]
        keys = gather_windows(self._runtime.compressed(self._layer), prompt.blocks)
        count = len(tokens.positions)
        chosen = torch.zeros(self.num_kv_heads, count, len(prompt.blocks) + 1, dtype=torch.bool)
        for first in range(0, count, _SCORED_AT_ONCE):
            part: Tokens = tokens[slice(first, first + _SCORED_AT_ONCE)]
            vectors = selector.vectors(self._layer, part, query).transpose(0, 1)
            scores = selector.scores(vectors, keys, part.positions)
            blocks = self._best(scores, part.positions)
            # -1 marks the column beyond the last block, which is cut off.
            chosen[:, first : first + _SCORED_AT_ONCE].scatter_(2, blocks % chosen.shape[2], True)
        return chosen[..., :-1]
