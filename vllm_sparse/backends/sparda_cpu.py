# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""SPARDA on CPUs: host and device are two pools in one memory, a thread copies between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

from vllm_sparse import metrics
from vllm_sparse.backends.base import prompt_lengths
from vllm_sparse.backends.sparda import (
    Runtime,
    SpardaBackend,
    SpardaBuilder,
    SpardaLayer,
    make_selector,
)
from vllm_sparse.kernels.dispatch import PagingKernels, sparda_paging
from vllm_sparse.kernels.reference.selection import gather_windows
from vllm_sparse.kernels.reference.sparda_steps import record_queries
from vllm_sparse.kv.host.pager import Pager
from vllm_sparse.prefetch.engine import ThreadCopyEngine
from vllm_sparse.prefetch.scheduler import PrefetchScheduler
from vllm_sparse.prefetch.stream import PromptStream

if TYPE_CHECKING:
    from vllm.v1.attention.backend import CommonAttentionMetadata

    from vllm_sparse.config import SpardaSettings
    from vllm_sparse.kv.host.geometry import Geometry
    from vllm_sparse.steps.host import DecodeRows, SpardaStep


_STEPS_PER_GAUGE = 32


class SpardaCpuBackend(SpardaBackend, CPUAttentionBackend):
    """SPARDA on CPUs."""

    @staticmethod
    def get_impl_cls() -> type[SpardaCpuImpl]:
        """The attention implementation."""
        return SpardaCpuImpl

    @staticmethod
    def get_builder_cls() -> type[SpardaCpuBuilder]:
        """The metadata builder."""
        return SpardaCpuBuilder


@dataclass
class CpuRuntime(Runtime):
    """See :class:`Runtime`.

    Attributes:
        kernels: What decode runs.
        scheduler: Fetches for decode.
    """

    kernels: PagingKernels
    scheduler: PrefetchScheduler


class SpardaCpuBuilder(SpardaBuilder):
    """Plans every step on the host."""

    _steps = 0

    def set_up(
        self,
        settings: SpardaSettings,
        geometry: Geometry,
        dtype: torch.dtype,
        layers: list[Any],
        device: torch.device,
    ) -> CpuRuntime:
        """See :class:`SpardaBuilder`."""
        kernels, count = sparda_paging(device.type), metrics.counters().add
        pager = Pager(geometry, dtype, kernels, settings.poison)
        engine = ThreadCopyEngine(kernels.copy_pieces, settings.link_gb_per_s)
        return CpuRuntime(
            settings,
            pager,
            PromptStream(pager, engine, settings.staging_blocks, count, settings.prefetch),
            make_selector(settings, geometry, dtype, layers, record_queries),
            layers,
            kernels.attend_part,
            kernels.name,
            kernels.note,
            kernels,
            PrefetchScheduler(pager, engine, count, settings.prefetch),
        )

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
        return self.planner.plan(
            common.query_start_loc_cpu[: rows + 1],
            common.seq_lens[:rows],
            prompt_lengths(common),
            common.block_table_tensor[:rows],
        )


class SpardaCpuImpl(SpardaLayer):
    """One layer on a CPU."""

    runtime: CpuRuntime

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, step: SpardaStep, output: Tensor
    ) -> None:
        """See :class:`SpardaLayer`."""
        runtime, pager = self.runtime, self.pager
        if self.layer == 0:
            runtime.scheduler.begin_step()
            runtime.stream.begin_step(step.tiles)
        rows = torch.cat((key, value), -1)
        pager.write_host(step.slots, rows)
        metrics.counters().add("device_to_host_bytes", rows.nbytes)
        self.compress(key, step)
        if pager.resident:
            pager.write_frames(step.slots, rows)
        elif len(step.prompt_blocks):
            pager.drop(step.prompt_blocks)
        if step.decode is not None:
            self._decode(query, rows, step, step.decode, output)
        self.attend_prompts(query, rows, step, output)
        runtime.selector.record(self.layer, query, step.slots, step.last_in_block)

    def _decode(
        self, query: Tensor, rows: Tensor, step: SpardaStep, decode: DecodeRows, output: Tensor
    ) -> None:
        runtime = self.runtime
        ahead = runtime.selector.ahead
        if self.layer == 0 or not ahead:
            blocks = self._choose(self.layer, decode, query)
            runtime.scheduler.announce(self.layer, blocks, ahead=False)
        if ahead and not self.last:
            blocks = self._choose(self.layer + 1, decode, None)
            runtime.scheduler.announce(self.layer + 1, blocks, ahead=True)
        frames = runtime.scheduler.take(self.layer)
        index = decode.tokens.index
        if not self.pager.resident:
            self.pager.write_frames(step.slots[index], rows[index])
        attended = torch.empty_like(query[index])
        runtime.kernels.attend_frames(
            self.pager.slab, query[index], attended, frames, decode.lengths, self.scale
        )
        output[index] = attended

    def _choose(self, layer: int, decode: DecodeRows, query: Tensor | None) -> Tensor:
        """Physical blocks that decode rows read in a layer, ``[R, G, K]``."""
        table = decode.block_table
        everything = torch.arange(decode.width)
        own = decode.tokens.positions // self.pager.block_size
        everything = torch.where(everything <= own[:, None], everything, -1)
        logical = everything.unsqueeze(1).expand(-1, self.num_kv_heads, -1)
        if decode.scored:
            selector = self.runtime.selector
            vectors = selector.vectors(layer, decode.tokens, query)
            positions = decode.tokens.positions
            compressed = self.runtime.compressed(layer)
            if selector.ranking is not None:
                chosen = self.runtime.kernels.select_blocks(
                    compressed, vectors, table, positions, selector.ranking, self.blocks
                )
            else:
                keys = gather_windows(compressed, table)
                scores = selector.scores(vectors.unsqueeze(2), keys, positions[:, None])
                chosen = self.best(scores, positions[:, None]).squeeze(2)
            missing = decode.width - chosen.shape[-1]
            chosen = torch.nn.functional.pad(chosen, (0, max(missing, 0)), value=-1)
            chosen = chosen[..., : decode.width]
            logical = torch.where(decode.everything[:, None, None], logical, chosen)
        physical = table.unsqueeze(1).expand(-1, self.num_kv_heads, -1)
        return torch.where(logical < 0, -1, physical.gather(2, logical.clamp(min=0)))
