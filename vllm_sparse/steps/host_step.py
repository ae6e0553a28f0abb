# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What one step asks of each SPARDA layer: tokens to store, rows to decode, prompts to stream."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from vllm_sparse.upload import upload

if TYPE_CHECKING:
    import torch

    from vllm_sparse.policies.selectors import Tokens
    from vllm_sparse.prefetch.stream import Tile


@dataclass(frozen=True)
class DecodeRows:
    """Rows that decode one token each, served from frames.

    Attributes:
        tokens: Their tokens; positions of padding rows are zero.
        framed: Position of each row's token, int64 ``[R]``; -1 for rows that have no frames:
            padding, and prompt tokens that came alone.
        table: Physical blocks, int32 ``[R, blocks]``.
        unframed: Tokens of rows that read them all from the host pool, 0 for others, int32
            ``[R]``; ``None`` if there are no such rows.
        scored: Whether any row may have more blocks than it reads.
        whole: They are the first rows of the batch, in order.
    """

    tokens: Tokens
    framed: Tensor
    table: Tensor
    unframed: Tensor | None
    scored: bool
    whole: bool


@dataclass(frozen=True)
class PromptRow:
    """A row that is attended by streaming its earlier blocks back.

    Attributes:
        tokens: Its tokens.
        begin: Batch position of its first token.
        end: Batch position after its last token.
        start: Position of its first token in the request.
        sparse_from: Tokens of this row before the first sparse one.
        output_from: Tokens of this row before the first generated one.
        blocks: Physical blocks up to the row's last token, int64.
        tiles: Index of its first and after its last tile in the step's tiles.
    """

    tokens: Tokens
    begin: int
    end: int
    start: int
    sparse_from: int
    output_from: int
    blocks: Tensor
    tiles: tuple[int, int]

    def __len__(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True)
class FreshRows:
    """Prompt rows without a past that read all that they have, attended all at once.

    Attributes:
        index: Batch positions of their tokens, int64 ``[T]``.
        starts: Where each row's tokens start among these, int32 ``[R + 1]``.
        longest: Tokens of the longest row.
    """

    index: Tensor
    starts: Tensor
    longest: int


@dataclass(frozen=True)
class WindowList:
    """Windows of compressed keys that a step completes, whichever rows they belong to.

    Attributes:
        slots: Where they go, ``block * windows_per_block + slot``, int64 ``[W]``.
        tokens: The tokens of each: batch positions, or beyond the batch, positions in ``older``,
            int64 ``[W, kernel_size]``.
        older: Slots of the tokens of windows that earlier steps computed, int64.
    """

    slots: Tensor
    tokens: Tensor
    older: Tensor


@dataclass(frozen=True)
class WindowRows:
    """Rows of one new token each, any of which may complete a window.

    Attributes:
        positions: Position of each row's token, int64 ``[R]``; -1 for padding rows.
        table: Physical blocks, int32 ``[R, blocks]``.
    """

    positions: Tensor
    table: Tensor


@dataclass(frozen=True)
class SpardaStep:
    """Metadata of one step, shared by all layers.

    Attributes:
        num_tokens: Tokens in the batch.
        slots: ``block * block_size + offset`` of each token, negative for padding, int64 ``[T]``.
        last_in_block: Batch positions of the last token that this step writes to each block.
        windows: Windows of compressed keys to complete.
        decode: Rows served from frames.
        prompts: Rows served by streaming.
        fresh: Prompt rows that are served at once.
        tiles: What the prompt rows stream, in order.
    """

    num_tokens: int
    slots: Tensor
    last_in_block: Tensor
    windows: WindowList | WindowRows
    decode: DecodeRows | None
    prompts: tuple[PromptRow, ...] = ()
    fresh: FreshRows | None = None
    tiles: tuple[Tile, ...] = ()

    def to(self, device: torch.device) -> SpardaStep:
        """The step on a device, where parts of it may be; tiles stay, of which most are numbers."""
        if device.type == "cpu":
            return self
        moved = {
            part.name: _moved(getattr(self, part.name), device)
            for part in dataclasses.fields(self)
            if part.name != "tiles"
        }
        return dataclasses.replace(self, **moved)


def _moved(item: Any, device: torch.device) -> Any:
    """A tensor, or whatever consists of such, on a device."""
    if isinstance(item, Tensor):
        return upload(item, device)
    if isinstance(item, tuple):
        return tuple(_moved(part, device) for part in item)
    if not dataclasses.is_dataclass(item) or isinstance(item, type):
        return item
    parts = (part.name for part in dataclasses.fields(item))
    return dataclasses.replace(item, **{x: _moved(getattr(item, x), device) for x in parts})
