# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""SparDA's page table and copies on the device: nothing in a step waits for the host."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from vllm_sparse.kernels.reference.sparda_steps import Resolution
from vllm_sparse.kernels.triton.launch import launch

if TYPE_CHECKING:
    from torch import Tensor
    from vllm_sparse.kernels.reference.paging import PageTable

# A piece without a frame that is wanted at index i holds _CLAIM + i in place of -1, for the
# smallest such i. So no scratch of the size of the host pool is needed, nor resetting it.
_CLAIM = tl.constexpr(-(2**31))


# The number of rows changes from step to step, which must not compile variants.
@triton.jit(do_not_specialize=["total"])
def _look_up_kernel(
    wanted,
    frame_of,
    last_use,
    recent,
    step,
    frames,
    hits,
    total,
    BLOCK: tl.constexpr,
):
    """Marks the frames that are there; the first of those who want an absent piece claims it."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    piece = tl.load(wanted + index, mask=index < total, other=-1)
    wants = piece >= 0
    frame = tl.load(frame_of + piece, mask=wants, other=-1)
    hit = wants & (frame >= 0)
    now = tl.load(step)
    before = tl.atomic_xchg(
        last_use + frame, tl.full([BLOCK], 0, tl.int64) + now, mask=hit, sem="relaxed"
    )
    tl.store(recent + frame, tl.full([BLOCK], 1, tl.uint8), mask=hit)
    tl.atomic_min(frame_of + piece, index + _CLAIM, mask=wants & ~hit, sem="relaxed")
    tl.store(frames + index, tl.where(hit, frame, -1), mask=index < total)
    # Of those who want the same piece, one finds the frame unused in this step.
    tl.store(hits + tl.program_id(0), tl.sum((hit & (before != now)).to(tl.int32), 0))


@triton.jit(do_not_specialize=["total", "tiles"])
def _replace_kernel(
    wanted,
    frame_of,
    piece_of,
    last_use,
    recent,
    hand,
    step,
    frames,
    hits_of_tiles,
    missing,
    targets,
    counts,
    error,
    total,
    tiles,
    num_frames,
    BLOCK: tl.constexpr,
):
    """One program: lists the absent pieces in order, then finds each a frame."""
    lane = tl.arange(0, BLOCK)
    hits = 0
    for start in range(0, tiles, BLOCK):
        inside = start + lane < tiles
        hits += tl.sum(tl.load(hits_of_tiles + start + lane, mask=inside, other=0), 0)
    needed = 0
    for start in range(0, total, BLOCK):
        index = start + lane
        inside = index < total
        piece = tl.load(wanted + index, mask=inside, other=-1)
        frame = tl.load(frames + index, mask=inside, other=0)
        absent = (piece >= 0) & (frame < 0)
        claim = tl.load(frame_of + piece, mask=absent, other=0)
        first = absent & (claim == index + _CLAIM)
        ones = first.to(tl.int32)
        tl.store(missing + needed + tl.cumsum(ones, 0) - ones, piece, mask=first)
        needed += tl.sum(ones, 0)
    tl.debug_barrier()  # other threads of this program read the list

    # Two rounds of the clock. The first clears the marks of the frames it passes, so the second
    # takes all that are left; what was taken or cleared must be visible to it.
    now = tl.load(step)
    begin = tl.load(hand).to(tl.int32)
    after = begin
    taken = 0
    for _ in tl.static_range(2):
        passed = 0
        while (taken < needed) & (passed < num_frames):
            frame = begin + passed + lane
            frame = tl.where(frame >= num_frames, frame - num_frames, frame)
            inside = passed + lane < num_frames
            idle = inside & (tl.load(last_use + frame, mask=inside, other=0) != now)
            held = tl.load(piece_of + frame, mask=idle, other=0)
            mark = tl.load(recent + frame, mask=idle, other=0)
            free = idle & ((held < 0) | (mark == 0))
            ones = free.to(tl.int32)
            rank = taken + tl.cumsum(ones, 0) - ones
            in_reach = rank < needed
            chosen = free & in_reach
            piece = tl.load(missing + rank, mask=chosen, other=0)
            tl.store(frame_of + held, tl.full([BLOCK], -1, tl.int32), mask=chosen & (held >= 0))
            tl.store(frame_of + piece, frame, mask=chosen)
            tl.store(piece_of + frame, piece.to(tl.int64), mask=chosen)
            tl.store(last_use + frame, tl.full([BLOCK], 0, tl.int64) + now, mask=chosen)
            # The hand stops behind the last frame that it takes: later marks stay.
            tl.store(recent + frame, chosen.to(tl.uint8), mask=idle & in_reach)
            tl.store(targets + rank, frame, mask=chosen)
            last = tl.max(tl.where(chosen, passed + lane, -1), 0)
            after = tl.where(last >= 0, (begin + last + 1) % num_frames, after)
            taken = tl.minimum(taken + tl.sum(ones, 0), needed)
            passed += BLOCK
        tl.debug_barrier()
    tl.store(hand, after.to(tl.int64))
    tl.store(counts, hits)
    tl.store(counts + 1, taken)
    if taken < needed:
        tl.store(error, 1)
        for start in range(taken, needed, BLOCK):  # give the claims back
            inside = start + lane < needed
            piece = tl.load(missing + start + lane, mask=inside, other=0)
            tl.store(frame_of + piece, tl.full([BLOCK], -1, tl.int32), mask=inside)


@triton.jit(do_not_specialize=["total"])
def _fill_kernel(wanted, frame_of, frames, total, BLOCK: tl.constexpr):
    """Frames of the pieces that were absent."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < total
    piece = tl.load(wanted + index, mask=inside, other=-1)
    frame = tl.load(frames + index, mask=inside, other=0)
    absent = (piece >= 0) & (frame < 0)
    tl.store(frames + index, tl.load(frame_of + piece, mask=absent, other=-1), mask=absent)


