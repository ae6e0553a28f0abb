# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Fetches for decode: issued a layer ahead where the selection allows it, awaited where read."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from vllm_sparse.counters import DeviceCounters
from vllm_sparse.errors import VllmSparseError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from vllm_sparse.kernels.dispatch import SpardaKernels
    from vllm_sparse.kernels.types import Selected
    from vllm_sparse.kv.host.pager import Pager
    from vllm_sparse.prefetch.lane import Lane, Ticket


class SlabFullError(VllmSparseError, RuntimeError):
    """A step reads more pieces than a layer has frames; start-up should have ruled that out."""


class _Fetch(NamedTuple):
    selected: Selected
    frames: Tensor
    ticket: Ticket | None
    copies: int  # 0 where the host does not know
    ahead: bool


# What resolving counts: for layers that are about to run, and for those after them. The two begin
# 32 bytes apart, or Triton would compile kernels for the alignment of each.
_COUNTED = (
    *("frame_hits", "frame_misses", "slab_full", "unused"),
    *("frame_hits", "prefetch_issued", "slab_full", "unused"),
)


class Fetcher:
    """One step's fetches, layer by layer.

    A selection that is known in layer *l* for layer *l + 1* is announced there; the misses are
    copied while *l* computes, and *l + 1* waits only for its own.

    Args:
        pager: Blocks and frames.
        kernels: What looks up and copies.
        lane: Where copies run.
        count: Receives counter names and amounts.
        prefetch: Off: announced selections are fetched when their layer runs.
        captured: Graphs may replay steps, of whose work the host then reads nothing back.

    Attributes:
        step: Number of the step, int64 ``[1]``.
        counters: Hits, misses and whether the slab was ever too small.
        kernels: May be replaced between steps.
        prefetch: May be changed between steps.
    """

    def __init__(
        self,
        pager: Pager,
        kernels: SpardaKernels,
        lane: Lane,
        count: Callable[..., None],
        prefetch: bool = True,
        captured: bool = False,
    ) -> None:
        self.kernels = kernels
        self.prefetch = prefetch
        self._pager = pager
        self._lane = lane
        self._count = count
        device = pager.layers[0].slab.device
        self.step = torch.ones(1, dtype=torch.int64, device=device)
        self.counters = DeviceCounters(_COUNTED, device, self._publish, captured=captured)
        self._counted = self.counters.values.view(2, 4)[:, :3].unbind()
        self._copies = [0, 0]
        self._announced: dict[int, Selected] = {}
        self._fetches: dict[int, _Fetch] = {}

    def begin_step(self) -> None:
        """Number the step; forget what one that failed half-way has left."""
        self.step.add_(1)
        self._announced.clear()
        left, self._fetches = self._fetches, {}
        for fetch in left.values():
            if fetch.ahead:
                self._count("prefetch_wasted", fetch.copies)
            if fetch.ticket is not None:
                fetch.ticket.wait()

    def poll(self) -> None:
        """Called between steps: publish what a device has counted, as far as it has arrived."""
        self.counters.poll()

    def end_step(self) -> None:
        """Publish what the step counted, where that needs no waiting."""
        self.counters.settle()

    def announce(self, layer: int, selected: Selected, *, ahead: bool) -> None:
        """Say what a layer will read.

        Args:
            layer: The layer.
            selected: Its selection.
            ahead: The layer before is still to compute.
        """
        if ahead and not self.prefetch:
            self._announced[layer] = selected
        else:
            self._fetches[layer] = self._fetch(layer, selected, ahead)

    def wait(self, layer: int) -> None:
        """Wait for what is on its way into a layer's frames, so that they may be written."""
        fetch = self._fetches.get(layer)
        if fetch is None or fetch.ticket is None:
            return
        if fetch.ahead and fetch.copies and not fetch.ticket.done:
            self._count("prefetch_late", fetch.copies)
        if waited := fetch.ticket.wait():
            self._count("exposed_wait_seconds", waited)
        self._fetches[layer] = fetch._replace(ticket=None)

    def announced(self, layer: int) -> bool:
        """Whether somebody said what a layer will read."""
        return layer in self._fetches or layer in self._announced

    def take(self, layer: int) -> tuple[Tensor, Tensor]:
        """What was announced for a layer, once its frames hold it.

        Returns:
            Frames, int32 ``[R, G, K]``, and the tokens in them, int32 ``[R]``.
        """
        if layer in self._announced:
            self._fetches[layer] = self._fetch(layer, self._announced.pop(layer), False)
        self.wait(layer)
        fetch = self._fetches.pop(layer)
        return fetch.frames, fetch.selected.lengths

    def _fetch(self, layer: int, selected: Selected, ahead: bool) -> _Fetch:
        """Give the selected blocks of a layer frames; fill them beside the computation."""
        pager, kernels = self._pager.layers[layer], self.kernels
        readable = self.counters.readable
        if pager.resident and not readable:  # on a GPU, counting hits would take launches
            return _Fetch(selected, selected.pieces, None, 0, ahead)
        counted = self._counted[ahead]
        found = kernels.resolve(pager.table, selected.pieces, self.step, counted)
        copies = 0
        if readable:
            _, misses, full = counted.tolist()
            if full:
                raise SlabFullError(_full(len(pager.slab)))
            copies, self._copies[ahead] = misses - self._copies[ahead], misses
            if not copies:
                return _Fetch(selected, found.frames, None, 0, ahead)
        if pager.poison:
            pager.poison_frames(found.targets, found.misses)

        def work() -> object:
            kernels.copy_pieces(
                pager.slab, found.targets, pager.pieces, found.missing, found.misses
            )
            return found

        ticket = self._lane.fork(work, copies * self._pager.geometry.piece_bytes)
        return _Fetch(selected, found.frames, ticket, copies, ahead)

    def _publish(self, name: str, amount: int) -> None:
        if name == "slab_full":
            raise SlabFullError(_full(min(self._pager.geometry.frames)))
        self._count(name, amount)
        if name == "prefetch_issued":
            self._count("frame_misses", amount)
        if name != "frame_hits":
            piece_bytes = self._pager.geometry.piece_bytes
            self._count("host_to_device_bytes", amount * piece_bytes)


def _full(frames: int) -> str:
    return (
        f"all {frames} frames of the device slab are in use in this step, which start-up should "
        "have ruled out; raise vllm_sparse.slab_gib and report this"
    )
