# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Attention of prompt tokens over a part of the keys, of which each may read chosen blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from vllm_sparse.kernels.fp8 import FP8
from vllm_sparse.kernels.triton.launch import LOG2_E, dim_block, launch, row_block
from vllm_sparse.kernels.triton.ops import attend_tile

if TYPE_CHECKING:
    from torch import Tensor

# Tokens and heads of a tile of queries; halved where they would not fit beside the keys.
_ROWS = 128

_LOG2_E = tl.constexpr(LOG2_E)


# Numbers that change from prompt to prompt must not compile variants while a request waits.
@triton.jit(
    do_not_specialize=[
        "tokens", "first_block", "end_block", "past_from", "stride_chosen_head",
        "stride_chosen_token", "stride_list",
    ]
)  # fmt: skip
def _list_blocks_kernel(
    chosen, lists, tokens, first_block, end_block, past_from, stride_chosen_head,
    stride_chosen_token, stride_list, GROUP: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """How many and which blocks any token of a tile of queries reads, ascending."""
    tile = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    token = tile * BLOCK_M // GROUP + tl.arange(0, BLOCK_T)
    last = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // GROUP, tokens - 1)
    chosen += head * stride_chosen_head + token[:, None].to(tl.int64) * stride_chosen_token
    lists += (head * tl.num_programs(0) + tile) * stride_list
    found = 0
    for start in range(first_block, end_block, BLOCK):
        block = start + tl.arange(0, BLOCK)
        inside = block < end_block
        if CAUSAL:
            inside &= block * BLOCK_SIZE <= past_from + last
        mark = tl.load(
            chosen + block[None, :], mask=(token <= last)[:, None] & inside[None, :], other=0
        )
        wanted = tl.max(mark.to(tl.int32), 0) != 0
        ones = wanted.to(tl.int32)
        tl.store(lists + 1 + found + tl.cumsum(ones, 0) - ones, block, mask=wanted)
        found += tl.sum(ones, 0)
    tl.store(lists, found)


@triton.jit(
    do_not_specialize=[
        "tokens", "num_keys", "first_position", "past_from", "stride_chosen_head",
        "stride_chosen_token", "stride_list", "stride_out_head", "stride_out_member",
        "stride_lse_head", "stride_lse_member", "stride_lse_token",
    ],
    do_not_specialize_on_alignment=["lists", "lse_out"],
)  # fmt: skip
def _attend_part_kernel(
    query, keys, values, chosen, lists, output, lse_out, scale_log2, tokens, num_keys,
    first_position, past_from, stride_query_head, stride_query_member, stride_query_token,
    stride_key_head, stride_key_token, stride_value_head, stride_value_token, stride_chosen_head,
    stride_chosen_token, stride_list, stride_out_head, stride_out_member, stride_out_token,
    stride_lse_head, stride_lse_member, stride_lse_token, GROUP: tl.constexpr, DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    CHOSEN: tl.constexpr, CAUSAL: tl.constexpr, MERGE: tl.constexpr,
):  # fmt: skip
    """The tokens and heads of one tile, which share their KV head, against its keys."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # those with the longest past first
    head = tl.program_id(1).to(tl.int64)
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row_inside = row < tokens * GROUP
    token = row // GROUP
    member = row % GROUP
    dim = tl.arange(0, BLOCK_D)
    dim_inside = dim < DIM
    mask = row_inside[:, None] & dim_inside[None, :]
    source = member.to(tl.int64) * stride_query_member + token.to(tl.int64) * stride_query_token
    b_q = tl.load(
        query + head * stride_query_head + source[:, None] + dim[None, :], mask=mask, other=0.0
    )
    keys += head * stride_key_head
    values += head * stride_value_head
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK_M], tl.float32)
    b_o = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    member = member.to(tl.int64)
    lse_out += head * stride_lse_head + member * stride_lse_member + token * stride_lse_token
    output += head * stride_out_head + dim[None, :]
    output += (member * stride_out_member + token.to(tl.int64) * stride_out_token)[:, None]
    if MERGE:  # what is there already counts as one key whose weight is one
        before = tl.load(lse_out, mask=row_inside, other=float("-inf"))
        peak = before * _LOG2_E
        mass = tl.where(before == float("-inf"), 0.0, 1.0)
        b_o = tl.load(output, mask=mask, other=0.0)
    PARTS: tl.constexpr = BLOCK_SIZE // BLOCK_N if CHOSEN else 1
    if CHOSEN:
        chosen += head * stride_chosen_head + token.to(tl.int64) * stride_chosen_token
        lists += (head * tl.num_programs(0) + tile) * stride_list
        steps = tl.load(lists) * PARTS
    else:
        end = num_keys
        if CAUSAL:
            last = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // GROUP, tokens - 1)
            end = tl.minimum(end, past_from + last + 1 - first_position)
        steps = tl.cdiv(tl.maximum(end, 0), BLOCK_N)
    for step in range(0, steps):
        visible = row_inside
        if CHOSEN:
            block = tl.load(lists + 1 + step // PARTS)
            start = block * BLOCK_SIZE + step % PARTS * BLOCK_N - first_position
            visible &= tl.load(chosen + block, mask=row_inside, other=0) != 0
        else:
            start = step * BLOCK_N
        column = start + tl.arange(0, BLOCK_N)
        inside = (column >= 0) & (column < num_keys)
        loaded = inside[:, None] & dim_inside[None, :]
        at = column[:, None].to(tl.int64)
        b_k = tl.load(keys + at * stride_key_token + dim[None, :], mask=loaded, other=0.0)
        b_v = tl.load(values + at * stride_value_token + dim[None, :], mask=loaded, other=0.0)
        b_k, b_v = b_k.to(b_q.dtype), b_v.to(b_q.dtype)
        seen = visible[:, None] & inside[None, :]
        if CAUSAL:
            seen &= first_position + column[None, :] <= past_from + token[:, None]
        peak, mass, b_o = attend_tile(b_q, b_k, b_v, seen, peak, mass, b_o, scale_log2)
    empty = mass == 0.0
    mass = tl.where(empty, 1.0, mass)
    lse = tl.where(empty, float("-inf"), (peak + tl.log2(mass)) * 0.6931471805599453)
    tl.store(lse_out, lse, mask=row_inside)
    tl.store(output, b_o / mass[:, None], mask=mask)


def attend_part(
    query: Tensor, keys: Tensor, values: Tensor, chosen: Tensor | None, scale: float, *,
    first_position: int = 0, block_size: int = 0, past_from: int | None = None,
    total: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Same contract as :func:`vllm_sparse.kernels.reference.sparda_prefill.attend_part`.

    Queries are rounded to the dtype of the keys, unless that is fp8. One launch, or two with
    ``chosen``: the first lists the blocks that each tile of queries reads, so that others cost
    nothing.

    Args:
        query: ``[G, group, T, D]``, channels contiguous.
        keys: ``[G, n, D]``, channels contiguous.
        values: ``[G, n, D]``, channels contiguous.
        chosen: bool or uint8 ``[G, T, blocks]``, blocks contiguous, or ``None``.
        scale: Logit scale.
        first_position: Position of the first key.
        block_size: Tokens per block, a power of two of at least 16; needed with ``chosen``.
        past_from: Position of the first query, to hide the keys of later positions.
        total: Output, channels contiguous, and log-sum-exp of other keys, to merge with in place.
    """
    kv_heads, group, tokens, dim = query.shape
    num_keys, device = keys.shape[1], keys.device
    assert query.stride(-1) == keys.stride(-1) == values.stride(-1) == 1
    merge = total is not None
    if total is None:
        output = torch.zeros(query.shape, dtype=torch.float32, device=device)
        total = output, output.new_full(query.shape[:3], -torch.inf)
    output, lse = total
    assert output.stride(-1) == 1
    if not lse.numel() or not num_keys:
        return total
    if keys.dtype != FP8:
        query = query.to(keys.dtype)
    shape = {"CAUSAL": past_from is not None, "GROUP": group, "BLOCK_SIZE": block_size}
    past_from = past_from or 0
    block, warps, stages = launch("attend_part", device, dim)
    most = _ROWS
    if query.dtype == torch.float32:
        most, block, stages = most // 2, block // 2, 1
    if dim > 128:
        most //= 2
    rows = min(row_block(tokens * group), most)
    tiles = -(-tokens * group // rows)
    lists, marks, strides = lse, lse, (0, 0, 0)  # unused
    if chosen is not None:
        assert chosen.stride(-1) == 1
        assert block_size >= 16
        assert block_size & (block_size - 1) == 0, "tiles of keys must not straddle blocks"
        marks = chosen.view(torch.uint8)
        first_block = first_position // block_size
        end_block = -(-(first_position + num_keys) // block_size)
        assert end_block <= chosen.shape[2]
        listed = 1 + end_block - first_block
        lists = torch.empty(kv_heads, tiles, listed, dtype=torch.int32, device=device)
        strides = (chosen.stride(0), chosen.stride(1), listed)
        width, list_warps, _ = launch("list_blocks", device)
        _list_blocks_kernel[(tiles, kv_heads)](
            marks, lists, tokens, first_block, end_block, past_from, *strides, **shape,
            BLOCK_M=rows, BLOCK_T=triton.next_power_of_2(-(-rows // group) + (rows % group > 0)),
            BLOCK=width, num_warps=list_warps,
        )  # fmt: skip
        block = min(block, block_size)
    _attend_part_kernel[(tiles, kv_heads)](
        query, keys, values, marks, lists, output, lse, scale * LOG2_E, tokens,
        num_keys, first_position, past_from, query.stride(0), query.stride(1), query.stride(2),
        keys.stride(0), keys.stride(1), values.stride(0), values.stride(1), *strides,
        *output.stride()[:3], *lse.stride(), **shape, DIM=dim, BLOCK_M=rows, BLOCK_N=block,
        BLOCK_D=dim_block(dim), CHOSEN=chosen is not None, MERGE=merge,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return total
