# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What one step asks of each SPARDA layer: tokens to store, rows to decode, prompts to stream."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vllm_sparse.policies.selectors import Tokens
from vllm_sparse.prefetch.stream import Tile

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm_sparse.config import SpardaSettings


@dataclass(frozen=True)
class DecodeRows:
    """Rows that decode one token each, served from frames.

    Attributes:
        tokens: Their tokens.
        block_table: Physical blocks, int64 ``[R, blocks]``.
        everything: Rows that read all their blocks, ``[R]``: few enough, or below ``dense_len``.
        scored: Whether any row needs a selection.
        width: Most blocks that a row reads.
        lengths: Tokens in each row's selected blocks, int32 ``[R]``.
    """

    tokens: Tokens
    block_table: Tensor
    everything: Tensor
    scored: bool
    width: int
    lengths: Tensor


@dataclass(frozen=True)
class PromptRow:
    """A row that is attended by streaming its earlier blocks back.

    Attributes:
        tokens: Its tokens.
        begin: Batch position of its first token.
        end: Batch position after its last token.
        start: Position of its first token in the request.
        sparse_from: Tokens of this row before the first sparse one.
        blocks: Physical blocks up to the row's last token, int64.
        tiles: Index of its first and after its last tile in the step's tiles.
    """

    tokens: Tokens
    begin: int
    end: int
    start: int
    sparse_from: int
    blocks: Tensor
    tiles: tuple[int, int]


@dataclass(frozen=True)
class SpardaStep:
    """Metadata of one step, shared by all layers.

    Attributes:
        num_tokens: Tokens in the batch.
        slots: ``block * block_size + offset`` of each token, int64 ``[T]``.
        last_in_block: Batch positions of the last token that this step writes to each block.
        window_slots: Windows of compressed keys that this step completes, as
            ``block * windows_per_block + slot``, int64 ``[W]``.
        window_tokens: The tokens of each: batch positions, or beyond the batch, positions in
            ``older_slots``, int64 ``[W, kernel_size]``.
        older_slots: Slots of the tokens of windows that earlier steps computed, int64.
        decode: Rows served from frames.
        prompts: Rows served by streaming.
        prompt_blocks: Blocks that prompt rows write.
        tiles: What the prompt rows stream, in order.
    """

    num_tokens: int
    slots: Tensor
    last_in_block: Tensor
    window_slots: Tensor
    window_tokens: Tensor
    older_slots: Tensor
    decode: DecodeRows | None
    prompts: tuple[PromptRow, ...]
    prompt_blocks: Tensor
    tiles: tuple[Tile, ...]


