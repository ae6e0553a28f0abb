# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""SPARDA on GPUs: the host pool is pinned memory, and a side stream fetches a layer ahead.

A batch in which every row decodes one token is planned on the device, into buffers that never move,
so that a CUDA graph can be captured where the settings allow it. Steps with prompts are planned on
the host; their decode rows take the same way.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from vllm.utils.torch_utils import get_accelerator_view_from_cpu_tensor
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends import flash_attn
from vllm.v1.simple_kv_offload.cuda_mem_ops import pin_tensor

from vllm_sparse import metrics
from vllm_sparse.backends.base import is_rehearsal, prompt_lengths, sequence_lengths
from vllm_sparse.backends.gpu import GpuBackend, check_block_size, most_rows, warn_of_gpus
from vllm_sparse.backends.sparda import (
    Runtime,
    SpardaBackend,
    SpardaBuilder,
    SpardaLayer,
    make_selector,
)
from vllm_sparse.config import load_settings
from vllm_sparse.errors import ConfigError
from vllm_sparse.kernels.dispatch import SpardaGpuKernels, sparda_gpu, sparda_paging
from vllm_sparse.kernels.reference.sparda_steps import Unframed
from vllm_sparse.kv.host.geometry import GIB, blocks_per_row
from vllm_sparse.kv.host.pager import Pager
from vllm_sparse.policies.selectors import Tokens
from vllm_sparse.prefetch.lanes import Lane, LaneCopyEngine, LateLane, StreamLane
from vllm_sparse.prefetch.stream import PromptStream
from vllm_sparse.steps.counters import DeviceCounters
from vllm_sparse.steps.host import SpardaPlanner, SpardaStep
from vllm_sparse.steps.host_device import Fresh, GpuStep, Rows, on_device
from vllm_sparse.upload import upload

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.kv_cache_interface import KVCacheSpec

    from vllm_sparse.config import SpardaSettings
    from vllm_sparse.kernels.reference.sparda_steps import Selected
    from vllm_sparse.kv.host.geometry import Geometry
    from vllm_sparse.prefetch.engine import Ticket


class SpardaGpuBackend(SpardaBackend, GpuBackend):
    """SPARDA on NVIDIA GPUs; FlashAttention only says what the device can do."""

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        """Start-up has made this vLLM's block size; workers ask again once the model is loaded."""
        return cls._settings.block_size if cls._settings else default_block_size

    @staticmethod
    def get_impl_cls() -> type[SpardaGpuImpl]:
        """The attention implementation."""
        return SpardaGpuImpl

    @staticmethod
    def get_builder_cls() -> type[SpardaGpuBuilder]:
        """The metadata builder."""
        return SpardaGpuBuilder


class _Fetch(NamedTuple):
    selected: Selected
    frames: Tensor
    ticket: Ticket | None


@dataclass
class GpuRuntime(Runtime):
    """See :class:`Runtime`.

    Attributes:
        kernels: What decode runs.
        lane: Where fetches run.
        counters: Hits and misses, and whether the slab was ever too small.
        step: Number of the step, int64 ``[1]``.
        capacity: Most blocks that a row reads.
        flash_version: Of FlashAttention; ``None`` where there is none.
        fetches: Under way, by layer.
        chosen: Selections whose fetch waits for their layer, by layer.
    """

    kernels: SpardaGpuKernels
    lane: Lane
    counters: DeviceCounters
    step: Tensor
    capacity: int
    flash_version: int | None
    fetches: dict[int, _Fetch] = field(default_factory=dict)
    chosen: dict[int, Selected] = field(default_factory=dict)


