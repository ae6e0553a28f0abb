# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Forces what SPARDA chooses on a GPU, and switches how it fetches: functions for the worker.

They are called through `LLM.collective_rpc`, so they get vLLM's worker first. In a captured graph
Python runs only at capture; so the choice is computed on the device, and each way to fetch has
graphs of its own, between which a switch costs nothing.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from benchmarks import live

if TYPE_CHECKING:
    from torch import Tensor

GOLDEN_RATIO = 0.618
HEAD_SHIFT = 17


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
    """

    def __init__(self, runtime: Any, shortest: int) -> None:
        """Starts without anything new.

        Args:
            runtime: What all layers share.
            shortest: Tokens of the shortest request that will decode.
        """
        settings, device = runtime.settings, runtime.step.device
        always = settings.init_blocks + settings.local_blocks
        self.free_picks = settings.blocks_read - always - 1
        self._ring = shortest // settings.block_size - always
        if self._ring < self.free_picks:
            raise ValueError(f"requests of {shortest} tokens have too few blocks to choose from")
        near = range(max(1, int(GOLDEN_RATIO * self._ring)), self._ring + 2)
        self._multiplier = next(number for number in near if math.gcd(number, self._ring) == 1)
        self.replaced, self.new = torch.zeros(2, 1, dtype=torch.int64, device=device)
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
        """See the kernel, which still runs, so that selecting costs what it costs."""
        selected = self._kernel(compressed, vectors, table, positions, *rest, **options)
        if compressed.data_ptr() == self._runtime.compressed(0).data_ptr():
            blocks, pieces = self._choose(table, positions, compressed.shape[1])
            room = (0, selected.pieces.shape[2] - pieces.shape[2])
            blocks, pieces = (
                torch.nn.functional.pad(part, room, value=-1).int() for part in (blocks, pieces)
            )
            self._chosen = blocks, pieces
        assert self._chosen is not None, "layer 0 chooses first"
        blocks, pieces = self._chosen
        return selected._replace(blocks=blocks, pieces=pieces)

    def _choose(self, table: Tensor, positions: Tensor, kv_heads: int) -> tuple[Tensor, Tensor]:
        """The blocks that each row reads in this step, and their pieces, ``[R, G, blocks]``."""
        settings, device = self._settings, positions.device
        own = (positions // settings.block_size)[:, None, None]
        head = torch.arange(kv_heads, device=device)[None, :, None]
        place = self._runtime.step * self.replaced + HEAD_SHIFT * head
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
        nothing = padding[:, None, None]
        return blocks.masked_fill(nothing, -1), pieces.masked_fill(nothing, -1)


class _Steering:
    """Of one worker."""

    def __init__(self, worker: Any, shortest: int) -> None:
        self.runtime = live.sparda_runtime(worker)
        self.choice = ForcedChoice(self.runtime, shortest)
        self._worker = worker
        self._copy = self.runtime.kernels.copy_pieces
        self._none = torch.zeros(1, dtype=torch.int32, device=self.runtime.step.device)
        self._graphs: dict[Way, dict] = {}
        self.runtime.kernels = self.runtime.kernels._replace(select_blocks=self.choice)

    def fetch(self, way: Way) -> None:
        runtime = self.runtime
        runtime.fetcher.prefetch = way.prefetch
        copy = self._copy if way.copies else self._copy_nothing
        runtime.fetcher.kernels = runtime.kernels._replace(copy_pieces=copy)
        if not self._worker.vllm_config.compilation_config.cudagraph_mode.has_full_cudagraphs():
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


def graphs_of(runner: Any) -> tuple[Any, str]:
    """What holds the graphs of whole decode steps in either model runner, and the attribute."""
    manager = getattr(runner, "cudagraph_manager", None)
    return (runner.model, "concrete_cudagraph_entries") if manager is None else (manager, "graphs")


# Called through `collective_rpc`.


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
    """See `ForcedChoice.set_rate`."""
    return worker.steering.choice.set_rate(rate)


def device_bytes(worker: Any) -> dict[str, int]:
    """Device memory for keys and values, as allocated.

    ``compressed`` is what vLLM took for compressed keys of the host's blocks.
    """
    runtime = live.sparda_runtime(worker)
    return {
        "slab": runtime.pager.geometry.slab_bytes,
        "staging": runtime.stream.nbytes,
        "compressed": live.cache_bytes(worker),
    }


def counts(worker: Any) -> dict[str, int]:
    """What the device has counted, and what it had to be.

    Returns:
        ``hits`` and ``misses`` of pieces, ``expected_misses``, and ``bytes`` of the misses.
    """
    runtime, choice = worker.steering.runtime, worker.steering.choice
    geometry = runtime.pager.geometry
    paged = sum(not geometry.is_resident(layer) for layer in range(geometry.num_layers))
    hits, misses, *_ = runtime.fetcher.counters.values.view(-1, 4).sum(0).tolist()
    return {
        "hits": hits,
        "misses": misses,
        "expected_misses": int(choice.new) * geometry.num_kv_heads * paged,
        "bytes": misses * geometry.piece_bytes,
    }
