# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Sets a worker of SPARDA up: sizes, memory, selector, kernels, and what it says at start-up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vllm_sparse import metrics
from vllm_sparse.backends.refusals import takes_gpu_path
from vllm_sparse.features import SPARDA, refuse
from vllm_sparse.kernels.fp8 import FP8
from vllm_sparse.kv.host.geometry import GIB, Geometry, plan_frames
from vllm_sparse.kv.host.memory import page_aligned
from vllm_sparse.kv.host.pager import Pager
from vllm_sparse.policies.selectors import (
    ForecastSelector,
    PreviousSelector,
    QuerySelector,
    Selector,
)
from vllm_sparse.prefetch.fetcher import Fetcher
from vllm_sparse.prefetch.stream import PromptStream
from vllm_sparse.steps.host_layer import Runtime

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm.config import VllmConfig

    from vllm_sparse.kernels.dispatch import SpardaKernels
    from vllm_sparse.kv.spec import SpardaSpec
    from vllm_sparse.policies.sparda import SpardaSettings
    from vllm_sparse.prefetch.lane import Lane


@dataclass(frozen=True)
class Machine:
    """What differs between CPUs and GPUs.

    Attributes:
        kernels: What layers run.
        lane: Where copies run.
        captured: Graphs may replay batches of single tokens.
        truncates: How it makes fp8 numbers, see :class:`Scales`.
        view: Pins host memory and returns it as a GPU sees it; ``None`` where host and device are
            one memory.
        attend_fresh: Serves prompt rows without a past; ``None`` if they are streamed like others.
        release: Called when nobody will use the host memory any more.
    """

    kernels: SpardaKernels
    lane: Lane
    captured: bool
    truncates: bool
    view: Callable[[Tensor], Tensor] | None = None
    attend_fresh: Callable[..., Tensor] | None = None
    release: Callable[[], None] = lambda: None

    def close(self) -> None:
        """End what runs beside the computation, and give the memory back."""
        self.lane.close()
        self.release()


def geometry_of(
    config: VllmConfig,
    settings: SpardaSettings,
    spec: SpardaSpec,
    num_layers: int,
    num_blocks: int,
    itemsize: int,
) -> Geometry:
    """Sizes of a worker's cache, whose numbers take ``itemsize`` bytes.

    Raises:
        ConfigError: The slab cannot hold what one step may read.
    """
    frames = plan_frames(
        settings,
        num_layers=num_layers,
        num_pieces=num_blocks * spec.num_kv_heads,
        num_kv_heads=spec.num_kv_heads,
        piece_bytes=spec.block_size * 2 * spec.head_size * itemsize,
        max_num_seqs=config.scheduler_config.max_num_seqs,
        max_model_len=config.model_config.max_model_len,
    )
    shape = num_blocks, spec.num_kv_heads, spec.block_size, spec.head_size
    return Geometry(num_layers, *shape, itemsize, frames)


def runtime_of(
    settings: SpardaSettings,
    geometry: Geometry,
    dtype: torch.dtype,
    stored: torch.dtype,
    layers: list[Any],
    machine: Machine,
    rows: int,
    device: torch.device,
) -> Runtime:
    """Allocate the host pool and the slab, and what copies between them.

    Args:
        settings: The settings.
        geometry: Sizes of the cache.
        dtype: Of compressed keys and of queries that are kept.
        stored: Of keys and values.
        layers: The engine's attention layers.
        machine: What this kind of device brings.
        rows: Most rows of a batch of single tokens.
        device: Where the layers compute.
    """
    kernels, lane, count = machine.kernels, machine.lane, metrics.counters().add
    how = settings.prefetch, machine.captured
    pager = Pager(geometry, stored, settings.poison, machine.view, device)
    return Runtime(
        settings,
        layers[0].impl.scale,
        pager,
        kernels,
        _selector(settings, geometry, dtype, layers, machine, rows, device),
        Fetcher(pager, kernels, lane, count, *how),
        PromptStream(pager, kernels, lane, settings.staging_blocks, count, *how),
        layers,
        machine.attend_fresh,
        QuerySelector(layers[0].impl.scale) if settings.prompt_selector else None,
    )


def check_layers(
    config: VllmConfig, settings: SpardaSettings, spec: SpardaSpec, layers: list[Any]
) -> None:
    """Refuse layers that are not all alike.

    Raises:
        UnsupportedError: Says what differs.
    """
    on_gpu = takes_gpu_path(settings)
    if spec.block_size != settings.block_size:
        sizes = {"size": spec.block_size, "wanted": settings.block_size}
        refuse("other-blocks", SPARDA, on_gpu, **sizes)
    expected = config.model_config.get_num_layers(config.parallel_config)
    if len(layers) != expected:
        found = {"found": len(layers), "expected": expected}
        refuse("unlike-layers", SPARDA, on_gpu, backend="SPARDA", **found)