class SpardaGpuBuilder(SpardaBuilder):
    """Plans a batch of single tokens on the device, any other on the host."""

    @classmethod
    def get_cudagraph_support(
        cls, vllm_config: VllmConfig, kv_cache_spec: KVCacheSpec
    ) -> AttentionCGSupport:
        """Whole decode steps, except while looking for mistakes."""
        if load_settings(vllm_config.additional_config, "sparda").poison:
            return AttentionCGSupport.NEVER  # poisoning waits for the device
        return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def set_up(
        self,
        settings: SpardaSettings,
        geometry: Geometry,
        dtype: torch.dtype,
        layers: list[Any],
        device: torch.device,
    ) -> GpuRuntime:
        """See :class:`SpardaBuilder`."""
        warn_of_gpus("SPARDA")
        check_block_size(geometry.block_size)
        on_gpu = device.type == "cuda"
        pinned: list[Tensor] = []
        view = partial(_pinned_view, pinned) if on_gpu else None
        if on_gpu:
            _check_memory(geometry, settings, device)
        kernels, count = sparda_gpu(device), metrics.counters().add
        pager = Pager(geometry, dtype, sparda_paging(device.type), settings.poison, view)
        lane: Lane = StreamLane(device) if on_gpu else LateLane()
        engine = LaneCopyEngine(lane, kernels.copy_pieces)
        config = self.vllm_config
        self._max_rows = most_rows(config)
        self._rehearsal = SpardaPlanner(settings, geometry.num_blocks, lambda *_: None)
        self._buffers: tuple[Tensor, ...] = ()
        self._bytes_per_token = geometry.host_bytes // (geometry.num_blocks * geometry.block_size)
        runtime = GpuRuntime(
            settings,
            pager,
            PromptStream(pager, engine, settings.staging_blocks, count, settings.prefetch),
            make_selector(settings, geometry, dtype, layers, kernels.record_queries, view),
            layers,
            kernels.attend_part,
            kernels.name,
            "",
            kernels,
            lane,
            DeviceCounters(("frame_hits", "frame_misses", "slab_full"), device, self._count),
            torch.zeros(1, dtype=torch.int64, device=device),
            blocks_per_row(settings, config.model_config.max_model_len),
            flash_attn.get_flash_attn_version(head_size=geometry.head_dim),
        )
        # When the process ends, the driver does it.
        weakref.finalize(runtime, _unpin, pinned).atexit = False
        return runtime

    def _count(self, name: str, amount: int) -> None:
        count = metrics.counters().add
        if name == "slab_full":
            raise RuntimeError(
                "the device slab was too small for a step, which start-up should have ruled out; "
                "raise vllm_sparse.slab_gib and report this"
            )
        count(name, amount)
        if name == "frame_misses":
            count("host_to_device_bytes", amount * self.runtime.pager.geometry.piece_bytes)
            runtime = self.runtime
            if runtime.selector.ahead and runtime.settings.prefetch:
                count("prefetch_issued", amount)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> SpardaStep:
        """Plan one step."""
        common, count = common_attn_metadata, common_attn_metadata.num_reqs
        self.runtime.counters.publish()
        planner = self._rehearsal if is_rehearsal(common) else self.planner
        if planner is self.planner:
            tokens = int(common.query_start_loc_cpu[count])
            metrics.counters().add("device_to_host_bytes", tokens * self._bytes_per_token)
        if common.max_query_len == 1:
            return self._plan_rows(common, planner)
        step = planner.plan(
            common.query_start_loc_cpu[: count + 1],
            sequence_lengths(common),
            prompt_lengths(common).cpu(),
            common.block_table_tensor[:count].cpu(),
        )
        return on_device(step, self.device, self.runtime.flash_version is not None)

    def _plan_rows(self, common: CommonAttentionMetadata, planner: SpardaPlanner) -> GpuStep:
        """Plan a batch of single tokens.

        A prompt's token that comes alone is dense unless prompts are sparse. No frames are set
        aside for all the blocks that it reads, but a captured graph may run the step: so the
        attention over frames reads the host pool for it.
        """
        count, size = common.num_reqs, self.runtime.settings.block_size
        table = common.block_table_tensor[:count]
        if not self._buffers or self._buffers[0].shape[1] != table.shape[1]:
            shape = (self._max_rows, table.shape[1])
            index = torch.arange(self._max_rows, device=self.device)
            self._buffers = (
                torch.zeros(shape, dtype=torch.int32, device=self.device),
                *torch.zeros(5, self._max_rows, dtype=torch.int64, device=self.device),
                torch.zeros(self._max_rows, dtype=torch.int32, device=self.device),
                index,
                torch.full_like(index, -1),
            )
        buffers = (part[:count] for part in self._buffers)
        own_table, positions, clamped, slots, previous, framed, unframed, index, nowhere = buffers
        own_table.copy_(table)
        torch.sub(common.seq_lens[:count].long(), 1, out=positions)
        torch.clamp(positions, min=0, out=clamped)
        here = own_table.gather(1, (clamped // size)[:, None])[:, 0].long()
        slots.copy_(torch.where(positions < 0, -1, here * size + positions % size))
        before = (clamped - 1).clamp(min=0) // size
        previous.copy_(own_table.gather(1, before[:, None])[:, 0])
        lengths, prompt_lens = sequence_lengths(common), prompt_lengths(common)
        framed.copy_(positions)
        if not self.runtime.settings.sparse_prefill:
            alone = positions < upload(prompt_lens, self.device)
            framed.masked_fill_(alone, -1)
            unframed.copy_(torch.where(alone, positions + 1, 0))
            if common.is_prefilling is not None and bool(common.is_prefilling.any()):
                lengths = lengths.where(lengths > prompt_lens.cpu(), 0)
        planner.count_rows(lengths)

        tokens = Tokens(index, clamped, previous, nowhere)
        none = torch.empty(0, dtype=torch.int64, device=self.device)
        return GpuStep(
            num_tokens=count,
            slots=slots,
            last_in_block=index,
            window_slots=none,
            window_tokens=none,
            older_slots=none,
            decode=None,
            prompts=(),
            prompt_blocks=none,
            tiles=(),
            rows=Rows(tokens, positions, own_table, framed, unframed),
        )


def _check_memory(geometry: Geometry, settings: SpardaSettings, device: torch.device) -> None:
    """Refuse a slab that the GPU has no room for; vLLM does not know of it.

    Raises:
        ConfigError: With the arithmetic.
    """
    pieces = 2 * settings.staging_blocks * geometry.num_kv_heads
    needed = geometry.slab_bytes + pieces * geometry.piece_bytes
    free, _ = torch.cuda.mem_get_info(device)
    if needed > free:
        raise ConfigError(
            f"vllm_sparse.slab_gib: {geometry.slab_bytes / GIB:.2f} GiB of frames and "
            f"{(needed - geometry.slab_bytes) / GIB:.2f} GiB of staging do not fit the "
            f"{free / GIB:.2f} GiB that are free on this GPU. Lower slab_gib, --max-num-seqs, "
            "top_k or dense_len"
        )


def _pinned_view(pinned: list[Tensor], host: Tensor) -> Tensor:
    """Pin host memory, note it, and return it as the GPU sees it.

    Not with PyTorch's allocator for pinned memory, which rounds sizes up to a power of two.
    """
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


class SpardaGpuImpl(SpardaLayer):
    """One layer on a GPU."""

    runtime: GpuRuntime

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, step: SpardaStep, output: Tensor
    ) -> None:
        """See :class:`SpardaLayer`."""
        assert isinstance(step, GpuStep)
        runtime, pager = self.runtime, self.pager
        if self.layer == 0:
            runtime.fetches.clear()
            runtime.chosen.clear()
            runtime.step.add_(1)
            runtime.stream.begin_step(step.tiles)
        # A fetch that is under way would overwrite this step's token in a frame.
        fetch = runtime.fetches.pop(self.layer, None)
        if fetch is not None and fetch.ticket is not None:
            fetch.ticket.wait()
        if runtime.settings.poison:
            self._poison_fresh(step.slots)
        runtime.kernels.write_tokens(
            pager.host, pager.slab, pager.table.frame_of, step.slots, key, value
        )
        self.compress(key, step)
        if step.rows is not None:
            self._decode(query, step.rows, fetch, output)
        if step.fresh is not None:
            self._attend_fresh(query, key, value, step.fresh, output)
        if step.prompts:
            self.attend_prompts(query, torch.cat((key, value), -1), step, output)
        runtime.selector.record(self.layer, query, step.slots, step.last_in_block)

    def _attend_fresh(
        self, query: Tensor, key: Tensor, value: Tensor, fresh: Fresh, output: Tensor
    ) -> None:
        query, key, value = query[fresh.index], key[fresh.index], value[fresh.index]
        target = torch.empty_like(query)
        flash_attn.flash_attn_varlen_func(
            q=query,
            k=key,
            v=value,
            out=target,
            cu_seqlens_q=fresh.starts,
            cu_seqlens_k=fresh.starts,
            max_seqlen_q=fresh.longest,
            max_seqlen_k=fresh.longest,
            softmax_scale=self.scale,
            causal=True,
            fa_version=self.runtime.flash_version,
        )
        output[fresh.index] = target

    def _decode(self, query: Tensor, rows: Rows, fetch: _Fetch | None, output: Tensor) -> None:
        runtime, pager, kernels = self.runtime, self.pager, self.runtime.kernels
        if rows.whole:  # in other steps the planner lists the windows
            stride = runtime.settings.kernel_stride
            compressed = runtime.compressed(self.layer)
            kernels.update_windows(
                compressed,
                pager.host,
                rows.positions,
                rows.table,
                stride,
                slab=pager.slab,
                frame_of=pager.table.frame_of,
            )
        if fetch is None:
            chosen = runtime.chosen.pop(self.layer, None)
            if chosen is None:
                chosen = self._choose(self.layer, rows, query)
            fetch = self._fetch(self.layer, chosen)
            if fetch.ticket is not None:
                fetch.ticket.wait()
        if runtime.selector.ahead and not self.last:
            chosen = self._choose(self.layer + 1, rows, None)
            if runtime.settings.prefetch:
                runtime.fetches[self.layer + 1] = self._fetch(self.layer + 1, chosen)
            else:
                runtime.chosen[self.layer + 1] = chosen
        index = None if rows.whole else rows.tokens.index
        target = output[: len(query)] if index is None else torch.empty_like(query[index])
        kernels.attend_frames(
            pager.slab,
            query if index is None else query[index],
            target,
            fetch.frames,
            fetch.selected.lengths,
            self.scale,
            None if rows.unframed is None else Unframed(pager.host, rows.table, rows.unframed),
        )
        if index is not None:
            output[index] = target

    def _choose(self, layer: int, rows: Rows, query: Tensor | None) -> Selected:
        runtime = self.runtime
        ranking = runtime.selector.ranking
        assert ranking is not None
        return runtime.kernels.select_blocks(
            runtime.compressed(layer),
            runtime.selector.vectors(layer, rows.tokens, query),
            rows.table,
            rows.framed,
            ranking,
            self.blocks,
            dense_len=runtime.settings.dense_len,
            capacity=runtime.capacity,
        )

    def _fetch(self, layer: int, selected: Selected) -> _Fetch:
        """Give the selected blocks of a layer frames; fill them beside the computation."""
        runtime = self.runtime
        pager, kernels = runtime.pager.layers[layer], runtime.kernels
        if pager.resident:
            return _Fetch(selected, selected.pieces, None)
        found = kernels.resolve(pager.table, selected.pieces, runtime.step, runtime.counters.values)
        if runtime.settings.poison:
            pager.slab[found.targets[: int(found.misses)].long()] = torch.nan

        def work() -> object:
            kernels.copy_pieces(
                pager.slab, found.targets, pager.pieces, found.missing, found.misses
            )
            return found

        return _Fetch(selected, found.frames, runtime.lane.fork(work))

    def _poison_fresh(self, slots: Tensor) -> None:
        pager = self.pager
        block = slots[(slots >= 0) & (slots % pager.block_size == 0)] // pager.block_size
        pager.host[block] = torch.nan
        head = torch.arange(pager.num_kv_heads, device=slots.device)
        frame = pager.table.frame_of[block[:, None] * pager.num_kv_heads + head].long()
        pager.slab[frame[frame >= 0]] = torch.nan
