# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Device functions that several kernels use."""

from __future__ import annotations

import triton
import triton.language as tl

# Triton's interpreter would multiply the bits of bfloat16 as integers. Products of two bfloat16
# are exact in float32, so this computes what tensor cores do.
_UPCAST = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b):
    """Matrix product accumulated in float32; float32 operands keep their precision."""
    if _UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def rounded_to(numbers, scale, ELEMENT: tl.constexpr):
    """Numbers as a cache stores them; in fp8 divided by a scale, to the nearest, saturating."""
    if tl.float8e4nv == ELEMENT:
        numbers = numbers.to(tl.float32) / scale
        # NaN stays, as in vLLM's conversion.
        numbers = tl.where(numbers > 448.0, 448.0, tl.where(numbers < -448.0, -448.0, numbers))
    return numbers.to(ELEMENT)


@triton.jit
def share_of(count, least, AXIS: tl.constexpr, BLOCK: tl.constexpr):
    """This program's share of a row's entries: whole tiles, as many for each program that has any.

    Args:
        count: Entries of the row, at least 1.
        least: Tiles that are worth a program.
        AXIS: Axis of the grid that splits rows.
        BLOCK: Entries of a tile.

    Returns:
        Its first entry, and the first one behind it; no more than the former if it has none.
    """
    tiles = tl.cdiv(count, BLOCK)
    used = tl.minimum(tl.num_programs(AXIS), tl.cdiv(tiles, least))
    share = tl.cdiv(tiles, used) * BLOCK
    begin = tl.program_id(AXIS) * share
    return begin, tl.minimum(begin + share, count)


@triton.jit
def shares_used(count, least, AXIS: tl.constexpr, BLOCK: tl.constexpr):
    """Programs that :func:`share_of` gives a share."""
    tiles = tl.cdiv(count, BLOCK)
    used = tl.minimum(tl.num_programs(AXIS), tl.cdiv(tiles, least))
    return tl.cdiv(tiles, tl.cdiv(tiles, used))


@triton.jit
def attend_tile(b_q, b_k, b_v, seen, peak, mass, b_o, scale_log2):
    """One tile of keys and values of an online softmax (FlashAttention, arXiv 2205.14135).

    Probabilities are rounded to the values' dtype.

    Args:
        b_q: ``[M, D]``.
        b_k: ``[N, D]``.
        b_v: ``[N, D]``.
        seen: Which keys a query sees; broadcasts to ``[M, N]``.
        peak: Largest logit so far, ``[M]``, minus infinity before anything was seen.
        mass: Sum of ``exp2(logit - peak)`` so far, ``[M]``.
        b_o: Values weighted so, ``[M, D]``.
        scale_log2: Logit scale times ``log2(e)``.

    Returns:
        The new ``peak``, ``mass`` and ``b_o``.
    """
    logit = tl.where(seen, dot(b_q, tl.trans(b_k)) * scale_log2, float("-inf"))
    highest = tl.maximum(peak, tl.max(logit, 1))
    base = tl.where(highest == float("-inf"), 0.0, highest)  # nothing was seen yet
    weight = tl.exp2(logit - base[:, None])
    shrink = tl.exp2(peak - base)
    mass = mass * shrink + tl.sum(weight, 1)
    b_o = b_o * shrink[:, None] + dot(weight.to(b_v.dtype), b_v)
    return highest, mass, b_o
