# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""SPARDA as vLLM sees it: backend, metadata builder, attention implementation.

vLLM's own cache tensor holds only the compressed keys; its block ids address the host pool. Rows
that decode one token read the frames of the device slab; everything else (prompt chunks, and the
replay of a preempted request) streams its earlier blocks back.
"""

from __future__ import annotations

import weakref
from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionImpl, AttentionMetadataBuilder, MultipleOf
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec

from vllm_sparse import metrics
from vllm_sparse.backends.allowed import allowed_requests
from vllm_sparse.backends.asked import FP8_CACHES
from vllm_sparse.backends.base import (
    SparseBackend,
    ask_for_prompt_lengths,
    final_scales,
    holds_prompts,
    is_rehearsal,
    most_rows,
    prompt_lengths,
    rehearsed,
    sequence_lengths,
    warn_of_slow_kernels,
)
from vllm_sparse.backends.controls import controls, replayed, watch_controls
from vllm_sparse.backends.prompts import (
    Newcomers,
    is_warm_up,
    prompt_lengths_on_host,
)
from vllm_sparse.backends.refusals import check_layer, takes_gpu_path
from vllm_sparse.backends.sparda_setup import (
    Machine,
    check_layers,
    geometry_of,
    runtime_of,
    start_line,
)
from vllm_sparse.backends.sparda_warm_up import warm_up
from vllm_sparse.config import load_settings
from vllm_sparse.control import DENSE
from vllm_sparse.features import SPARDA
from vllm_sparse.instance import instance_of
from vllm_sparse.kernels.fp8 import FP8, UNSCALED
from vllm_sparse.kv.spec import SpardaSpec
from vllm_sparse.steps.host import SpardaPlanner
from vllm_sparse.steps.host_layer import Layer
from vllm_sparse.steps.host_rows import RowPlanner
from vllm_sparse.steps.host_step import SpardaStep

if TYPE_CHECKING:
    from torch import Tensor
    from vllm.v1.attention.backend import CommonAttentionMetadata

    from vllm_sparse.control import Allowed
    from vllm_sparse.kv.host.geometry import Geometry
    from vllm_sparse.policies.sparda import SpardaSettings


# A child of vLLM's logger: others have no handler in its processes.
logger = init_logger("vllm.sparse.sparda")

# The null block, and one more.
_BLOCKS_TO_PROFILE = 2

# Between two looks at how many frames are in use.
_STEPS_PER_GAUGE = 32


@dataclass(frozen=True)
class Context:
    """What a backend class has to know of the engine that is being built."""

    settings: SpardaSettings
    instance: str
    dtype: torch.dtype
    allowed: Allowed | None


class SpardaBackend(SparseBackend):
    """What SPARDA tells vLLM of itself on any device."""

    # Set by each layer that is built: customize_spec gets nothing but the spec, and is called
    # outside vLLM's config context.
    _context: ClassVar[Context | None] = None

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        """Any: start-up makes vLLM use the block size of the settings."""
        return [MultipleOf(1)]

    @staticmethod
    def get_impl_cls() -> type[SpardaImpl]:
        """The attention implementation."""
        return SpardaImpl

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Let vLLM allocate compressed keys instead of keys and values."""
        if not isinstance(spec, FullAttentionSpec) or isinstance(spec, SpardaSpec):
            return spec
        assert cls._context is not None, "a SPARDA layer is built before its spec is asked for"
        context = cls._context
        # vLLM takes fp8 for bytes, but compressed keys are of the model's dtype.
        dtype = context.dtype if spec.dtype == torch.uint8 else spec.dtype
        return SpardaSpec.wrap(spec, context.settings, context.instance, dtype, context.allowed)


