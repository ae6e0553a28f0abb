# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Plans a step of SPARDA, whatever the batch consists of.

Lengths are known on the host, and all that follows from them is computed there. Block ids are only
looked up where the table is, so that nothing waits for a device.
"""

from __future__ import annotations

from itertools import compress
from operator import not_
from typing import TYPE_CHECKING

import torch

from vllm_sparse.control import REQUESTED
from vllm_sparse.policies.selectors import Tokens
from vllm_sparse.prefetch.stream import Tile
from vllm_sparse.steps.host_step import DecodeRows, FreshRows, PromptRow, SpardaStep, WindowList
from vllm_sparse.upload import upload

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from vllm_sparse.policies.sparda import SpardaSettings


def borrowed_blocks(written: Tensor, table: Tensor, past_blocks: Tensor, num_blocks: int) -> Tensor:
    """Complete earlier blocks of rows that this very step writes.

    A block is shared as soon as it is scheduled. Who reads one that another request writes in this
    step must do so layer by layer, which the prompt path can.

    Args:
        written: Blocks that the step writes, int64.
        table: Physical blocks ``[R, blocks]``.
        past_blocks: Complete earlier blocks of each row, ``[R]``.
        num_blocks: Blocks of the host pool.

    Returns:
        bool ``[R, blocks]``.
    """
    marked = torch.zeros(num_blocks, dtype=torch.bool, device=table.device)
    marked[written] = True
    column = torch.arange(table.shape[1], device=table.device)
    return marked[table.long()] & (column < past_blocks[:, None])


class SpardaPlanner:
    """Splits a batch; only prompt rows are looped over.

    Args:
        settings: Block geometry and what is sparse.
        num_blocks: Blocks of the host pool.
        count: Receives counter names and amounts.
        split_fresh: Whether prompt rows without a past are served at once.
    """

    def __init__(
        self,
        settings: SpardaSettings,
        num_blocks: int,
        count: Callable[..., None],
        split_fresh: bool = False,
    ) -> None:
        self._settings = settings
        self.num_blocks = num_blocks
        self._count = count
        self._split_fresh = split_fresh

    def plan(
        self,
        query_start: Tensor,
        seq_lens: Tensor,
        prompt_lens: Tensor,
        block_table: Tensor,
        may_borrow: bool = True,
        dense: Tensor | None = None,
        replayed: Tensor | None = None,
    ) -> SpardaStep:
        """Plan one step.

        Args:
            query_start: Host ``[R + 1]``: where each row's tokens start in the batch.
            seq_lens: Host ``[R]``: tokens of each row after the step.
            prompt_lens: Host ``[R]``: prompt tokens of each row's request.
            block_table: ``[R, max_blocks]``, on the host or a device.
            may_borrow: Some row may read blocks that this step writes. Only one whose request is
                new may: later it has its blocks' content. Finding out waits for the device.
            dense: Host bool ``[R]``: rows of requests that ask to read everything, which they do
                as prompts do; ``None`` if there are none.
            replayed: As of :meth:`.Prompts.count`.

        Returns:
            The metadata, in part on the host.
        """
        settings, size = self._settings, self._settings.block_size
        query_start, seq_lens, prompt_lens = (
            x.long() for x in (query_start, seq_lens, prompt_lens)
        )
        num_tokens = int(query_start[-1])
        query_lens = query_start.diff()
        start = seq_lens - query_lens
        row = torch.repeat_interleave(
            torch.arange(len(seq_lens)), query_lens, output_size=num_tokens
        )
        index = torch.arange(num_tokens)
        position = index - query_start[:-1][row] + start[row]
        width = -(-int(seq_lens.max()) // size)
        table = block_table[:, :width].long()

        def there(tensor: Tensor) -> Tensor:
            return upload(tensor, table.device)

        def slot_of(row: Tensor, position: Tensor) -> Tensor:
            position = position.clamp(min=0)
            return table[row, position // size] * size + position % size

        row_there, position_there = there(row), there(position)
        slots = slot_of(row_there, position_there)
        last = ((position + 1) % size == 0) | (index == (query_start[1:] - 1)[row])
        before = slot_of(row_there, position_there - 1)
        previous = torch.where(position > start[row], index - 1, -1)

        stride = settings.kernel_stride
        completes = ((position + 1) % stride == 0) & (position + 1 >= 2 * stride)
        closing, owner = position[completes], row[completes]
        members = closing[:, None] - torch.arange(2 * stride - 1, -1, -1)
        window_tokens = (query_start[:-1] - start)[owner][:, None] + members
        older = members < start[owner][:, None]
        window_tokens[older] = num_tokens + torch.arange(int(older.sum()))
        per_block = size // stride
        # A window is stored with the block that holds its last token: earlier blocks may be shared
        # with requests that continue differently. Block m holds windows 4m - 1 to 4m + 2.
        closing_slots = slots[there(completes.nonzero()[:, 0])]
        window_slots = closing_slots // size * per_block + there(closing % size // stride)

        borrowed = torch.zeros(table.shape, dtype=torch.bool)
        if may_borrow:
            past = there(start // size)
            borrowed = borrowed_blocks(slots // size, table, past, self.num_blocks).cpu()
            first = query_start[:-1][borrowed.any(1) & (query_lens > 0)]
            if len(first):  # the token before may be another row's
                same = slots == before[there(first)][:, None]
                previous[first] = torch.where(same.any(1), same.byte().argmax(1), -1).cpu()
        tokens = Tokens(there(index), position_there, before // size, there(previous))
        decoding = (query_lens == 1) & (start >= prompt_lens) & ~borrowed.any(1)
        dense_until = torch.full_like(prompt_lens, settings.dense_len)
        if not settings.sparse_prefill:
            dense_until = torch.maximum(dense_until, prompt_lens)
        if dense is not None:
            decoding &= ~dense
            dense_until = torch.where(dense, seq_lens, dense_until)

        prompts, tiles = self._prompts(
            tokens, query_start, start, seq_lens, prompt_lens, dense_until, table, ~decoding,
            borrowed,
        )  # fmt: skip
        self.count_requests(start, seq_lens, prompt_lens, dense, replayed)
        owners = owner[:, None].expand_as(members)
        older_slots = slot_of(there(owners[older]), there(members[older]))
        windows = WindowList(window_slots, window_tokens, older_slots)
        return SpardaStep(
            num_tokens,
            slots,
            last.nonzero()[:, 0],
            windows,
            self._decode(tokens, query_start, seq_lens, table, decoding),
            *self._fresh(prompts),
            tiles,
        )

    def _decode(
        self,
        tokens: Tokens,
        query_start: Tensor,
        seq_lens: Tensor,
        table: Tensor,
        decoding: Tensor,
    ) -> DecodeRows | None:
        rows = decoding.nonzero()[:, 0]
        if not len(rows):
            return None
        lens = seq_lens[rows]
        scored = self.count_rows(lens)
        own = tokens[upload(query_start[:-1][rows], table.device)]
        width = -(-int(lens.max()) // self._settings.block_size)
        return DecodeRows(
            own,
            own.positions,
            table[upload(rows, table.device), :width].int(),
            None,
            scored,
            False,
        )

    def _fresh(
        self, prompts: tuple[PromptRow, ...]
    ) -> tuple[tuple[PromptRow, ...], FreshRows | None]:
        """Takes the prompt rows apart that need no streaming, if somebody serves those."""
        if not self._split_fresh:
            return prompts, None
        alone = [p.tiles[0] == p.tiles[1] and p.sparse_from == len(p) for p in prompts]
        fresh = list(compress(prompts, alone))
        if not fresh:
            return prompts, None
        index = torch.cat([torch.arange(prompt.begin, prompt.end) for prompt in fresh])
        starts = torch.tensor([0, *map(len, fresh)]).cumsum(0).int()
        rows = FreshRows(index, starts, max(map(len, fresh)))
        return tuple(compress(prompts, map(not_, alone))), rows

    def count_rows(self, seq_lens: Tensor) -> bool:
        """Count what rows that decode one token read.

        Args:
            seq_lens: Host ``[R]``: tokens of each row after the step, 0 for padding rows.

        Returns:
            Whether a row has more blocks than it reads.
        """
        settings, size = self._settings, self._settings.block_size
        blocks = [-(-length // size) for length in seq_lens.tolist()]
        reads = [
            count if length <= settings.dense_len else min(count, settings.blocks_read)
            for count, length in zip(blocks, seq_lens.tolist(), strict=True)
        ]
        self._count("decode_rows", sum(count > 0 for count in blocks))
        self._count("visible_blocks", sum(blocks))
        self._count("selected_blocks", sum(reads))
        return reads != blocks

    def _prompts(
        self,
        tokens: Tokens,
        query_start: Tensor,
        start: Tensor,
        seq_lens: Tensor,
        prompt_lens: Tensor,
        dense_until: Tensor,
        table: Tensor,
        streamed: Tensor,
        borrowed: Tensor,
    ) -> tuple[tuple[PromptRow, ...], tuple[Tile, ...]]:
        settings, size = self._settings, self._settings.block_size
        prompts: list[PromptRow] = []
        tiles: list[Tile] = []
        for r in streamed.nonzero()[:, 0].tolist():
            begin, end = query_start[r : r + 2].tolist()
            if begin == end:
                continue
            first, length, prompt_len = int(start[r]), int(seq_lens[r]), int(prompt_lens[r])
            blocks = table[r, : -(-length // size)]
            sparse_from = min(max(int(dense_until[r]) - first, 0), end - begin)
            if first and 0 < sparse_from < end - begin:
                self._count("prompt_chunks_streamed_whole", 1)
            first_tile = len(tiles)
            for b in range(0, -(-first // size), settings.staging_blocks):
                part = slice(b, min(b + settings.staging_blocks, -(-first // size)))
                covered = min(first - b * size, (part.stop - b) * size)
                late = bool(borrowed[r, part].any())
                tiles.append(Tile(blocks[part], b, covered, late, sparse_from == 0))
            prompts.append(
                PromptRow(
                    tokens[begin:end],
                    begin,
                    end,
                    first,
                    sparse_from,
                    min(max(prompt_len - first, 0), end - begin),
                    blocks,
                    (first_tile, len(tiles)),
                )
            )
        return tuple(prompts), tuple(tiles)

    def count_requests(
        self,
        start: Tensor,
        seq_lens: Tensor,
        prompt_lens: Tensor,
        dense: Tensor | None,
        replayed: Tensor | None = None,
    ) -> None:
        """Count each request once, when its prompt completes, by how it starts to decode.

        Args:
            start: Host ``[R]``: position of each row's first token.
            seq_lens: Host ``[R]``: tokens of each row after the step, 0 for padding rows.
            prompt_lens: Host ``[R]``: prompt tokens of each row's request.
            dense: As of :meth:`plan`.
            replayed: As of :meth:`.Prompts.count`.
        """
        finished = (start < prompt_lens) & (seq_lens == prompt_lens) & (seq_lens > 0)
        if replayed is not None:
            finished &= ~replayed
        if dense is not None:
            if asked := int((finished & dense).sum()):
                self._count("dense_fallbacks", asked, REQUESTED)
            finished &= ~dense
        is_short = prompt_lens[finished] < self._settings.dense_len
        if short := int(is_short.sum()):
            self._count("dense_fallbacks", short, "shorter_than_dense_len")
        if sparse := len(is_short) - short:
            self._count("requests", sparse)
