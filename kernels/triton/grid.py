# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""How rows of unlike lengths are shared out among the programs of one launch.

A *pair* is one row and KV head. Its entries come in tiles, its tiles in shares, all of one size in
a launch; the launch has no more programs than the GPU holds at once, and they take shares in turn.
How large a share is follows on the device from what the rows read, so that neither the width of
their table nor a row that is much longer than the others leaves programs without work.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import triton
import triton.language as tl
from vllm_sparse.kernels.triton.launch import MOST_SHARES, SMALL_HEAD

# Programs that a multiprocessor holds at once: what registers and shared memory of the kernels
# allow on sm_80 and sm_90 for heads of up to 256 bytes and for larger ones, which a test asserts.
RESIDENT = {"select_slots": (2, 2), "attend": (4, 2)}

# Registers of a multiprocessor, what a thread is not denied, and the most that it may have.
_REGISTERS, _ENOUGH, _MOST = 1 << 16, 128, 255

# What a program takes to begin and to end, of the time that a whole row takes it.
BEGINNING = 0.1


class Grid(NamedTuple):
    """Sizes that follow from shapes only, as a captured graph needs.

    Attributes:
        programs: Of the launch.
        shares: That a pair has at most.
    """

    programs: int
    shares: int


def programs_at_once(kernel: str, head_bytes: int, multiprocessors: int) -> int:
    """Programs of a kernel that the GPU holds at once.

    Args:
        kernel: A key of :data:`RESIDENT`.
        head_bytes: Of a token's keys in one head, in the dtype that is multiplied.
        multiprocessors: Of the GPU.
    """
    return RESIDENT[kernel][head_bytes > SMALL_HEAD] * multiprocessors


def most_registers(kernel: str, head_bytes: int, warps: int) -> int | None:
    """What threads may have so that as many programs fit: compilers take more. ``None``: anything.

    Args:
        kernel: A key of :data:`RESIDENT`.
        head_bytes: See :func:`programs_at_once`.
        warps: Of a program.
    """
    most = _REGISTERS // (programs_at_once(kernel, head_bytes, 1) * 32 * warps)
    return most if _ENOUGH <= most < _MOST else None


def grid_of(
    slots: int, pairs: int, entries: int, most_entries: int, block: int, multiprocessors: int
) -> Grid:
    """The grid of a kernel that shares rows out.

    Args:
        slots: See :func:`programs_at_once`.
        pairs: Rows times KV heads.
        entries: That a row has at most, unless it reads everything.
        most_entries: That a row has at most.
        block: Entries of a tile.
        multiprocessors: Of the GPU.
    """
    # The second bound is on scratch. A quarter of it would leave most programs without work where
    # one row of 256 reads everything.
    shares = min(-(-most_entries // block), -(-64 * slots // pairs), MOST_SHARES)
    shares = max(shares, 1)
    wanted = pairs * min(-(-entries // block), shares)
    # Rows that read everything may need more programs than the others. One on a multiprocessor
    # that would be idle costs nothing.
    return Grid(min(slots, max(wanted, min(multiprocessors, pairs * shares))), shares)


@cache
def whole_waves(slots: int, pairs: int, most: int) -> int:
    """Shares of each pair so that the programs of a launch fill whole waves.

    Args:
        slots: See :func:`programs_at_once`.
        pairs: Rows times KV heads.
        most: Shares that the longest row may have.
    """

    def time(shares: int) -> float:
        return -(-pairs * shares // slots) * (1 / shares + BEGINNING)

    return min(range(1, max(1, min(most, MOST_SHARES)) + 1), key=time)


@triton.jit
def tokens_read(length, channels, top_k, READ_ALL: tl.constexpr):
    """Tokens that a row attends to; 0 for padding rows."""
    length = tl.maximum(length, 0)
    if READ_ALL:
        return length
    return tl.where(channels > 0, tl.minimum(length, top_k), length)


@triton.jit
def tiles_of_a_share(
    lengths, top_r, rows, heads, top_k, shares, BLOCK: tl.constexpr, READ_ALL: tl.constexpr
):  # fmt: skip
    """How many tiles make a share so that all programs have work, and the most shares of a row.

    Args:
        lengths: Of the rows.
        top_r: Of the rows.
        rows: How many.
        heads: KV heads.
        top_k: Tokens that a row selects.
        shares: That a row may have.
        BLOCK: Entries of a tile.
        READ_ALL: Every row reads everything.
    """
    total = 0
    longest = 0
    for start in range(0, rows, 128):
        row = start + tl.arange(0, 128)
        length = tl.load(lengths + row, mask=row < rows, other=0)
        channels = tl.load(top_r + row, mask=row < rows, other=0)
        tiles = tl.cdiv(tokens_read(length, channels, top_k, READ_ALL), BLOCK)
        total += tl.sum(tiles, 0)
        longest = tl.maximum(longest, tl.max(tiles, 0))
    size = tl.maximum(tl.cdiv(total * heads, tl.num_programs(0)), tl.cdiv(longest, shares))
    size = tl.maximum(size, 1)
    return size, tl.cdiv(longest, size)


@triton.jit
def count_in(arrived, used):
    """Whether this program is the last of those that work for a pair.

    What they have stored is visible to it then: all threads of a program store before the barrier,
    one of them releases and acquires, and the value it gets passes through another barrier.

    Args:
        arrived: The pair's counter, zero before the launch.
        used: How many programs work for it.
    """
    before = used - 1
    tl.debug_barrier()
    if used > 1:
        before = tl.atomic_add(arrived, 1, sem="acq_rel")
    return before == used - 1


@triton.jit
def let_next_start(PDL: tl.constexpr):
    """Lets the next launch begin; it waits for this one where it needs what this one stores."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """Waits for the launch before, and so for all before that.

    Every program of every launch must do so, even if it has no work: a launch that ended without
    waiting would let the next one begin too early.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
