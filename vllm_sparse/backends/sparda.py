# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""SPARDA, what CPUs and GPUs have in common: KV blocks on the host, layers fetch what they read.

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
from vllm_sparse.backends.base import SparseBackend, ask_for_prompt_lengths
from vllm_sparse.backends.refusals import check_layer
from vllm_sparse.config import SpardaSettings, load_settings
from vllm_sparse.errors import UnsupportedError
from vllm_sparse.kernels.reference.selection import Blocks, gather_windows
from vllm_sparse.kv.host.geometry import GIB, Geometry, plan_frames
from vllm_sparse.kv.spec import SpardaSpec
from vllm_sparse.policies.selectors import (
    ForecastSelector,
    PreviousSelector,
    QuerySelector,
    Selector,
    Tokens,
)
from vllm_sparse.policies.sparda import select_blocks
from vllm_sparse.steps.host import PromptRow, SpardaPlanner, SpardaStep
from vllm_sparse.steps.host_prompt import attend_prompt

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm_sparse.kv.host.pager import Pager
    from vllm_sparse.prefetch.stream import PromptStream

# A child of vLLM's logger: others have no handler in its processes.
logger = init_logger("vllm.sparse.sparda")

# The null block, and one more.
_BLOCKS_TO_PROFILE = 2

# Query tokens whose window scores exist at the same time.
_SCORED_AT_ONCE = 128


class SpardaBackend(SparseBackend):
    """Goes before a stock backend, of which only what it supports is used."""

    # Set by the first layer that is built: customize_spec gets nothing but the spec, and is called
    # outside vLLM's config context.
    _settings: ClassVar[SpardaSettings | None] = None
    _instance_id: ClassVar[str] = ""

    @staticmethod
    def get_name() -> str:
        """The registered name."""
        return "SPARDA"

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
class Runtime:
    """What all layers of one worker share.

    Attributes:
        settings: The settings.
        pager: Blocks and frames.
        stream: Earlier blocks of prompts, on their way back.
        selector: Chooses blocks.
        layers: vLLM's attention layers, in order.
        attend_part: Attention of prompts; see
            :func:`vllm_sparse.kernels.reference.sparda_steps.attend_part`.
        kernels_name: Which kernels serve decode, for the start-up line.
        kernels_note: Why they are slow, if they are.
    """

    settings: SpardaSettings
    pager: Pager
    stream: PromptStream
    selector: Selector
    layers: list[Any]
    attend_part: Callable[..., tuple[Tensor, Tensor]]
    kernels_name: str
    kernels_note: str

    def compressed(self, layer: int) -> Tensor:
        """A layer's compressed keys, ``[blocks, G, windows per block, D]``, a view."""
        geometry = self.pager.geometry
        cache: Tensor = self.layers[layer].kv_cache
        return cache.view(len(cache), geometry.num_kv_heads, -1, geometry.head_dim)


class SpardaBuilder(AttentionMetadataBuilder[SpardaStep]):
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
        # Unknown while vLLM estimates the memory of CUDA graphs, with a cache that it throws away:
        # all rows of what is captured for that have empty block tables.
        serving = vllm_config.cache_config.num_gpu_blocks
        num_blocks = serving or _BLOCKS_TO_PROFILE
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
        counters = metrics.counters()
        self.planner = SpardaPlanner(settings, num_blocks, counters.add)
        self.runtime = self.set_up(settings, geometry, spec.dtype, layers, device)
        for number, layer in enumerate(layers):
            layer.impl.prepare(self.runtime, number)
        ask_for_prompt_lengths(vllm_config)
        counters.publish_to(metrics.folder(vllm_config.instance_id))
        counters.set_gauge("host_pool_bytes", geometry.host_bytes)
        counters.set_gauge("slab_bytes", geometry.slab_bytes)
        counters.set_gauge("slab_frames", sum(geometry.frames))
        if vllm_config.parallel_config.rank == 0 and serving:
            logger.info_once(_start_line(self.runtime, vllm_config))

    def set_up(
        self,
        settings: SpardaSettings,
        geometry: Geometry,
        dtype: torch.dtype,
        layers: list[Any],
        device: torch.device,
    ) -> Runtime:
        """Allocate the host pool and the slab, and start what copies between them."""
        raise NotImplementedError


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


def make_selector(
    settings: SpardaSettings,
    geometry: Geometry,
    dtype: torch.dtype,
    layers: list[Any],
    record: Callable[..., None],
    view: Callable[[Tensor], Tensor] | None = None,
) -> Selector:
    """What chooses blocks in these layers.

    Args:
        settings: The settings.
        geometry: Sizes.
        dtype: Of keys and queries.
        layers: vLLM's attention layers, in order.
        record: See :func:`vllm_sparse.kernels.reference.sparda_steps.record_queries`.
        view: Pins host memory and returns it as a GPU sees it.

    Raises:
        UnsupportedError: It needs a projection that the layers lack.
    """
    kind, impl = settings.chosen_selector, layers[0].impl
    if kind == "query":
        return QuerySelector(settings.kernel_stride, impl.scale)
    if kind == "previous":
        shape = (geometry.num_layers, geometry.num_blocks, impl.num_heads, geometry.head_dim)
        kept = torch.empty(shape, dtype=dtype, device="cpu")
        return PreviousSelector(
            settings.kernel_stride,
            impl.scale,
            view(kept) if view else kept,
            geometry.block_size,
            record,
        )
    missing = [layer.layer_name for layer in layers[:-1] if not hasattr(layer, "sparda_tap")]
    if missing:
        raise UnsupportedError(
            f"selector {kind} needs a projection beside qkv_proj, which these layers lack: "
            f"{', '.join(missing)}. Choose selector query or previous"
        )
    return ForecastSelector([getattr(layer, "sparda_tap", None) for layer in layers])


