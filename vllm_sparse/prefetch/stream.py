# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Streams the earlier chunks of prompts back from host memory, one tile ahead of the computation.

The order is known: tile after tile, layer after layer, through the two halves of a staging area of
fixed size. Of a sparse prompt's tiles, only blocks that some token of the chunk chose are copied,
once the layer has chosen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from vllm_sparse.counters import DeviceCounters
from vllm_sparse.upload import upload

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vllm_sparse.kernels.dispatch import SpardaKernels
    from vllm_sparse.kv.host.pager import Pager
    from vllm_sparse.prefetch.lane import Lane, Ticket


_COUNTED = ("prompt_blocks_visible", "prompt_blocks_needed", "streamed_bytes")


class Tile(NamedTuple):
    """Consecutive blocks of one prompt that are staged together.

    Attributes:
        blocks: Physical blocks, int64 ``[n]``.
        first_block: Logical index of the first one.
        tokens: Tokens of this prompt in them that were computed in earlier steps.
        late: Another request writes one of the blocks in this very step (vLLM shares a block as
            soon as it is scheduled), so it can be read only after the layer has written it.
        picked: Every token that reads it chooses its blocks, which each layer says before it reads.
    """

    blocks: Tensor
    first_block: int
    tokens: int
    late: bool
    picked: bool = False


class PromptStream:
    """The staging area and what is on its way into it.

    Args:
        pager: Blocks and frames.
        kernels: What copies.
        lane: Where copies run.
        tile_blocks: Blocks per half of the staging area.
        count: Receives counter names and amounts.
        prefetch: Off: every tile is copied when it is read.
        captured: Graphs may replay steps, of whose work the host then reads nothing back.
    """

    def __init__(
        self,
        pager: Pager,
        kernels: SpardaKernels,
        lane: Lane,
        tile_blocks: int,
        count: Callable[..., None],
        prefetch: bool = True,
        captured: bool = False,
    ) -> None:
        geometry = pager.geometry
        self.tile_blocks = tile_blocks
        self._pager = pager
        self._kernels = kernels
        self._lane = lane
        self._count = count
        self._prefetch = prefetch
        self.staging = torch.empty(
            2,
            tile_blocks * geometry.num_kv_heads,
            geometry.block_size,
            2 * geometry.head_dim,
            dtype=pager.host.dtype,
            device=pager.layers[0].slab.device,
        )
        self._heads = torch.arange(geometry.num_kv_heads, device=self.staging.device)
        most = self.staging.shape[1]
        self._places = torch.arange(most, dtype=torch.int32, device=self.staging.device)
        self._tiles: Sequence[Tile] = ()
        self._pieces: list[tuple[Tensor, Tensor]] = []
        self._tickets: dict[int, Ticket] = {}
        self._needed: dict[int, Tensor] = {}
        self._counted = DeviceCounters(_COUNTED, self.staging.device, count, captured=captured)

    @property
    def nbytes(self) -> int:
        """Device bytes of the staging area."""
        return self.staging.nbytes

    def begin_step(self, tiles: Sequence[Tile]) -> None:
        """Set the tiles that every layer of this step reads, in order."""
        for ticket in self._tickets.values():
            ticket.wait()
        self._tickets.clear()
        self._needed.clear()
        self._tiles = tiles
        self._pieces = [self._pieces_of(tile) for tile in tiles]  # the same in every layer

    def end_step(self) -> None:
        """Publish what the step counted, where that needs no waiting."""
        self._counted.settle()

    def poll(self) -> None:
        """Called between steps: publish what a device has counted, as far as it has arrived."""
        self._counted.poll()

    def note_needs(self, tiles: tuple[int, int], chosen: Tensor, earlier: int) -> None:
        """Say what a row's sparse tokens need in a layer, before any tile of the layer is read.

        Args:
            tiles: Index of the row's first and after its last tile.
            chosen: Blocks that each token reads, bool ``[G, T, blocks]``.
            earlier: Blocks before those that hold the row's own tokens, which are always needed.
        """
        needed = chosen.any(1)
        self._counted.values[0] += len(needed) * earlier
        self._counted.values[1] += needed[:, :earlier].sum()
        for index in range(*tiles):
            tile = self._tiles[index]
            if tile.picked:
                end = tile.first_block + len(tile.blocks)
                self._needed[index] = needed[:, tile.first_block : end]

    def _pieces_of(self, tile: Tile) -> tuple[Tensor, Tensor]:
        """The pieces of a tile, head-major, and how many they are, on the device."""
        blocks = upload(tile.blocks, self.staging.device)
        pieces = (blocks * len(self._heads) + self._heads[:, None]).flatten().int()
        count = torch.full((1,), len(pieces), dtype=torch.int32, device=pieces.device)
        return pieces, count

    def read(self, layer: int, index: int) -> Tensor:
        """Wait for a tile; start the copy of the one after it.

        Args:
            layer: The layer, whose new tokens are written.
            index: Position in the order given to :meth:`begin_step`; to be read in that order.

        Returns:
            Head-major rows ``[G, tile tokens, 2 * D]``, a view that the next read may overwrite.
            Rows beyond ``tile.tokens`` are garbage, and so are blocks that nobody needs.
        """
        number = layer * len(self._tiles) + index
        if number not in self._tickets:
            self._submit(number)
        self._count("exposed_wait_seconds", self._tickets.pop(number).wait())
        following = number + 1
        if self._prefetch and following < self._pager.geometry.num_layers * len(self._tiles):
            another_layer = index + 1 == len(self._tiles)
            if not (another_layer and (self._tiles[0].late or self._tiles[0].picked)):
                self._submit(following)
        blocks = self._tiles[index].blocks
        rows = self.staging[number % 2, : len(blocks) * len(self._heads)]
        return rows.unflatten(0, (len(self._heads), len(blocks))).flatten(1, 2)

    def _submit(self, number: int) -> None:
        layer, index = divmod(number, len(self._tiles))
        (pieces, count), pager = self._pieces[index], self._pager.layers[layer]
        staging, places = self.staging[number % 2], self._places[: len(pieces)]
        nbytes, piece_bytes = len(pieces) * self._pager.geometry.piece_bytes, 0
        if self._tiles[index].picked:
            needed = self._needed.pop(index).flatten()
            # Needed ones first; how many they are stays on the device.
            places = needed.int().argsort(descending=True, stable=True).int()
            pieces, count = pieces[places], needed.sum(dtype=torch.int32)[None]
            piece_bytes = self._pager.geometry.piece_bytes
            nbytes = int(count) * piece_bytes if self._counted.readable else 0

        def work() -> object:
            self._kernels.copy_pieces(staging, places, pager.source, pieces, count)
            return places, pieces, count

        self._tickets[number] = self._lane.fork(work, nbytes)
        if pager.resident:
            return
        if piece_bytes:
            self._counted.values[2] += count[0].long() * piece_bytes
        else:
            self._count("streamed_bytes", nbytes)
