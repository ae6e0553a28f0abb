# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Reads and steers a live runtime: functions that run in the model's worker.

They are called through `LLM.collective_rpc`, so they get vLLM's worker first. What SPARDA chooses
can be forced, and how it fetches be switched. In a captured graph Python runs only at capture; so
the choice is computed on the device, and each way to fetch has graphs of its own, between which a
switch costs nothing.
"""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

GOLDEN_RATIO = 0.618
HEAD_SHIFT = 17
COUNTED = (
    *("frame_hits", "frame_misses", "prefetch_issued", "prefetch_late", "prefetch_wasted"),
    *("host_to_device_bytes", "exposed_wait_seconds"),
)


def sparda_runtime(worker: Any) -> Any:
    """What all layers of the worker share."""
    return worker.model_runner.attn_groups[0][0].get_metadata_builder().runtime


def cache_bytes(worker: Any) -> int:
    """Bytes of the KV cache that vLLM allocated: keys and values, or SPARDA's compressed keys."""
    storages = {
        storage.data_ptr(): storage.nbytes()
        for storage in (cache.untyped_storage() for cache in worker.model_runner.kv_caches)
    }
    return sum(storages.values())


def sparda_memory(worker: Any) -> dict[str, int]:
    """Bytes of SPARDA's live objects.

    Returns:
        ``working_set``: frames that the last step read; ``slab``: all frames; ``staging``;
        ``page_table``; ``host``: the host pool.
    """
    runtime = sparda_runtime(worker)
    pager = runtime.pager
    step = runtime.fetcher.step
    read = sum(int((layer.table.last_use == step).sum()) for layer in pager.layers)
    return {
        "working_set": read * pager.geometry.piece_bytes,
        "slab": sum(layer.slab.nbytes for layer in pager.layers),
        "staging": runtime.stream.staging.nbytes,
        "page_table": sum(part.nbytes for layer in pager.layers for part in layer.table),
        "host": pager.host.nbytes,
    }


def device_bytes(worker: Any) -> dict[str, int]:
    """Device memory for keys and values, as allocated.

    ``compressed`` is what vLLM took for compressed keys of the host's blocks.
    """
    runtime = sparda_runtime(worker)
    return {
        "slab": runtime.pager.geometry.slab_bytes,
        "staging": runtime.stream.nbytes,
        "compressed": cache_bytes(worker),
    }


def check_integrity(worker: Any) -> None:
    """Raises if a page table or a frame is wrong."""
    sparda_runtime(worker).pager.check_integrity()


def shape(worker: Any) -> dict[str, Any]:
    """Returns what the arithmetic of a result needs."""
    geometry = sparda_runtime(worker).pager.geometry
    return {
        "layers": geometry.num_layers,
        "kv_heads": geometry.num_kv_heads,
        "piece_bytes": geometry.piece_bytes,
        "frames": list(geometry.frames),
    }


class Way(NamedTuple):
    """A way to fetch.

    Attributes:
        prefetch: A layer ahead; else when the layer runs.
        copies: Whether blocks are copied. Without, the same kernels move zero bytes, and the
            attention reads whatever is there: the time is right and the result is not.
    """

    prefetch: bool
    copies: bool = True


