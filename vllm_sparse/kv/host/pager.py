# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Every KV block lives in host memory; device frames cache the ones that decode reads.

Blocks keep the ids that vLLM gave them, so its scheduler, prefix cache and preemption manage host
memory without knowing it. The host copy is write-through and always complete: dropping a frame
never writes anything, and a frame always equals its piece on the host. A layer of which a GPU has
every block in a frame needs none: its frames are its blocks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vllm_sparse.errors import IntegrityError
from vllm_sparse.kernels.types import PageTable
from vllm_sparse.kv.host.memory import page_aligned

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm_sparse.kv.host.geometry import Geometry


class LayerPager:
    """One layer's host blocks, frames and page table.

    Attributes:
        host: The blocks, ``[blocks, G, block_size, 2 * D]``; on a GPU, those of a resident layer
            are its frames.
        pieces: The same as pieces, ``[blocks * G, block_size, 2 * D]``.
        slab: The frames, ``[frames, block_size, 2 * D]``.
        table: Which frame holds which piece.
        resident: Every piece has a frame for good.

    Args:
        host: The layer's blocks, ``[blocks, G, block_size, 2 * D]``, as the device sees them.
        slab: The layer's frames; as many as pieces makes the layer resident.
        poison: Fill memory that must not be read with NaN.
    """

    def __init__(self, host: Tensor, slab: Tensor, poison: bool) -> None:
        self.host = host
        self.slab = slab
        device, num_frames = slab.device, len(slab)
        self.num_blocks, self.num_kv_heads, self.block_size, self.width = host.shape
        self.resident = num_frames == self.num_blocks * self.num_kv_heads
        self.poison = poison
        self.pieces = host.flatten(0, 1)
        if poison:
            self.slab.fill_(torch.nan)
            self.host.fill_(torch.nan)
        pieces = self.num_blocks * self.num_kv_heads
        self.table = PageTable(
            torch.full((pieces,), -1, dtype=torch.int32, device=device),
            torch.full((num_frames,), -1, dtype=torch.int64, device=device),
            torch.zeros(num_frames, dtype=torch.int64, device=device),
            torch.zeros(num_frames, dtype=torch.bool, device=device),
            torch.zeros(1, dtype=torch.int64, device=device),
        )
        if self.resident:  # for good: piece p is in frame p
            torch.arange(pieces, out=self.table.frame_of)
            torch.arange(pieces, out=self.table.piece_of)

    @property
    def source(self) -> Tensor:
        """Where a prompt is streamed from: the frames if they hold everything, else the host."""
        return self.slab if self.resident else self.pieces

    def poison_fresh(self, slots: Tensor) -> None:
        """Fill the blocks and frames that get their first token, before it is written.

        Args:
            slots: ``block * block_size + offset`` of each token, negative for padding, ``[T]``.
        """
        block = slots[(slots >= 0) & (slots % self.block_size == 0)] // self.block_size
        self.host[block] = torch.nan
        head = torch.arange(self.num_kv_heads, device=slots.device)
        frame = self.table.frame_of[block[:, None] * self.num_kv_heads + head].long()
        self.slab[frame[frame >= 0]] = torch.nan

    def poison_frames(self, frames: Tensor, count: Tensor) -> None:
        """Fill frames that something is about to be copied into.

        Args:
            frames: Their numbers, int32, of which the first ones count.
            count: How many do, int32 ``[1]``.
        """
        self.slab[frames[: int(count)].long()] = torch.nan

    def check_integrity(self) -> None:
        """Compare the two directions of the page table and every frame with its host piece.

        Call it between steps.

        Raises:
            IntegrityError: They differ.
        """
        held = (self.table.frame_of >= 0).nonzero()[:, 0]
        frames = self.table.frame_of[held].long()
        if len(frames.unique()) != len(frames) or not self.table.piece_of[frames].equal(held):
            raise IntegrityError("two pieces share a frame of the device slab")
        if int((self.table.piece_of >= 0).sum()) != len(held):
            raise IntegrityError("a frame of the device slab names a piece that is elsewhere")
        if self.resident and not self.poison:
            return  # pieces that were never written hold anything
        frame_bits, piece_bits = (
            part.view(torch.uint8) for part in (self.slab[frames], self.pieces[held])
        )
        if not frame_bits.equal(piece_bits):
            raise IntegrityError("a frame of the device slab differs from its block on the host")


class Pager:
    """The caches of all layers.

    Attributes:
        host: The host pool, ``[layers, blocks, G, block_size, 2 * D]``. A GPU's lacks the layers
            that are resident: they would be read over the link although the device has them.
        layers: The layers.

    Args:
        geometry: Sizes.
        dtype: Of keys and values.
        poison: Fill memory that must not be read with NaN, for tests and debugging.
        view: Pins the host pool and returns it as a GPU sees it; ``None`` where host and
            device are one memory.
        device: Where frames are.
    """

    def __init__(
        self,
        geometry: Geometry,
        dtype: torch.dtype,
        poison: bool = False,
        view: Callable[[Tensor], Tensor] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.geometry = geometry
        dim = 2 * geometry.head_dim
        shape = geometry.num_blocks, geometry.num_kv_heads, geometry.block_size, dim
        layers = range(geometry.num_layers)
        hosted = [i for i in layers if view is None or not geometry.is_resident(i)]
        if view is None or not hosted:
            self.host = seen = torch.empty(len(hosted), *shape, dtype=dtype, device="cpu")
        else:
            self.host = page_aligned((len(hosted), *shape), dtype)
            seen = view(self.host)
        blocks = dict(zip(hosted, seen, strict=True))
        self.layers = []
        for layer, frames in enumerate(geometry.frames):
            slab = torch.empty(frames, *shape[2:], dtype=dtype, device=device)
            host = blocks[layer] if layer in blocks else slab.view(shape)
            self.layers.append(LayerPager(host, slab, poison))

    def check_integrity(self) -> None:
        """Compare every layer's page table and frames with its host blocks, between steps."""
        for layer in self.layers:
            layer.check_integrity()

    def frames_in_use(self) -> int:
        """Frames that hold a piece."""
        return sum(int((layer.table.piece_of >= 0).sum()) for layer in self.layers)
