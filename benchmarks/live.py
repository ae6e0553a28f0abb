# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Reads and steers a live SPARDA runtime: functions that run in the model's worker.

They are called through `LLM.collective_rpc`, so they get vLLM's worker first.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm_sparse.kernels.types import Ranking, Selected

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm_sparse.config import SpardaSettings
    from vllm_sparse.policies.selectors import Tokens
    from vllm_sparse.prefetch.lane import Lane, Ticket

COUNTED = (
    "frame_hits",
    "frame_misses",
    "prefetch_issued",
    "prefetch_late",
    "prefetch_wasted",
    "host_to_device_bytes",
    "exposed_wait_seconds",
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


def sparda_memory(worker: Any) -> dict:
    """Bytes of SPARDA's live objects.

    Returns:
        ``working_set``: frames that the last step read; ``slab``: all frames; ``staging``;
        ``page_table``; ``host``: the host pool.
    """
    runtime = sparda_runtime(worker)
    pager = runtime.pager
    read = sum(int((layer.table.last_use == runtime.step).sum()) for layer in pager.layers)
    return {
        "working_set": read * pager.geometry.piece_bytes,
        "slab": sum(layer.slab.nbytes for layer in pager.layers),
        "staging": runtime.stream.staging.nbytes,
        "page_table": sum(part.nbytes for layer in pager.layers for part in layer.table),
        "host": pager.host.nbytes,
    }


def check_integrity(worker: Any) -> None:
    """Raises if a page table or a frame is wrong."""
    sparda_runtime(worker).pager.check_integrity()


class ForcedSelector:
    """Chooses blocks such that a fixed share of the free picks is new in every step.

    For a fixed batch of decoding requests, whose order does not change. Each step replaces the
    oldest ``round(rate * free picks)`` free picks by blocks that the request did not read in the
    step before. If the slab is exactly as large as the working set, all of those are misses, and so
    is each block that a request begins; nothing else is.

    Attributes:
        ahead: As if the choice were known a layer ahead.
        rate: Share of the free picks to replace.
        new_blocks: Blocks of a request that its previous step did not read, summed over requests
            and steps, for one KV head of one layer.
        free_picks: Free picks, summed likewise.
    """

    ahead = True
    ranking = Ranking(softmax=False)

    def __init__(self, settings: SpardaSettings, shape: tuple[int, int], kernel: Any) -> None:
        """Starts without a history.

        Args:
            settings: Which blocks are forced and how many are read.
            shape: KV heads and head size.
            kernel: The selection kernel; it still runs, so that selecting costs what it costs.
        """
        self.rate = 0.0
        self.new_blocks = self.free_picks = 0
        self._settings = settings
        self._shape = shape
        self._kernel = kernel
        self._free: dict[int, deque[int]] = {}
        self._last: dict[int, set[int]] = {}
        self._cursor: dict[int, int] = {}
        self._layer = 0

    def vectors(self, layer: int, tokens: Tokens, query: Tensor | None) -> Tensor:
        """See `vllm_sparse.policies.selectors.Selector`; only notes what is asked for."""
        self._layer, index = layer, tokens.index
        return torch.zeros(len(index), *self._shape, device=index.device)

    def select_blocks(
        self,
        compressed: Tensor,
        vectors: Tensor,
        table: Tensor,
        positions: Tensor,
        *rest: Any,
        **options: Any,
    ) -> Selected:
        """Takes the place of the selection kernel; the same blocks for all layers and heads."""
        vectors = vectors.to(compressed.dtype)
        selected = self._kernel(compressed, vectors, table, positions, *rest, **options)
        if self._layer == 0:  # a new step
            wanted = [self._advance(row, at) for row, at in enumerate(positions.tolist())]
            self._wanted = torch.tensor(wanted, dtype=torch.int32)
        heads = compressed.shape[1]
        blocks = self._wanted[:, None].expand(-1, heads, -1).contiguous()
        physical = table.gather(1, self._wanted.long())[:, None]
        head = torch.arange(heads, dtype=torch.int32)[:, None]
        return selected._replace(blocks=blocks, pieces=physical * heads + head)

    def scores(self, vectors: Tensor, keys: Tensor, positions: Tensor) -> Tensor:
        """Not used: prompts are dense, and decode has a ranking."""
        raise NotImplementedError

    def record(self, layer: int, query: Tensor, slots: Tensor, last: Tensor) -> None:
        """Nothing to keep."""

    def _advance(self, row: int, position: int) -> list[int]:
        """Returns the blocks that a request reads in its next step."""
        settings = self._settings
        own = position // settings.block_size
        first, end = settings.init_blocks, own - settings.local_blocks
        forced = {*range(first), *range(end, own + 1)}
        count = settings.blocks_read - len(forced)
        last = self._last.get(row)
        if last is None:
            free = self._free[row] = deque(range(first, first + count))
            self._cursor[row] = first
        else:
            free = self._free[row]
            replaced = round(self.rate * count)
            if replaced + len(last | forced) > own + 1:
                raise RuntimeError(f"{own + 1} blocks are too few to replace {replaced}")
            for _ in range(replaced):
                free.popleft()
            while len(free) < count:
                block = first + (self._cursor[row] - first) % (end - first)
                self._cursor[row] = block + 1
                if block not in last and block not in free:
                    free.append(block)
            self.new_blocks += len({*forced, *free} - last)
            self.free_picks += count
        self._last[row] = {*forced, *free}
        return sorted(self._last[row])


class CountingLane:
    """Counts the bytes that pass through a lane.

    Attributes:
        nbytes: Bytes forked so far.
    """

    def __init__(self, lane: Lane) -> None:
        """Wraps a lane."""
        self.nbytes = 0
        self._lane = lane
        self.close = lane.close

    def fork(self, work: Callable[[], object], nbytes: int = 0) -> Ticket:
        """See `vllm_sparse.prefetch.lane.Lane`."""
        self.nbytes += nbytes
        return self._lane.fork(work, nbytes)


def force_selection(worker: Any) -> None:
    """Installs a `ForcedSelector` for decode and a `CountingLane`."""
    runtime = sparda_runtime(worker)
    geometry, kernels = runtime.pager.geometry, runtime.kernels
    shape = geometry.num_kv_heads, geometry.head_dim
    selector = ForcedSelector(runtime.settings, shape, kernels.select_blocks)
    runtime.selector = selector
    runtime.kernels = kernels._replace(select_blocks=selector.select_blocks)
    runtime.fetcher._lane = CountingLane(runtime.fetcher._lane)


def set_rate(worker: Any, rate: float) -> None:
    """Sets the share of the free picks that each step replaces."""
    sparda_runtime(worker).selector.rate = rate


def forced_counts(worker: Any) -> dict[str, float]:
    """Returns the plugin's counters, and what they have to be.

    ``engine_bytes`` passed through the lane; ``expected_misses`` follow from the block sets
    that were forced, and ``piece_bytes`` is the size of each.
    """
    from vllm_sparse import metrics

    runtime = sparda_runtime(worker)
    geometry, selector = runtime.pager.geometry, runtime.selector
    paged = sum(not geometry.is_resident(layer) for layer in range(geometry.num_layers))
    counted = {name: metrics.counters().value(name) for name in COUNTED}
    counted["engine_bytes"] = runtime.fetcher._lane.nbytes
    return {
        **counted,
        "expected_misses": selector.new_blocks * geometry.num_kv_heads * paged,
        "free_picks": selector.free_picks * geometry.num_kv_heads * paged,
    }


def shape(worker: Any) -> dict:
    """Returns what the arithmetic of a result needs."""
    geometry = sparda_runtime(worker).pager.geometry
    return {
        "layers": geometry.num_layers,
        "kv_heads": geometry.num_kv_heads,
        "piece_bytes": geometry.piece_bytes,
        "frames": list(geometry.frames),
    }