class ForcedChoice:
    """Takes the place of the selection kernel: a fixed share of the free picks is new in each step.

    The free picks are neighbours on a ring of blocks, along which they move by as many as are to be
    new. A multiplier spreads neighbours over the context, and each KV head begins elsewhere on the
    ring; all layers choose the same. If the slab is exactly as large as the working set, each new
    block is a miss, and so is each block that a request begins; nothing else is.

    Attributes:
        free_picks: Of each row and KV head.
        replaced: Free picks that are new in each step, int64 ``[1]``.
        new: Blocks that the step before did not read, summed over rows and steps, for one KV head
            of one layer, int64 ``[1]``.
        picked: Free picks, summed as `new` is.
    """

    def __init__(self, runtime: Any, shortest: int) -> None:
        """Starts without anything new.

        Raises:
            ValueError: It has too few blocks.
        """
        settings, device = runtime.settings, runtime.compressed(0).device
        always = settings.init_blocks + settings.local_blocks
        self.free_picks = settings.blocks_read - always - 1
        self._ring = shortest // settings.block_size - always
        if self._ring < self.free_picks:
            raise ValueError(f"requests of {shortest} tokens have too few blocks to choose from")
        near = range(max(1, int(GOLDEN_RATIO * self._ring)), self._ring + 2)
        self._multiplier = next(number for number in near if math.gcd(number, self._ring) == 1)
        parts = torch.zeros(4, 1, dtype=torch.int64, device=device)
        self.replaced, self.new, self.picked, self._step = parts
        self._runtime, self._settings = runtime, settings
        self._kernel = runtime.kernels.select_blocks
        self._chosen: tuple[Tensor, Tensor] | None = None

    def set_rate(self, rate: float) -> float:
        """Sets the share of the free picks that is new, and returns what it is after rounding.

        Raises:
            ValueError: There are not as many other blocks.
        """
        replaced = round(rate * self.free_picks)
        if self.free_picks + replaced > self._ring:
            raise ValueError(f"{self._ring} blocks are too few to replace {replaced} of them")
        self.replaced.fill_(replaced)
        return replaced / self.free_picks

    def __call__(
        self, compressed: Tensor, vectors: Tensor, table: Tensor, positions: Tensor, *rest: Any,
        **options: Any,
    ) -> Any:  # fmt: skip
        """Chooses; the kernel still runs, so that selecting costs what it costs."""
        selected = self._kernel(compressed, vectors, table, positions, *rest, **options)
        if compressed.data_ptr() == self._runtime.compressed(0).data_ptr():
            chosen = self._choose(table, positions, compressed.shape[1])
            room = (0, selected.pieces.shape[2] - chosen[1].shape[2])
            # Once for all layers: in each it would be launches that only this choice needs.
            self._chosen = tuple(torch.nn.functional.pad(x, room, value=-1).int() for x in chosen)
        assert self._chosen is not None, "layer 0 chooses first"
        blocks, pieces = self._chosen
        return selected._replace(blocks=blocks, pieces=pieces)

    def _choose(self, table: Tensor, positions: Tensor, kv_heads: int) -> tuple[Tensor, Tensor]:
        """The blocks that each row reads in this step, and their pieces, ``[R, G, blocks]``."""
        settings, device = self._settings, positions.device
        self._step.add_(1)
        own = (positions // settings.block_size)[:, None, None]
        head = torch.arange(kv_heads, device=device)[None, :, None]
        place = self._step * self.replaced + HEAD_SHIFT * head
        place = place + torch.arange(self.free_picks, device=device)
        free = settings.init_blocks + place * self._multiplier % self._ring
        first = torch.arange(settings.init_blocks, device=device)
        last = own - torch.arange(settings.local_blocks, -1, -1, device=device)
        shape = (len(positions), kv_heads, -1)
        blocks = torch.cat([part.expand(shape) for part in (first, free, last)], -1)
        # Rows of warm-ups are shorter than any request; padding rows read nothing.
        blocks = torch.minimum(blocks, own).clamp(min=0)
        pieces = table.long().gather(1, blocks.flatten(1)).view_as(blocks) * kv_heads + head
        padding = positions < 0
        begun = (positions % settings.block_size == 0).long()
        self.new.add_((self.replaced + begun).masked_fill(padding, 0).sum())
        self.picked.add_(self.free_picks * (~padding).sum())
        nothing = padding[:, None, None]
        return blocks.masked_fill(nothing, -1), pieces.masked_fill(nothing, -1)


class CountingLane:
    """Counts the bytes that pass through a lane, where the host knows them.

    Attributes:
        nbytes: Bytes forked so far.
    """

    def __init__(self, lane: Any) -> None:
        """Wraps a lane."""
        self.nbytes = 0
        self._lane = lane

    def fork(self, work: Callable[[], object], nbytes: int = 0) -> Any:
        """Forks work, as a `Lane` does."""
        self.nbytes += nbytes
        return self._lane.fork(work, nbytes)


class _Steering:
    """Of one worker."""

    def __init__(self, worker: Any, shortest: int) -> None:
        self.runtime = sparda_runtime(worker)
        self.choice = ForcedChoice(self.runtime, shortest)
        self._worker = worker
        self._copy = self.runtime.kernels.copy_pieces
        self._none = torch.zeros(1, dtype=torch.int32, device=self.choice.new.device)
        self._graphs: dict[Way, dict] = {}
        # Kept, or the pool that later graphs share would be given back with it.
        self._first = getattr(*graphs_of(worker.model_runner)) if self._captures else None
        self.runtime.kernels = self.runtime.kernels._replace(select_blocks=self.choice)
        fetcher = self.runtime.fetcher
        self.lane = fetcher._lane = CountingLane(fetcher._lane)

    @property
    def _captures(self) -> bool:
        mode = self._worker.vllm_config.compilation_config.cudagraph_mode
        return bool(mode.has_full_cudagraphs())

    def fetch(self, way: Way) -> None:
        fetcher = self.runtime.fetcher
        fetcher.prefetch = way.prefetch
        copy = self._copy if way.copies else self._copy_nothing
        fetcher.kernels = fetcher.kernels._replace(copy_pieces=copy)
        if not self._captures:
            return
        runner = self._worker.model_runner
        holder, name = graphs_of(runner)
        new = way not in self._graphs
        setattr(holder, name, self._graphs.setdefault(way, {}))
        if new:
            from vllm.config import set_current_vllm_config

            with set_current_vllm_config(self._worker.vllm_config):
                runner.capture_model()
            if not self._graphs[way]:
                raise RuntimeError("vLLM captured no graph")

    def _copy_nothing(self, *arguments: Any, **options: Any) -> None:
        self._copy(*arguments[:-1], self._none, **options)  # the last one is how many

    def counted(self) -> dict[str, float]:
        """Hits, misses and bytes by the names of the plugin's counters."""
        if self.runtime.fetcher.counters.readable:
            from vllm_sparse import metrics

            found = {name: metrics.counters().value(name) for name in COUNTED}
            return {**found, "engine_bytes": self.lane.nbytes}
        # Metrics come some steps late, what the device counts does not.
        hits, misses, *_ = self.runtime.fetcher.counters.values.view(2, -1).sum(0).tolist()
        moved = misses * self.runtime.pager.geometry.piece_bytes
        return {"frame_hits": hits, "frame_misses": misses, "host_to_device_bytes": moved}


def graphs_of(runner: Any) -> tuple[Any, str]:
    """What holds the graphs of whole decode steps in either model runner, and the attribute."""
    manager = getattr(runner, "cudagraph_manager", None)
    return (runner.model, "concrete_cudagraph_entries") if manager is None else (manager, "graphs")


def force(worker: Any, shortest: int) -> None:
    """Installs a `ForcedChoice`, before any request decodes that is to be measured.

    Args:
        worker: vLLM's.
        shortest: Tokens of the shortest request that will decode.
    """
    worker.steering = _Steering(worker, shortest)


def fetch(worker: Any, way: Way) -> None:
    """Fetches that way from now on; captures graphs for it the first time."""
    worker.steering.fetch(way)


def set_rate(worker: Any, rate: float) -> float:
    """Sets the share of the free picks that each step replaces; returns it after rounding."""
    return worker.steering.choice.set_rate(rate)


def counts(worker: Any) -> dict[str, float]:
    """What was counted, and what it has to be.

    Returns:
        Counters; ``expected_misses`` of pieces, which follow from the block sets that were forced;
        ``free_picks``. On a CPU also ``engine_bytes``, which passed through the lane.
    """
    steering = worker.steering
    geometry = steering.runtime.pager.geometry
    paged = sum(not geometry.is_resident(layer) for layer in range(geometry.num_layers))
    per_head = geometry.num_kv_heads * paged
    return {
        **steering.counted(),
        "expected_misses": int(steering.choice.new) * per_head,
        "free_picks": int(steering.choice.picked) * per_head,
    }


def runs_of(slots: Tensor) -> Tensor:
    """Runs of slots that follow each other, along the last axis."""
    return 1 + (slots.sort(-1).values.diff(dim=-1) > 1).sum(-1)


def locality(worker: Any, seed: int) -> tuple[float, float]:
    """What a random query makes ROCKETKV select of the last decode step's first row.

    With random weights the worst case is wanted, tokens that lie scattered. If all keys were alike,
    ties would select one run of tokens, which is read much faster.

    Returns:
        Runs of slots that follow each other, the median over layers and KV heads; and pages that
        are selected, the most runs there can be.
    """
    from benchmarks.ops.kernels import reference, triton

    builder = worker.model_runner.attn_groups[0][0].get_metadata_builder()
    table, lengths, top_r, *_ = builder._buffers(builder._table.shape[1], 1)
    generator = torch.Generator(table.device).manual_seed(seed)
    found: list[int] = []
    for layer in builder._planning.layers:
        sparse, cache = layer.impl.sparse, layer.kv_cache
        layout, top_k = sparse.stock_layout, sparse.policy.top_k
        shape = (1, layer.impl.num_heads, layer.impl.head_size)
        query = torch.randn(shape, generator=generator, device=table.device).to(cache.dtype)
        probes = reference("probe_pages")(
            cache, query, table, lengths, top_r, layout, layer.impl.scale
        )
        common = {"layout": layout, "top_k": top_k}
        slots = triton("select_slots")(cache, probes, table, lengths, top_r, **common)
        found += runs_of(slots[0]).tolist()
    taken = min(top_k, int(lengths[0]))
    return statistics.median(found), taken / layout.page_size