class SpardaPlanner:
    """Splits a batch; only prompt rows are looped over.

    Args:
        settings: Block geometry and what is sparse.
        num_blocks: Blocks of the host pool.
        count: Receives counter names and amounts.
    """

    def __init__(
        self, settings: SpardaSettings, num_blocks: int, count: Callable[..., None]
    ) -> None:
        self._settings = settings
        self._num_blocks = num_blocks
        self._count = count

    def plan(
        self, query_start: Tensor, seq_lens: Tensor, prompt_lens: Tensor, block_table: Tensor
    ) -> SpardaStep:
        """Plan one step.

        Args:
            query_start: Host ``[R + 1]``: where each row's tokens start in the batch.
            seq_lens: Host ``[R]``: tokens of each row after the step.
            prompt_lens: Host ``[R]``: prompt tokens of each row's request.
            block_table: Host ``[R, max_blocks]``.

        Returns:
            The metadata.
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

        def slot_of(row: Tensor, position: Tensor) -> Tensor:
            position = position.clamp(min=0)
            return table[row, position // size] * size + position % size

        slots = slot_of(row, position)
        last = ((position + 1) % size == 0) | (index == (query_start[1:] - 1)[row])
        tokens = Tokens(
            index,
            position,
            slot_of(row, position - 1) // size,
            torch.where(position > start[row], index - 1, -1),
        )

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
        window_slots = slots[completes] // size * per_block + closing % size // stride

        # A block is shared as soon as it is scheduled. Who reads one that another request writes
        # in this very step must do so layer by layer, which the prompt path can.
        written = torch.zeros(self._num_blocks, dtype=torch.bool)
        written[slots // size] = True
        past = torch.arange(width) < (start // size)[:, None]
        borrowed = written[table] & past
        decoding = (query_lens == 1) & (start >= prompt_lens) & ~borrowed.any(1)

        prompts, tiles = self._prompts(
            tokens, query_start, start, seq_lens, prompt_lens, table, ~decoding, borrowed
        )
        in_prompt = ~decoding[row]
        self._count_requests(start, seq_lens, prompt_lens)
        return SpardaStep(
            num_tokens,
            slots,
            last.nonzero()[:, 0],
            window_slots,
            window_tokens,
            slot_of(owner[:, None], members)[older],
            self._decode(tokens, query_start, seq_lens, table, decoding),
            prompts,
            (slots[in_prompt] // size).unique(),
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
        size, lens = self._settings.block_size, seq_lens[rows]
        blocks, everything, reads = self._reads(lens)
        self.count_rows(lens)
        return DecodeRows(
            tokens[query_start[:-1][rows]],
            table[rows, : int(blocks.max())],
            everything,
            not bool(everything.all()),
            int(reads.max()),
            ((reads - 1) * size + (lens - 1) % size + 1).int(),
        )

    def count_rows(self, seq_lens: Tensor) -> None:
        """Count what rows that decode one token read.

        Args:
            seq_lens: Host ``[R]``: tokens of each row after the step, 0 for padding rows.
        """
        blocks, _, reads = self._reads(seq_lens.long())
        self._count("decode_rows", int((seq_lens > 0).sum()))
        self._count("visible_blocks", int(blocks.sum()))
        self._count("selected_blocks", int(reads.sum()))

    def _reads(self, lens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Blocks of each row, whether it reads them all, and how many it reads."""
        settings = self._settings
        blocks = (lens + settings.block_size - 1) // settings.block_size
        everything = (lens <= settings.dense_len) | (blocks <= settings.blocks_read)
        return blocks, everything, torch.where(everything, blocks, settings.blocks_read)

    def _prompts(
        self,
        tokens: Tokens,
        query_start: Tensor,
        start: Tensor,
        seq_lens: Tensor,
        prompt_lens: Tensor,
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
            first, length = int(start[r]), int(seq_lens[r])
            dense_until = settings.dense_len
            if not settings.sparse_prefill:
                dense_until = max(dense_until, int(prompt_lens[r]))
            blocks = table[r, : -(-length // size)]
            first_tile = len(tiles)
            for b in range(0, -(-first // size), settings.staging_blocks):
                part = slice(b, min(b + settings.staging_blocks, -(-first // size)))
                covered = min(first - b * size, (part.stop - b) * size)
                tiles.append(Tile(blocks[part], b, covered, bool(borrowed[r, part].any())))
            prompts.append(
                PromptRow(
                    tokens[begin:end],
                    begin,
                    end,
                    first,
                    min(max(dense_until - first, 0), end - begin),
                    blocks,
                    (first_tile, len(tiles)),
                )
            )
        return tuple(prompts), tuple(tiles)

    def _count_requests(self, start: Tensor, seq_lens: Tensor, prompt_lens: Tensor) -> None:
        """Count each request that starts to decode densely once, when its prompt completes."""
        finished = (start < prompt_lens) & (seq_lens >= prompt_lens)
        reasons = Counter(
            "shorter_than_dense_len"
            for length in prompt_lens[finished].tolist()
            if length < self._settings.dense_len
        )
        for reason, amount in reasons.items():
            self._count("dense_fallbacks", amount, reason)