def _selector(
    settings: SpardaSettings,
    geometry: Geometry,
    dtype: torch.dtype,
    layers: list[Any],
    machine: Machine,
    rows: int,
    device: torch.device,
) -> Selector:
    """What chooses blocks in these layers.

    Raises:
        UnsupportedError: It needs a projection that the layers lack, or that has no weights.
    """
    kind, impl = settings.chosen_selector, layers[0].impl
    if kind == "query":
        return QuerySelector(impl.scale)
    if kind == "previous":
        shape = (geometry.num_layers, geometry.num_blocks, impl.num_heads, geometry.head_dim)
        recent = None
        if machine.captured:
            recent = torch.zeros(shape[0], rows, *shape[2:], dtype=dtype, device=device)
        return PreviousSelector(
            impl.scale,
            machine.view(page_aligned(shape, dtype))
            if machine.view
            else torch.empty(shape, dtype=dtype, device="cpu"),
            geometry.block_size,
            machine.kernels.record_queries,
            machine.kernels.recall_queries,
            recent,
        )
    taps: list[Any] = [getattr(layer, "sparda_tap", None) for layer in layers]
    looking = zip(layers[:-1] or layers, taps, strict=False)  # one layer looks for itself
    missing = [layer.layer_name for layer, tap in looking if tap is None or not tap.ready]
    if missing:
        facts = {"selector": kind, "layers": ", ".join(missing)}
        refuse("untapped", SPARDA, takes_gpu_path(settings), **facts)
    # On a CPU the model's own kernel is as fast; on a GPU every launch counts.
    rotary = taps[0].rotary() if machine.captured else None
    return ForecastSelector(taps, rotary)


def start_line(runtime: Runtime, config: VllmConfig) -> str:
    """What a worker says at start-up."""
    settings, geometry = runtime.settings, runtime.pager.geometry
    ahead = runtime.selector.ahead
    mode = "a layer ahead" if ahead and settings.prefetch else "when a layer runs"
    if all(geometry.is_resident(layer) for layer in range(geometry.num_layers)):
        mode = "never, as every block has a frame"
        if settings.slab_gib is not None:
            mode += (
                " (the slab holds the whole pool; a larger host_gib keeps more, and what then has "
                "no frame is fetched from host memory)"
            )
        elif not settings.resident:
            mode += (
                f" (--max-num-seqs {config.scheduler_config.max_num_seqs} may need them all; lower "
                "it, or set slab_gib, to keep fewer on the device)"
            )
    prompts = "dense"
    if settings.sparse_prefill:
        chosen = f", by {settings.prompt_selector}" if settings.prompt_selector else ""
        prompts = f"sparse ({settings.prompt_blocks_read} blocks{chosen})"
    fp8 = " in fp8" if runtime.pager.host.dtype == FP8 else ""
    total = _total(runtime, config)
    tokens = (geometry.num_blocks - 1) * geometry.block_size
    return (
        f"SPARDA: selector {settings.chosen_selector}, {settings.blocks_read} blocks of "
        f"{geometry.block_size} tokens per KV head ({settings.init_blocks} first, "
        f"{settings.local_blocks} + 1 last), dense up to {settings.dense_len} tokens, prompts "
        f"{prompts}; host pool {runtime.pager.host.nbytes / GIB:.2f} GiB{fp8}{total} for "
        f"{geometry.num_blocks - 1} blocks = {tokens} tokens; "
        f"device slab {geometry.slab_bytes / GIB:.3f} GiB, "
        f"{geometry.frames[-1]} frames a layer for {config.scheduler_config.max_num_seqs} requests "
        f"at once, staging {runtime.stream.nbytes / GIB:.3f} GiB; "
        f"fetched {mode}; kernels: {runtime.kernels.name}{_turning(runtime)}"
    )


def _turning(runtime: Runtime) -> str:
    """Says that projections are not turned where they are read, on machines where that costs."""
    selector = runtime.selector
    if not isinstance(selector, ForecastSelector) or not runtime.kernels.name.startswith("triton"):
        return ""
    if selector.ranking.rotary is not None:
        return ""
    return (
        "; the kernels do not know this model's rotary embedding, which takes further launches a "
        "layer"
    )


def _total(runtime: Runtime, config: VllmConfig) -> str:
    """What the host pools of all ranks take, if there are several."""
    parallel = config.parallel_config
    if parallel.tensor_parallel_size * parallel.pipeline_parallel_size == 1:
        return ""
    layers = config.model_config.get_total_num_hidden_layers() * parallel.tensor_parallel_size
    total = runtime.pager.host.nbytes * layers // runtime.pager.geometry.num_layers
    return f" per rank, {total / GIB:.2f} GiB in total"
