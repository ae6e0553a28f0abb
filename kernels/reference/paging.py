# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""SparDA's page table, copies and decode attention over frames, in PyTorch.

The definition that the CPU and GPU kernels are tested against. A *piece* is one block of one KV
head, ``[block_size, 2 * D]``: a row per token, its key and then its value. Piece ``b * G + g`` is
block ``b`` of KV head ``g``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


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


class Resolved(NamedTuple):
    """Where the wanted pieces are, and what must be copied before they may be read.

    Attributes:
        frames: Frame of each wanted piece, -1 where none was wanted, int32.
        missing: Pieces to copy, int64 ``[misses]``.
        targets: Their frames, int64 ``[misses]``.
        hits: Wanted pieces that had a frame, each counted once.
    """

    frames: Tensor
    missing: Tensor
    targets: Tensor
    hits: int


class SlabFullError(RuntimeError):
    """Every frame is in use in this step."""


def resolve(table: PageTable, pieces: Tensor, step: int) -> Resolved:
    """Give every wanted piece a frame (second-chance replacement).

    Frames that this step uses are never taken. The clock hand clears the mark of a recently used
    frame and passes on; it takes the first empty or unmarked one.

    Args:
        table: Changed.
        pieces: Wanted pieces, -1 for none, repetitions allowed, int64, any shape.
        step: Number of this step, larger than any before.

    Returns:
        Frames in the shape of ``pieces``, and the copies to make.

    Raises:
        SlabFullError: More pieces than frames.
    """
    num_frames = len(table.piece_of)
    frames = torch.full(pieces.shape, -1, dtype=torch.int32)
    flat, found = pieces.flatten().tolist(), frames.view(-1)
    hits = 0
    for i, piece in enumerate(flat):
        frame = int(table.frame_of[piece]) if piece >= 0 else -1
        if frame >= 0:
            hits += int(table.last_use[frame] != step)
            table.last_use[frame], table.recent[frame] = step, True
            found[i] = frame
    missing: list[int] = []
    targets: list[int] = []
    for i, piece in enumerate(flat):
        if piece < 0 or found[i] >= 0:
            continue
        if table.frame_of[piece] < 0:
            frame = _victim(table, num_frames, step)
            previous = int(table.piece_of[frame])
            if previous >= 0:
                table.frame_of[previous] = -1
            table.piece_of[frame], table.frame_of[piece] = piece, frame
            table.last_use[frame], table.recent[frame] = step, True
            missing.append(piece)
            targets.append(frame)
        found[i] = table.frame_of[piece]
    return Resolved(frames, torch.tensor(missing).long(), torch.tensor(targets).long(), hits)


def _victim(table: PageTable, num_frames: int, step: int) -> int:
    for _ in range(2 * num_frames + 1):
        frame = int(table.hand)
        table.hand[0] = (frame + 1) % num_frames
        if table.last_use[frame] == step:
            continue
        if table.piece_of[frame] < 0 or not table.recent[frame]:
            return frame
        table.recent[frame] = False
    raise SlabFullError(f"all {num_frames} frames of the device slab are in use in this step")


def copy_pieces(target: Tensor, target_index: Tensor, source: Tensor, source_index: Tensor) -> None:
    """Copy whole pieces.

    Args:
        target: Contiguous ``[n, ...]``, changed.
        target_index: int64 ``[count]``.
        source: Contiguous ``[m, ...]`` with pieces of the same size.
        source_index: int64 ``[count]``.
    """
    target[target_index] = source[source_index].to(target.device)


def attend_frames(
    slab: Tensor, query: Tensor, output: Tensor, frames: Tensor, lengths: Tensor, scale: float
) -> None:
    """Exact decode attention over the frames of each token and KV head.

    Args:
        slab: ``[frames, block_size, 2 * D]``.
        query: ``[T, H, D]``.
        output: ``[T, H, D]``, written; zero for tokens of length 0.
        frames: int32 ``[T, G, K]``; the last one in use may be partly filled.
        lengths: Tokens in each token's frames, the same for all KV heads, int32 ``[T]``.
        scale: Logit scale.
    """
    block_size, width = slab.shape[1:]
    dim = width // 2
    tokens, kv_heads, count = frames.shape
    rows = slab[frames.clamp(min=0).long()].float().flatten(2, 3)
    hidden = torch.arange(count * block_size, device=slab.device) >= lengths[:, None]
    # Stale frames may hold anything, NaN included, which a zero weight would not silence.
    rows = rows.masked_fill(hidden[:, None, :, None], 0.0)
    grouped = query.float().view(tokens, kv_heads, -1, dim)
    logits = grouped @ rows[..., :dim].transpose(2, 3) * scale
    logits = logits.masked_fill(hidden[:, None, None], float("-inf"))
    weights = torch.softmax(logits, -1).nan_to_num(0.0)
    output.copy_((weights @ rows[..., dim:]).reshape_as(output))
