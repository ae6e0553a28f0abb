# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""SparDA's page table and copies on the device: nothing in a step waits for the host."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from vllm_sparse.kernels.triton.counters import counters as shared_counters
from vllm_sparse.kernels.triton.grid import count_in
from vllm_sparse.kernels.triton.launch import launch
from vllm_sparse.kernels.types import Resolution

if TYPE_CHECKING:
    from torch import Tensor
    from vllm_sparse.kernels.types import PageTable

# While pieces are given frames, frame_of of an absent one holds _CLAIM + the smallest index at
# which it is wanted, and then _RANK + its number among the absent ones. So no scratch of the size
# of the host pool is needed, nor resetting it. Indices are smaller than the distance of the two.
_CLAIM = tl.constexpr(-(2**31))
_RANK = tl.constexpr(-(2**30))


@triton.jit
def _find_frames(
    wanted, frame_of, piece_of, last_use, recent, hand, now, missing, targets, misses, counters,
    total, num_frames, TILE: tl.constexpr,
):  # fmt: skip
    """Numbers the absent pieces in the order in which they are wanted, and finds them frames."""
    lane = tl.arange(0, TILE)
    needed = 0
    for start in range(0, total, TILE):
        index = start + lane
        piece = tl.load(wanted + index, mask=index < total, other=-1)
        # Ranks that were put in place of claims are no claims of this program's.
        claim = tl.load(frame_of + piece, mask=piece >= 0, other=0)
        first = claim == index + _CLAIM
        ones = first.to(tl.int32)
        rank = needed + tl.cumsum(ones, 0) - ones
        tl.store(frame_of + piece, rank + _RANK, mask=first)
        tl.store(missing + rank, piece, mask=first)
        needed += tl.sum(ones, 0)

    # Two rounds of the clock. The first clears the marks of the frames it passes, so the second
    # takes all that are left; what was taken or cleared must be visible to it.
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
            tl.store(frame_of + held, tl.full([TILE], -1, tl.int32), mask=chosen & (held >= 0))
            tl.store(last_use + frame, tl.full([TILE], 0, tl.int64) + now, mask=chosen)
            # The hand stops behind the last frame that it takes: later marks stay.
            tl.store(recent + frame, chosen.to(tl.uint8), mask=idle & in_reach)
            tl.store(targets + rank, frame, mask=chosen)
            last = tl.max(tl.where(chosen, passed + lane, -1), 0)
            after = tl.where(last >= 0, (begin + last + 1) % num_frames, after)
            taken = tl.minimum(taken + tl.sum(ones, 0), needed)
            passed += TILE
        tl.debug_barrier()
    tl.store(hand, after.to(tl.int64))
    tl.store(misses, taken)
    tl.atomic_add(counters + 1, taken.to(tl.int64), sem="relaxed")
    tl.atomic_add(counters + 2, (taken < needed).to(tl.int64), sem="relaxed")


# The number of rows changes from step to step, which must not compile variants; that of frames is
# an engine's, and a warm-up has its own.
@triton.jit(do_not_specialize=["total", "num_frames"])
def _look_up_kernel(
    wanted, frame_of, piece_of, last_use, recent, hand, step, missing, targets, misses, arrived,
    counters, total, num_frames, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Marks the frames that are there; the first of those who want an absent piece claims it.

    The last program to do so counts the absent pieces and finds all of them frames. Which piece
    gets which of these frames is left to the next launch.
    """
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
    # Of those who want the same piece, one finds the frame unused in this step.
    hits = tl.sum((hit & (before != now)).to(tl.int64), 0)
    tl.atomic_add(counters, hits, sem="relaxed")
    if not count_in(arrived, tl.num_programs(0)):
        return
    tl.store(arrived, 0)  # for the next launch
    _find_frames(
        wanted, frame_of, piece_of, last_use, recent, hand, now, missing, targets, misses,
        counters, total, num_frames, TILE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["total"])
def _fill_kernel(wanted, frame_of, piece_of, targets, misses, frames, total, BLOCK: tl.constexpr):
    """Gives the absent pieces their frames, and everyone theirs.

    All who want an absent piece write the same, so whoever comes late may find the frame or, as
    long as it is not there, the rank.
    """
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < total
    piece = tl.load(wanted + index, mask=inside, other=-1)
    frame = tl.load(frame_of + piece, mask=piece >= 0, other=-1)
    absent = frame < -1
    rank = tl.where(absent, frame - _RANK, 0)
    served = absent & (rank < tl.load(misses))  # else the slab is full
    frame = tl.where(absent, tl.load(targets + rank, mask=served, other=-1), frame)
    tl.store(frame_of + piece, frame, mask=absent)
    tl.store(piece_of + frame, piece.to(tl.int64), mask=served)
    tl.store(frames + index, frame, mask=inside)


def resolve(table: PageTable, wanted: Tensor, step: Tensor, counters: Tensor) -> Resolution:
    """Same contract as :func:`vllm_sparse.kernels.reference.sparda_paging.resolve`.

    Two launches, whatever is missing; those of one device must not run beside each other. In the
    first, the program that is done last goes over what is wanted, then scans the frames from the
    clock hand and stops as soon as every missing piece has one.
    """
    total, num_frames, device = wanted.numel(), len(table.piece_of), wanted.device
    assert wanted.is_contiguous()
    assert wanted.dtype == table.frame_of.dtype == torch.int32
    assert step.dtype == table.last_use.dtype == table.piece_of.dtype == torch.int64
    assert counters.dtype == torch.int64
    frames = torch.empty_like(wanted)
    missing, targets = (torch.empty(total, dtype=torch.int32, device=device) for _ in range(2))
    misses = torch.empty(1, dtype=torch.int32, device=device)
    result = Resolution(frames, missing, targets, misses)
    if not total:
        misses.zero_()
        return result
    block, warps, _ = launch("wanted", device)
    tile, tile_warps, _ = launch("replace", device)
    lookups, counts = -(-total // block), shared_counters(device).lookups
    _look_up_kernel[(lookups,)](
        wanted, table.frame_of, table.piece_of, table.last_use, table.recent.view(torch.uint8),
        table.hand, step, missing, targets, misses, counts, counters, total, num_frames,
        BLOCK=block, TILE=tile, num_warps=tile_warps,
    )  # fmt: skip
    _fill_kernel[(lookups,)](
        wanted, table.frame_of, table.piece_of, targets, misses, frames, total, BLOCK=block,
        num_warps=warps,
    )  # fmt: skip
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
    """Same contract as :func:`vllm_sparse.kernels.reference.sparda_paging.copy_pieces`.

    Reads the source directly, so that it may be a device view of pinned host memory. The fixed,
    small grid leaves the other multiprocessors to the computation that it runs beside.

    Args:
        target: Contiguous ``[n, ...]``, 16-byte aligned like each of its pieces.
        target_index: int32.
        source: Contiguous ``[m, ...]``, 16-byte aligned like each of its pieces.
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
        target.view(-1).view(torch.int32), target_index, source.view(-1).view(torch.int32),
        source_index, count, WORDS=size // 4, BLOCK=min(block, triton.next_power_of_2(size // 4)),
        num_warps=warps,
    )  # fmt: skip
