# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""SparDA's page table and copies, in PyTorch: the definition of the kernels."""

from __future__ import annotations

import torch
from torch import Tensor
from vllm_sparse.kernels.types import PageTable, Resolution


def resolve(table: PageTable, wanted: Tensor, step: Tensor, counters: Tensor) -> Resolution:
    """Give every wanted piece a frame (second-chance replacement).

    Frames that this step uses are never taken. The clock hand clears the mark of a recently used
    frame and passes on; it takes the first empty or unmarked one.

    Args:
        table: Changed.
        wanted: Pieces, -1 for none, repetitions allowed, int32, any shape, contiguous.
        step: Number of this step, larger than any before, int64 ``[1]``.
        counters: Added to, int64 ``[3]``: wanted pieces that had a frame, each counted once;
            copies to make; 1 if there are more pieces than frames. Then the pieces that found no
            frame have -1, and nothing else about the step can be relied on.

    Returns:
        Frames in the shape of ``wanted``, and the copies to make.
    """
    now, num_frames, device = int(step), len(table.piece_of), wanted.device
    flat = wanted.flatten().tolist()
    found = [int(table.frame_of[piece]) if piece >= 0 else -1 for piece in flat]
    hits = 0
    for frame in found:
        if frame >= 0:
            hits += int(table.last_use[frame] != now)
            table.last_use[frame], table.recent[frame] = now, True
    missing: list[int] = []
    targets: list[int] = []
    full = False
    for i, piece in enumerate(flat):
        if piece < 0 or found[i] >= 0:
            continue
        if table.frame_of[piece] < 0 and not full:
            victim = _victim(table, num_frames, now)
            full = victim is None
            if victim is not None:
                previous = int(table.piece_of[victim])
                if previous >= 0:
                    table.frame_of[previous] = -1
                table.piece_of[victim], table.frame_of[piece] = piece, victim
                table.last_use[victim], table.recent[victim] = now, True
                missing.append(piece)
                targets.append(victim)
        found[i] = int(table.frame_of[piece])
    counters += torch.tensor([hits, len(missing), int(full)], device=counters.device)
    room = [0] * (len(flat) - len(missing))
    copied, into = torch.tensor(
        [missing + room, targets + room], dtype=torch.int32, device=device
    ).unbind()
    return Resolution(
        torch.tensor(found, dtype=torch.int32, device=device).view(wanted.shape),
        copied,
        into,
        torch.tensor([len(missing)], dtype=torch.int32, device=device),
    )


def _victim(table: PageTable, num_frames: int, now: int) -> int | None:
    for _ in range(2 * num_frames + 1):
        frame = int(table.hand)
        table.hand[0] = (frame + 1) % num_frames
        if table.last_use[frame] == now:
            continue
        if table.piece_of[frame] < 0 or not table.recent[frame]:
            return frame
        table.recent[frame] = False
    return None


def copy_pieces(
    target: Tensor,
    target_index: Tensor,
    source: Tensor,
    source_index: Tensor,
    count: Tensor,
    *,
    programs: int = 32,
) -> None:
    """Copy whole pieces, as many as a tensor says.

    Args:
        target: Contiguous ``[n, ...]``, changed.
        target_index: int32 ``[most]``.
        source: Contiguous ``[m, ...]`` with pieces of the same size.
        source_index: int32 ``[most]``.
        count: How many, int32 ``[1]``.
        programs: How many share the work on a GPU.
    """
    del programs
    first = slice(int(count))
    pieces = source[source_index[first].long().to(source.device)]
    target[target_index[first].long()] = pieces.to(target.device)
