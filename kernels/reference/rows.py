# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""A decode batch as the RocketKV kernels see it, from what vLLM knows of its rows, in PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from vllm_sparse.kernels.types import Rows


def plan_rows(
    rows: Rows,
    seq_lens: Tensor,
    prompt_lens: Tensor,
    block_table: Tensor,
    rules: Tensor,
    counted: Tensor,
    *,
    block_size: int,
    window: int,
    per_block: int,
    top_k: int,
    query_start: Tensor | None = None,
) -> None:
    """Fill ``rows`` for one step.

    A row inside its prompt (a chunk of one token) and a row of a request that stays dense read
    everything, by their logical blocks.

    Args:
        rows: Written.
        seq_lens: Tokens of each row after the step, int32 ``[R]``; 0 marks a padding row.
        prompt_lens: Prompt tokens of each row's request, int32 ``[R]``.
        block_table: Logical blocks, int32 ``[R, max_blocks]``.
        rules: By prompt length, int32 ``[lengths, 3]``: dropped blocks; channels to read or 0 if
            the request stays dense; blocks before those in which window queries wait.
        counted: int64 ``[3]``, added to: sparse rows, their visible and their selected tokens.
        block_size: Tokens per block.
        window: Last prompt tokens whose queries are parked; 0 parks none.
        per_block: Window queries that a block has room for.
        top_k: Tokens that a sparse row reads at most.
        query_start: Where the tokens of each request start in the batch, int32 ``[R + 1]``, if it
            may have several: then ``rows`` has a row for each of the ``T`` tokens, and those after
            the last request's are padding. No request that is compacted may have tokens on both
            sides of its prompt's end.
    """
    final_lens = seq_lens
    if query_start is not None:
        token = torch.arange(len(rows.lengths), device=seq_lens.device)
        row = torch.searchsorted(query_start[1:].contiguous(), token, right=True)
        inside, row = row < len(seq_lens), row.clamp(max=len(seq_lens) - 1)
        final_lens = torch.where(inside, seq_lens[row], 0)
        later = query_start[row + 1] - 1 - token
        seq_lens = torch.where(inside, final_lens - later, 0).clamp(min=0).int()
        prompt_lens, block_table = prompt_lens[row], block_table[row]
    dropped, top_r, shared = rules[prompt_lens.clamp(0, len(rules) - 1).long()].unbind(-1)
    sparse = (top_r > 0) & (seq_lens > prompt_lens)
    gone = torch.where(sparse, dropped, 0)
    rows.lengths.copy_(seq_lens - gone * block_size)
    if rows.final_lengths is not None:
        rows.final_lengths.copy_(final_lens - gone * block_size)
    rows.top_r.copy_(torch.where(sparse, top_r, 0))
    column = gone[:, None] + torch.arange(block_table.shape[1], device=block_table.device)
    column = column.clamp(max=block_table.shape[1] - 1).long()
    rows.block_table.copy_(block_table.gather(1, column))

    index = seq_lens - 1 - (prompt_lens - window)
    parks = (top_r > 0) & (seq_lens > 0) & (seq_lens <= prompt_lens) & (index >= 0)
    column = torch.where(parks, shared + index // per_block, 0).long()
    block = block_table.gather(1, column[:, None])[:, 0]
    rows.parked.copy_(torch.where(parks, block * per_block + index % per_block, -1))

    selected = rows.lengths.clamp(max=top_k)
    for i, amount in enumerate((sparse, seq_lens, selected)):
        counted[i] += torch.where(sparse, amount, 0).sum()