def _start_line(runtime: Runtime, config: VllmConfig) -> str:
    settings, geometry = runtime.settings, runtime.pager.geometry
    ranks = config.parallel_config.tensor_parallel_size
    ahead = runtime.selector.ahead
    mode = "a layer ahead" if ahead and settings.prefetch else "when a layer runs"
    if all(geometry.is_resident(layer) for layer in range(geometry.num_layers)):
        mode = "never, as every block has a frame"
        if not settings.resident:
            mode += (
                f" (--max-num-seqs {config.scheduler_config.max_num_seqs} may need them all; lower "
                "it, or set slab_gib, to keep fewer on the device)"
            )
    note = f" (slow: {runtime.kernels_note.splitlines()[0]})" if runtime.kernels_note else ""
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
        f"fetched {mode}; kernels: {runtime.kernels_name}{note}"
    )


class SpardaLayer(AttentionImpl[SpardaStep]):
    """One layer; how it decodes depends on the device."""

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

    def prepare(self, runtime: Runtime, layer: int) -> None:
        """Called by the builder once the cache's size is final.

        Args:
            runtime: Shared by all layers.
            layer: Position of the layer in the model.
        """
        self.runtime = runtime
        self.layer = layer
        self.pager = runtime.pager.layers[layer]
        self.last = layer + 1 == len(runtime.layers)
        settings = runtime.settings
        self.blocks = Blocks(
            settings.block_size,
            settings.kernel_stride,
            settings.init_blocks,
            settings.local_blocks,
            settings.blocks_read,
        )

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
        if attn_metadata is None:
            return output.fill_(0)  # what follows may not take NaN
        count = attn_metadata.num_tokens
        self.attend(query[:count], key[:count], value[:count], attn_metadata, output)
        return output

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, step: SpardaStep, output: Tensor
    ) -> None:
        """Attend one step, without its padding; arguments as in :meth:`forward`."""
        raise NotImplementedError

    def compress(self, key: Tensor, step: SpardaStep) -> None:
        """Add the windows that this step completes; they may reach into earlier blocks.

        Args:
            key: Of this step's tokens, ``[tokens, G, D]``.
            step: The step.
        """
        if not len(step.window_slots):
            return
        size = self.pager.block_size
        block, offset = step.older_slots // size, step.older_slots % size
        older = self.pager.host[block, :, offset, : self.head_size]
        keys = torch.cat((key.to(older.dtype), older))[step.window_tokens]
        compressed = self.runtime.compressed(self.layer)
        per_block = compressed.shape[2]
        compressed[step.window_slots // per_block, :, step.window_slots % per_block] = (
            keys.float().mean(1).to(compressed.dtype)
        )

    def attend_prompts(self, query: Tensor, rows: Tensor, step: SpardaStep, output: Tensor) -> None:
        """Attend the rows that stream their earlier blocks.

        Args:
            query: ``[tokens, H, D]``.
            rows: Keys and values of the step, ``[tokens, G, 2 * D]``.
            step: The step.
            output: Written, ``[tokens, H, D]``.
        """
        stream, settings = self.runtime.stream, self.runtime.settings
        for prompt in step.prompts:
            here = slice(prompt.begin, prompt.end)
            chosen = None
            if prompt.sparse_from < prompt.end - prompt.begin:
                chosen = self._choose_prompt(query, prompt)
            output[here] = attend_prompt(
                query[here],
                rows[here],
                ((step.tiles[i], stream.read(self.layer, i)) for i in range(*prompt.tiles)),
                prompt.start,
                prompt.sparse_from,
                chosen,
                block_size=settings.block_size,
                tile_tokens=settings.staging_blocks * settings.block_size,
                attend_part=self.runtime.attend_part,
                scale=self.scale,
            )

    def _choose_prompt(self, query: Tensor, prompt: PromptRow) -> Tensor:
        """Blocks that the sparse tokens of a row read, bool ``[G, T, blocks]``."""
        selector = self.runtime.selector
        tokens = prompt.tokens[slice(prompt.sparse_from, None)]
        keys = gather_windows(self.runtime.compressed(self.layer), prompt.blocks)
        count = len(tokens.positions)
        shape = (self.num_kv_heads, count, len(prompt.blocks) + 1)
        chosen = torch.zeros(shape, dtype=torch.bool, device=query.device)
        for first in range(0, count, _SCORED_AT_ONCE):
            part: Tokens = tokens[slice(first, first + _SCORED_AT_ONCE)]
            vectors = selector.vectors(self.layer, part, query).transpose(0, 1)
            scores = selector.scores(vectors, keys, part.positions)
            blocks = self.best(scores, part.positions)
            # -1 marks the column beyond the last block, which is cut off.
            chosen[:, first : first + _SCORED_AT_ONCE].scatter_(2, blocks % chosen.shape[2], True)
        return chosen[..., :-1]

    def best(self, scores: Tensor, positions: Tensor) -> Tensor:
        """See :func:`vllm_sparse.policies.sparda.select_blocks`."""
        return select_blocks(scores, positions, **self.blocks._asdict())
