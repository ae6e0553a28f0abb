# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Scores of prompt tokens on a paged cache, in PyTorch, one prompt after the other.

Keys and values are read through views ``[blocks, G, block_size, D]`` with any strides, so that
they may lie in the cache in the stock kernel's layout. Keys that are already gathered,
``[G, n, D]``, are one block of ``n`` tokens: ``keys[None]`` with a block table of zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_sparse.policies.sinks import softmax


def score_prompt(
    query_window: Tensor,
    keys: Tensor,
    block_table: Tensor,
    prompt_lens: Tensor,
    *,
    pool_kernel: int,
    scale: float,
    sinks: Tensor | None = None,
) -> Tensor:
    """What :func:`vllm_sparse.policies.rocketkv.select_prompt_tokens` ranks tokens by.

    Args:
        query_window: Post-RoPE queries of each prompt's last ``w`` positions, ``[R, H, w, D]``.
        keys: ``[blocks, G, block_size, D]``.
        block_table: Each prompt's blocks, int32 ``[R, max_blocks]``.
        prompt_lens: int32 ``[R]``; 0 marks a padding row, else more than ``w``.
        pool_kernel: Odd width of the max pool.
        scale: Logit scale, that of an fp8 cache's keys included.
        sinks: Learned attention sinks, a logit of each query head, any dtype ``[H]``.

    Returns:
        Pooled scores of the tokens before the window, float32 ``[R, G, max_blocks * block_size]``;
        zero from there on.
    """
    requests, heads, window, dim = query_window.shape
    kv_heads, block_size = keys.shape[1:3]
    width = block_table.shape[1] * block_size
    pooled = torch.zeros(requests, kv_heads, width, device=keys.device)
    own = None if sinks is None else sinks.float().view(kv_heads, -1, 1)
    future = torch.ones(window, window, dtype=torch.bool, device=keys.device).triu(1)
    for request, length in enumerate(prompt_lens.tolist()):
        if length <= 0:
            continue
        held = gather_tokens(keys, block_table[request], length).float()
        queries = query_window[request].float().view(kv_heads, heads // kv_heads, window, dim)
        logits = queries @ held.transpose(-1, -2).unsqueeze(1) * scale
        logits[..., length - window :].masked_fill_(future, -torch.inf)
        score = softmax(logits, own)[..., : length - window].sum((1, 2))
        pooled[request, :, : length - window] = torch.nn.functional.max_pool1d(
            score.unsqueeze(1), pool_kernel, stride=1, padding=pool_kernel // 2
        ).squeeze(1)
    return pooled


def gather_tokens(pages: Tensor, blocks: Tensor, length: int) -> Tensor:
    """The first ``length`` tokens of blocks ``[blocks, G, block_size, D]``, ``[G, length, D]``."""
    return pages[blocks.long()].transpose(0, 1).flatten(1, 2)[:, :length]
