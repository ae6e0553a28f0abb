# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Moving the kept tokens of prompts into their tails, in PyTorch, one prompt after the other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from vllm_sparse.kernels.fp8 import readable
from vllm_sparse.kernels.reference.prompt import gather_tokens, score_prompt
from vllm_sparse.kernels.reference.topk import top_indices
from vllm_sparse.kernels.stage1 import chained

from vllm_sparse.policies.pages import page_extrema

if TYPE_CHECKING:
    from torch import Tensor
    from vllm_sparse.kernels.layout import PageLayout


def compact_tokens(
    cache: Tensor,
    keys: Tensor,
    values: Tensor,
    block_table: Tensor,
    prompt_lens: Tensor,
    dropped_blocks: Tensor,
    chosen: Tensor,
    *,
    layout: PageLayout,
    window: int,
) -> None:
    """Write the chosen tokens and the window into the blocks behind the dropped ones.

    Tail blocks hold plain token rows and page extrema; unused slots and pages become zero.

    Args:
        cache: ``[blocks, G, block_size, C]``, modified in the prompts' tails only.
        keys: ``[blocks, G, block_size, D]``; may be a view of ``cache``.
        values: ``[blocks, G, block_size, D]``; may be a view of ``cache``.
        block_table: Each prompt's blocks, int32 ``[R, max_blocks]``.
        prompt_lens: P, int32 ``[R]``; 0 marks a padding row.
        dropped_blocks: int32 ``[R]``.
        chosen: Ascending tokens before the window, int32 ``[R, G, max_count]``, of which the first
            ``P - dropped_blocks * block_size - window`` count.
        layout: Page geometry.
        window: Tokens at the end of each prompt that are always kept.
    """
    table = block_table.long()
    lengths, gone = prompt_lens.tolist(), dropped_blocks.tolist()
    for request, (length, dropped) in enumerate(zip(lengths, gone, strict=True)):
        if length <= 0:
            continue
        kept = length - dropped * layout.block_size
        end = torch.arange(length - window, length, device=cache.device)
        index = chosen[request, :, : kept - window].long()
        index = torch.cat((index, end.expand(len(index), -1)), -1).unsqueeze(-1)
        both = (readable(gather_tokens(part, table[request], length)) for part in (keys, values))
        rows = torch.cat(
            [part.gather(1, index.expand(-1, -1, layout.head_dim)) for part in both], 2
        )
        bounds = torch.cat(page_extrema(rows[..., : layout.head_dim], layout.page_size), -1)
        tail = table[request, dropped : -(-length // layout.block_size)]
        padding = len(tail) * layout.block_size - kept
        rows = torch.nn.functional.pad(rows, (0, 0, 0, padding)).to(cache.dtype)
        padding = len(tail) * layout.pages_per_block - bounds.shape[1]
        bounds = torch.nn.functional.pad(bounds, (0, 0, 0, padding)).to(cache.dtype)
        layout.tokens(cache)[tail] = rows.unflatten(1, (len(tail), -1)).transpose(0, 1)
        layout.index(cache)[tail] = bounds.unflatten(1, (len(tail), -1)).permute(1, 0, 3, 2)


compact_prompts = chained(score_prompt, top_indices, compact_tokens)
