# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Plans a step of SPARDA, whatever the batch consists of.

Lengths are known on the host, and all that follows from them is computed there. Block ids are only
looked up where the table is, so that nothing waits for a device.
"""

from __future__ import annotations

from itertools import compress
from operator import not_
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from vllm_sparse.control import REQUESTED
from vllm_sparse.policies.selectors import Tokens
from vllm_sparse.prefetch.stream import Tile
from vllm_sparse.steps.host_step import DecodeRows, FreshRows, PromptRow, SpardaStep, WindowList
from vllm_sparse.upload import upload

if TYPE_CHECKING:
    from collections.abc import Callable

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


class _Batch(NamedTuple):
    """A step: of its ``R`` rows what `plan` is given and where their first token stands, of its
    ``T`` tokens ``row`` and ``position``, all on the host; and the table, wherever it is.
    """

    query_start: Tensor
    seq_lens: Tensor
    prompt_lens: Tensor
    start: Tensor
    row: Tensor
    position: Tensor
    table: Tensor

    def there(self, tensor: Tensor) -> Tensor:
        """A tensor of the host's where the table is."""
        return upload(tensor, self.table.device)


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
            replayed: Host bool ``[R]``: rows of requests that were preempted with outputs;
                ``None`` where nobody tells.

        Returns:
            The metadata, in part on the host.
        """
        batch = self._read(query_start, seq_lens, prompt_lens, block_table)
        row, position = batch.there(batch.row), batch.there(batch.position)
        slots = self._slots(batch, row, position)
        before = self._slots(batch, row, position - 1)
        borrowed, previous = self._earlier(batch, slots, before, may_borrow)
        size, index = self._settings.block_size, torch.arange(len(batch.row))
        tokens = Tokens(batch.there(index), position, before // size, batch.there(previous))
        ends = (batch.query_start[1:] - 1)[batch.row]
        last = ((batch.position + 1) % size == 0) | (index == ends)
        alone = batch.query_start.diff() == 1
        decoding = alone & (batch.start >= batch.prompt_lens) & ~borrowed.any(1)
        if dense is not None:
            decoding &= ~dense
        dense_until = self._dense_until(batch, dense)
        prompts, tiles = self._prompts(batch, tokens, dense_until, ~decoding, borrowed)
        self.count_requests(batch.start, batch.seq_lens, batch.prompt_lens, dense, replayed)
        return SpardaStep(
            len(batch.row),
            slots,
            last.nonzero()[:, 0],
            self._windows(batch, slots),
            self._decode(batch, tokens, decoding),
            *self._fresh(prompts),
            tiles,
        )

    def _read(
        self, query_start: Tensor, seq_lens: Tensor, prompt_lens: Tensor, block_table: Tensor
    ) -> _Batch:
        """What follows from lengths alone; no more of the table than the longest row takes."""
        query_start, seq_lens, prompt_lens = (
            x.long() for x in (query_start, seq_lens, prompt_lens)
        )
        query_lens, num_tokens = query_start.diff(), int(query_start[-1])
        start = seq_lens - query_lens
        row = torch.repeat_interleave(
            torch.arange(len(seq_lens)), query_lens, output_size=num_tokens
        )
        position = torch.arange(num_tokens) - query_start[:-1][row] + start[row]
        width = -(-int(seq_lens.max()) // self._settings.block_size)
        table = block_table[:, :width].long()
        return _Batch(query_start, seq_lens, prompt_lens, start, row, position, table)

    def _slots(self, batch: _Batch, row: Tensor, position: Tensor) -> Tensor:
        """Slots of tokens, all of it where the table is; a token before the first has any."""
        size, position = self._settings.block_size, position.clamp(min=0)
        return batch.table[row, position // size] * size + position % size

    def _earlier(
        self, batch: _Batch, slots: Tensor, before: Tensor, may_borrow: bool
    ) -> tuple[Tensor, Tensor]:
        """Where earlier tokens of rows are found in this very step, on the host.

        Args:
            batch: The step.
            slots: Of its tokens.
            before: Slots of the tokens before them.
            may_borrow: Some row may read blocks that this step writes.

        Returns:
            Blocks as of :func:`borrowed_blocks`, and the batch position of the token before each
            token, -1 if it has none.
        """
        start, index = batch.start, torch.arange(len(batch.row))
        previous = torch.where(batch.position > start[batch.row], index - 1, -1)
        if not may_borrow:
            return torch.zeros(batch.table.shape, dtype=torch.bool), previous
        size = self._settings.block_size
        past = batch.there(start // size)
        borrowed = borrowed_blocks(slots // size, batch.table, past, self.num_blocks).cpu()
        first = batch.query_start[:-1][borrowed.any(1) & (batch.query_start.diff() > 0)]
        if len(first):  # the token before may be another row's
            same = slots == before[batch.there(first)][:, None]
            previous[first] = torch.where(same.any(1), same.byte().argmax(1), -1).cpu()
        return borrowed, previous

    def _dense_until(self, batch: _Batch, dense: Tensor | None) -> Tensor:
        """Tokens of each row's request that read everything, host ``[R]``."""
        until = torch.full_like(batch.prompt_lens, self._settings.dense_len)
        if not self._settings.sparse_prefill:
            until = torch.maximum(until, batch.prompt_lens)
        return until if dense is None else torch.where(dense, batch.seq_lens, until)

    def _windows(self, batch: _Batch, slots: Tensor) -> WindowList:
        """Windows that the tokens complete, of which members may be of earlier steps."""
        size, stride = self._settings.block_size, self._settings.kernel_stride
        start, position = batch.start, batch.position
        completes = ((position + 1) % stride == 0) & (position + 1 >= 2 * stride)
        closing, owner = position[completes], batch.row[completes]
        members = closing[:, None] - torch.arange(2 * stride - 1, -1, -1)
        tokens = (batch.query_start[:-1] - start)[owner][:, None] + members
        older = members < start[owner][:, None]
        tokens[older] = len(position) + torch.arange(int(older.sum()))
        # A window is stored with the block that holds its last token: earlier blocks may be shared
        # with requests that continue differently. Block m holds windows 4m - 1 to 4m + 2.
        closing_slots = slots[batch.there(completes.nonzero()[:, 0])]
        window = batch.there(closing % size // stride)
        owners = owner[:, None].expand_as(members)
        older_slots = self._slots(batch, batch.there(owners[older]), batch.there(members[older]))
        return WindowList(closing_slots // size * (size // stride) + window, tokens, older_slots)

    def _decode(self, batch: _Batch, tokens: Tokens, decoding: Tensor) -> DecodeRows | None:
        rows = decoding.nonzero()[:, 0]
        if not len(rows):
            return None
        lens = batch.seq_lens[rows]
        scored = self.count_rows(lens)
        own = tokens[batch.there(batch.query_start[:-1][rows])]
        width = -(-int(lens.max()) // self._settings.block_size)
        return DecodeRows(
            own,
            own.positions,
            batch.table[batch.there(rows), :width].int(),
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
        blocks = (seq_lens + (size - 1)) // size
        most = blocks.clamp(max=settings.blocks_read)
        reads = torch.where(seq_lens <= settings.dense_len, blocks, most)
        visible, selected = int(blocks.sum()), int(reads.sum())
        self._count("decode_rows", int((blocks > 0).sum()))
        self._count("visible_blocks", visible)
        self._count("selected_blocks", selected)
        return selected < visible

    def _prompts(
        self,
        batch: _Batch,
        tokens: Tokens,
        dense_until: Tensor,
        streamed: Tensor,
        borrowed: Tensor,
    ) -> tuple[tuple[PromptRow, ...], tuple[Tile, ...]]:
        settings, size = self._settings, self._settings.block_size
        prompts: list[PromptRow] = []
        tiles: list[Tile] = []
        for r in streamed.nonzero()[:, 0].tolist():
            begin, end = batch.query_start[r : r + 2].tolist()
            if begin == end:
                continue
            first, length = int(batch.start[r]), int(batch.seq_lens[r])
            prompt_len = int(batch.prompt_lens[r])
            blocks = batch.table[r, : -(-length // size)]
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
            dense: Host bool ``[R]``: rows of requests that ask to read everything; ``None``: none.
            replayed: Host bool ``[R]``: rows of requests that were preempted with outputs;
                ``None`` where nobody tells.
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
