# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Fetches for decode: issued a layer ahead where the selection allows it, awaited where read."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from vllm_sparse.kv.host.pager import Pager
    from vllm_sparse.prefetch.engine import CopyEngine, Ticket


class _Fetch(NamedTuple):
    frames: Tensor
    copies: int
    ticket: Ticket
    ahead: bool


class PrefetchScheduler:
    """One step's fetches, layer by layer.

    A selection that is known in layer *l* for layer *l + 1* is announced there; the misses are
    copied while *l* computes, and *l + 1* waits only for its own.

    Args:
        pager: Blocks and frames.
        engine: Copies.
        count: Receives counter names and amounts.
        prefetch: Off: announced selections are fetched when their layer runs.
    """

    def __init__(
        self, pager: Pager, engine: CopyEngine, count: Callable[..., None], prefetch: bool = True
    ) -> None:
        self._pager = pager
        self._engine = engine
        self._count = count
        self._prefetch = prefetch
        self._announced: dict[int, Tensor] = {}
        self._fetches: dict[int, _Fetch] = {}

    def begin_step(self) -> None:
        """Forget what a step that failed half-way has left."""
        self._announced.clear()
        left, self._fetches = self._fetches, {}
        for fetch in left.values():
            if fetch.ahead:
                self._count("prefetch_wasted", fetch.copies)
            fetch.ticket.wait()

    def announce(self, layer: int, blocks: Tensor, *, ahead: bool) -> None:
        """Say what a layer will read.

        Args:
            layer: The layer.
            blocks: Physical blocks, int64 ``[T, G, K]``, -1 for none.
            ahead: The layer before is still to compute.
        """
        if ahead and not self._prefetch:
            self._announced[layer] = blocks
        else:
            self._fetches[layer] = self._fetch(layer, blocks, ahead)

    def take(self, layer: int) -> Tensor:
        """The frames of what was announced for a layer, once they hold it.

        Returns:
            int32 ``[T, G, K]``.
        """
        if layer in self._announced:
            self._fetches[layer] = self._fetch(layer, self._announced.pop(layer), False)
        fetch = self._fetches.pop(layer)
        if fetch.ahead and not fetch.ticket.done:
            self._count("prefetch_late", fetch.copies)
        self._count("exposed_wait_seconds", fetch.ticket.wait())
        return fetch.frames

    def _fetch(self, layer: int, blocks: Tensor, ahead: bool) -> _Fetch:
        pager = self._pager.layers[layer]
        found = pager.resolve(blocks)
        copies = len(found.missing)
        ticket = self._engine.submit(pager.slab, found.targets, pager.pieces, found.missing)
        self._count("frame_hits", found.hits)
        self._count("frame_misses", copies)
        self._count("host_to_device_bytes", copies * self._pager.geometry.piece_bytes)
        if ahead:
            self._count("prefetch_issued", copies)
        return _Fetch(found.frames, copies, ticket, ahead)
