# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What kernels are given and what they return, the same for every implementation.

A *piece* is one block of one KV head, ``[block_size, 2 * D]``: a row per token, its key and then
its value. Piece ``b * G + g`` is block ``b`` of KV head ``g``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class Rows(NamedTuple):
    """Decode rows, one token each.

    Attributes:
        block_table: Physical blocks from the first kept one, int32 ``[R, max_blocks]``.
        lengths: Physical tokens including the row's own, int32 ``[R]``; 0 marks a padding row.
        top_r: Channels to read, int32 ``[R]``; 0 reads every token.
        parked: Where the row's query waits for its prompt's compaction, as
            ``block * per_block + place``, int32 ``[R]``; -1 for rows outside a window.
        final_lengths: Physical tokens of the row's request after this step, int32 ``[R]``; ``None``
            if every request has one row.
    """

    block_table: Tensor
    lengths: Tensor
    top_r: Tensor
    parked: Tensor
    final_lengths: Tensor | None = None


class Probes(NamedTuple):
    """What decode rows ask of pages, found once per row and KV head.

    Undefined for padding rows and for those that read everything.

    Attributes:
        query: In the cache's dtype, zero in channels that are not read, ``[T, H, D]``.
        extreme: Where in an index each channel's bound is, int32 ``[T, G, D]``: ``d`` for its
            smallest key, ``D + d`` for its largest one, -1 if it is not read.
        scale: What estimated logits are multiplied with, float32 ``[T, H]``.
        newest: Estimated logit of the row's newest page, scaled, float32 ``[T, H]``. Of that page
            the row may see fewer tokens than the index counts.
    """

    query: Tensor
    extreme: Tensor
    scale: Tensor
    newest: Tensor


class Rotary(NamedTuple):
    """A model's rotary embedding.

    Attributes:
        cache: Cosines and then sines of each position, ``[positions, channels that turn]``.
        halves: Channel ``c`` turns with ``c + half``; else with its neighbour.
    """

    cache: Tensor
    halves: bool


class Ranking(NamedTuple):
    """How vectors rank windows.

    Attributes:
        softmax: Softmax of each query head, summed over its group (InfLLM-v2); else the raw dot
            product of one vector per KV head (Forecast).
        scale: Logit scale of the softmax.
        lag: Windows are those complete this many positions before the token.
        rotary: Vectors turn by their token's position first, computed in float32 and rounded to
            their dtype; only without a softmax.
    """

    softmax: bool
    scale: float = 1.0
    lag: int = 0
    rotary: Rotary | None = None


class Blocks(NamedTuple):
    """Which blocks of ``block_size`` tokens are read: ``top_k`` in total.

    Among these are the first ``init_blocks``, a token's own one and ``local_blocks`` before it;
    ``kernel_stride`` tokens lie between the starts of two compressed keys.
    """

    block_size: int
    kernel_stride: int
    init_blocks: int
    local_blocks: int
    top_k: int


class NewWindows(NamedTuple):
    """Where tokens, one of each row, add the windows of compressed keys that they complete.

    A window is the mean of two strides. It is stored with the block that holds its last token; it
    may begin in the one before.

    Attributes:
        compressed: ``[blocks, G, windows per block, D]``, changed.
        positions: Position of each token, negative for padding, ``[T]``.
        table: Physical blocks of each token's row, ``[T, blocks]``.
        stride: Tokens from one window's start to the next.
    """

    compressed: Tensor
    positions: Tensor
    table: Tensor
    stride: int


class NewQueries(NamedTuple):
    """Where tokens, one of each row, keep their queries for the tokens that follow them.

    Attributes:
        kept: Under the block that holds each token, ``[blocks, H, D]``, changed.
        query: Their queries, ``[T, H, D]``.
        recent: Where they are kept once more, in order, ``[T or more, H, D]``, changed; ``None`` if
            they need not be.
    """

    kept: Tensor
    query: Tensor
    recent: Tensor | None = None


class Selected(NamedTuple):
    """What each decode row reads.

    Attributes:
        blocks: Logical blocks, ascending, -1 beyond the last, int32 ``[R, G, capacity]``.
        pieces: Their pieces on the host, -1 beyond the last, int32 ``[R, G, capacity]``.
        lengths: Tokens in a row's blocks, the same for all KV heads, int32 ``[R]``.
    """

    blocks: Tensor
    pieces: Tensor
    lengths: Tensor


class PageTable(NamedTuple):
    """Which frame holds which piece, for one layer; changed in place.

    Attributes:
        frame_of: Frame of each piece or -1, int32 ``[pieces]``.
        piece_of: Piece in each frame or -1, int64 ``[frames]``.
        last_use: Last step that used each frame, int64 ``[frames]``.
        recent: Whether a frame was used since the clock hand last passed it, bool ``[frames]``.
        hand: Where the clock hand stands, int64 ``[1]``.
    """

    frame_of: Tensor
    piece_of: Tensor
    last_use: Tensor
    recent: Tensor
    hand: Tensor


class Resolution(NamedTuple):
    """Where the wanted pieces are, and what must be copied before they may be read.

    Attributes:
        frames: Frame of each wanted piece, -1 where none was wanted, int32, in its shape.
        missing: Pieces to copy, int32, as long as ``frames``; only the first ``misses`` count.
        targets: Their frames, int32, as long as ``missing``.
        misses: How many, int32 ``[1]``.
    """

    frames: Tensor
    missing: Tensor
    targets: Tensor
    misses: Tensor


class Unframed(NamedTuple):
    """Rows that read all their tokens, from the host pool.

    Attributes:
        host: The pool, ``[blocks, G, block_size, 2 * D]``.
        table: Physical blocks, int32 ``[T, blocks]``.
        lengths: Tokens of each such row, 0 for all others, int32 ``[T]``.
    """

    host: Tensor
    table: Tensor
    lengths: Tensor