def resolve(table: PageTable, wanted: Tensor, step: Tensor, error: Tensor) -> Resolution:
    """Same contract as :func:`vllm_sparse.kernels.reference.sparda_steps.resolve`.

    Three launches, whatever is missing. The second is one program that scans the frames from the
    clock hand and stops as soon as every missing piece has one.
    """
    total, num_frames, device = wanted.numel(), len(table.piece_of), wanted.device
    assert wanted.is_contiguous()
    assert wanted.dtype == table.frame_of.dtype == torch.int32
    assert step.dtype == table.last_use.dtype == table.piece_of.dtype == torch.int64
    frames = torch.empty_like(wanted)
    missing, targets = (torch.empty(total, dtype=torch.int32, device=device) for _ in range(2))
    counts = torch.empty(2, dtype=torch.int32, device=device)
    result = Resolution(frames, missing, targets, misses=counts[1:], hits=counts[:1])
    if not total:
        counts.zero_()
        return result
    block, warps, _ = launch("wanted", device)
    tiles = -(-total // block)
    hits_of_tiles = torch.empty(tiles, dtype=torch.int32, device=device)
    recent = table.recent.view(torch.uint8)
    _look_up_kernel[(tiles,)](
        wanted,
        table.frame_of,
        table.last_use,
        recent,
        step,
        frames,
        hits_of_tiles,
        total,
        BLOCK=block,
        num_warps=warps,
    )
    scan, scan_warps, _ = launch("replace", device)
    _replace_kernel[(1,)](
        wanted,
        table.frame_of,
        table.piece_of,
        table.last_use,
        recent,
        table.hand,
        step,
        frames,
        hits_of_tiles,
        missing,
        targets,
        counts,
        error,
        total,
        tiles,
        num_frames,
        BLOCK=scan,
        num_warps=scan_warps,
    )
    _fill_kernel[(tiles,)](wanted, table.frame_of, frames, total, BLOCK=block, num_warps=warps)
    return result


@triton.jit
def _copy_kernel(
    target,
    target_index,
    source,
    source_index,
    count,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A fixed number of programs shares however many pieces there are."""
    PARTS: tl.constexpr = (WORDS + BLOCK - 1) // BLOCK
    for part in range(tl.program_id(0), tl.load(count) * PARTS, tl.num_programs(0)):
        piece = part // PARTS
        word = part % PARTS * BLOCK + tl.arange(0, BLOCK)
        inside = word < WORDS
        begin = tl.load(source_index + piece).to(tl.int64) * WORDS
        data = tl.load(source + begin + word, mask=inside)
        begin = tl.load(target_index + piece).to(tl.int64) * WORDS
        tl.store(target + begin + word, data, mask=inside)


def copy_pieces(
    target: Tensor,
    target_index: Tensor,
    source: Tensor,
    source_index: Tensor,
    count: Tensor,
    *,
    programs: int = 32,
) -> None:
    """Same contract as :func:`vllm_sparse.kernels.reference.sparda_steps.copy_pieces`.

    Reads the source directly, so that it may be a device view of pinned host memory. The fixed,
    small grid leaves the other multiprocessors to the computation that it runs beside.

    Args:
        target: Contiguous ``[n, ...]``, 16-byte aligned like each of its pieces.
        target_index: int32.
        source: Likewise ``[m, ...]``.
        source_index: int32.
        count: int32 ``[1]``.
        programs: Programs of the grid.
    """
    assert target.is_contiguous()
    assert source.is_contiguous()
    assert target.shape[1:] == source.shape[1:]
    assert target.dtype == source.dtype
    size = source[0].nbytes
    assert size % 16 == 0, "pieces are copied in runs of 16 bytes"
    block, warps, _ = launch("copy_pieces", target.device)
    _copy_kernel[(programs,)](
        target.view(-1).view(torch.int32),
        target_index,
        source.view(-1).view(torch.int32),
        source_index,
        count,
        WORDS=size // 4,
        BLOCK=min(block, triton.next_power_of_2(size // 4)),
        num_warps=warps,
    )