class SpardaBuilder(AttentionMetadataBuilder[SpardaStep]):
    """Sets the worker up, and plans every step once for all layers."""

    @staticmethod
    @abstractmethod
    def machine(
        config: VllmConfig, settings: SpardaSettings, geometry: Geometry, device: torch.device
    ) -> Machine:
        """What this kind of device brings."""

    def __init__(
        self,
        kv_cache_spec: SpardaSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        settings = load_settings(vllm_config.additional_config, "sparda")
        context = vllm_config.compilation_config.static_forward_context
        # Unknown while vLLM estimates the memory of CUDA graphs, with a cache that it throws away:
        # all rows of what is captured for that have empty block tables.
        serving = vllm_config.cache_config.num_gpu_blocks
        layers = [context[name] for name in sorted(layer_names, key=extract_layer_index)]
        check_layers(vllm_config, settings, kv_cache_spec, layers)
        dtype, fp8 = kv_cache_spec.dtype, layers[0].impl.kv_cache_dtype in FP8_CACHES
        stored = FP8 if fp8 else dtype
        blocks = serving or _BLOCKS_TO_PROFILE
        geometry = geometry_of(
            vllm_config, settings, kv_cache_spec, len(layers), blocks, stored.itemsize
        )
        machine = self.machine(vllm_config, settings, geometry, device)
        # Threads and pinned memory end with the builder: its model runner has gone, or has built
        # another one. When the process ends, the thread ends itself and the driver unpins.
        weakref.finalize(self, machine.close).atexit = False
        counters = metrics.counters()
        fresh = machine.attend_fresh is not None
        self.planner = SpardaPlanner(settings, blocks, counters.add, fresh)
        self._rehearsal = SpardaPlanner(settings, blocks, lambda *_: None, fresh)
        self._newcomers = Newcomers(vllm_config.use_v2_model_runner)
        rows = most_rows(vllm_config)
        self._rows = RowPlanner(settings, rows, device, machine.captured)
        self._steps = 0
        self.runtime = runtime_of(settings, geometry, dtype, stored, layers, machine, rows, device)
        host_bytes = self.runtime.pager.host.nbytes
        self._bytes_per_token = host_bytes // (blocks * geometry.block_size)
        for number, layer in enumerate(layers):
            scales = final_scales(layer, machine.truncates) if fp8 else UNSCALED
            layer.impl.layer = Layer(self.runtime, number, scales)
        longest = vllm_config.model_config.max_model_len
        if serving and device.type == "cuda":  # elsewhere nothing is compiled
            impl, runtime = layers[0].impl, self.runtime
            heads = impl.num_heads, impl.num_kv_heads, impl.head_size
            ranking = runtime.selector.ranking
            seen = settings.model_copy(update={"dense_len": min(settings.dense_len, longest)})
            warm_up(machine.kernels, seen, ranking, runtime.blocks, heads, dtype, device, stored)
        ask_for_prompt_lengths(vllm_config)
        watch_controls(vllm_config)
        speaks = vllm_config.parallel_config.rank == 0
        counters.publish_to(metrics.folder(instance_of(vllm_config).name), SPARDA, speaks=speaks)
        counters.set_gauge("host_pool_bytes", host_bytes)
        counters.set_gauge("slab_bytes", geometry.slab_bytes)
        counters.set_gauge("slab_frames", sum(geometry.frames))
        if speaks and serving:
            warn_of_slow_kernels(machine.kernels.note)
            if settings.dense_len >= longest:
                logger.warning_once(
                    f"SPARDA: all tokens will be attended densely, as dense_len is "
                    f"{settings.dense_len} and --max-model-len {longest}. Lower "
                    "vllm_sparse.dense_len, or leave out --attention-backend"
                )
            logger.info_once(start_line(self.runtime, vllm_config))

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> SpardaStep:
        """Plan one step: single tokens where they are, any other batch on the host."""
        common, count = common_attn_metadata, common_attn_metadata.num_reqs
        self.runtime.poll()
        if self.device.type == "cpu" and self._steps % _STEPS_PER_GAUGE == 0:
            in_use = self.runtime.pager.frames_in_use()
            metrics.counters().set_gauge("slab_frames_in_use", in_use)
        self._steps += 1
        # What only counts may go by the names of requests, which clients may choose.
        rehearsal = is_rehearsal(common)
        counted = not (rehearsal or is_warm_up(common))
        planner = self.planner if counted else self._rehearsal
        if counted:
            tokens = int(common.query_start_loc_cpu[count])
            metrics.counters().add("device_to_host_bytes", tokens * self._bytes_per_token)
        prompts, new, dense = prompt_lengths_on_host(common), False, None
        if not rehearsal:
            new = self._newcomers.arrived()
            asked = controls(common)
            dense = None if asked is None else asked == DENSE
        if common.max_query_len == 1:
            step = self._plan_rows(common, planner, prompts, dense)
            if step is not None:
                return step
        self._rows.forget()
        return planner.plan(
            common.query_start_loc_cpu[: count + 1],
            sequence_lengths(common),
            prompts,
            common.block_table_tensor[:count],
            new,
            dense,
            replayed(common),
        ).to(self.device)

    def build_for_cudagraph_capture(
        self, common_attn_metadata: CommonAttentionMetadata
    ) -> SpardaStep:
        """Plan a dummy run; slots are ours, so that vLLM's empty slot mapping protects nothing."""
        return self.build(0, rehearsed(common_attn_metadata))

    def _plan_rows(
        self,
        common: CommonAttentionMetadata,
        planner: SpardaPlanner,
        prompts: Tensor,
        dense: Tensor | None,
    ) -> SpardaStep | None:
        """Plan a batch of single tokens, if that can be done where they are."""
        rows = common.num_reqs
        prefilling = holds_prompts(common)
        return self._rows.plan(
            planner,
            common.seq_lens[:rows],
            sequence_lengths(common),
            # On the host where that is asked for, else where they are.
            prompts if prefilling else prompt_lengths(common),
            common.block_table_tensor[:rows],
            prefilling,
            dense,
            replayed(common),
        )


class SpardaImpl(AttentionImpl[SpardaStep]):
    """One attention layer as vLLM calls it.

    Attributes:
        layer: Set by the builder once the size of the cache is final.
    """

    layer: Layer

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
        config = get_current_vllm_config()
        settings = load_settings(config.additional_config, "sparda")
        check_layer(
            "SPARDA",
            takes_gpu_path(settings),
            alibi_slopes=alibi_slopes,
            sinks=sinks,
            logits_soft_cap=logits_soft_cap,
            attn_type=attn_type,
            kv_sharing_target_layer_name=kv_sharing_target_layer_name,
            sliding_window=sliding_window,
            kv_cache_dtype=kv_cache_dtype,
            expected_cache_dtype=str(config.cache_config.cache_dtype),
        )
        self.num_heads = num_heads
        self.head_size = head_size
        self.num_kv_heads = num_kv_heads
        self.scale = float(scale)
        self.kv_cache_dtype = kv_cache_dtype
        SpardaBackend._context = Context(
            settings,
            instance_of(config).name,
            config.model_config.dtype,
            allowed_requests(config),
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
        self.layer.run(query[:count], key[:count], value[:count], attn_metadata, output)
        return output
