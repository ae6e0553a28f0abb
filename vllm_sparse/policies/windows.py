# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""SparDA (arXiv 2606.04511) and InfLLM-v2: which KV blocks a token reads.

Notation: H query heads, G KV heads, D head size, T query tokens, n tokens. Keys are compressed to
one mean per *window* of ``kernel_size`` tokens, every ``kernel_stride`` tokens; a *block* of
``block_size`` tokens is scored by the windows that overlap it. All functions but
:func:`compress_keys` accept leading batch dimensions, the same for all arguments.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def num_windows(tokens: int, kernel_size: int = 32, kernel_stride: int = 16) -> int:
    """Complete windows in a sequence of ``tokens`` tokens."""
    return max(0, (tokens - kernel_size) // kernel_stride + 1)


def compress_keys(keys: Tensor, kernel_size: int = 32, kernel_stride: int = 16) -> Tensor:
    """Mean key of every complete window (InfLLM-v2, block compression).

    Args:
        keys: Post-RoPE keys, ``[G, n, D]``.
        kernel_size: Tokens per window.
        kernel_stride: Tokens from one window's start to the next.

    Returns:
        ``[G, windows, D]`` in the dtype of ``keys``, averaged in float32. Window ``j`` covers
        tokens ``[j * kernel_stride, j * kernel_stride + kernel_size)``.
    """
    heads, tokens, dim = keys.shape
    if tokens < kernel_size:
        return keys.new_empty(heads, 0, dim)
    windows = keys.unfold(1, kernel_size, kernel_stride)
    return windows.float().mean(-1).to(keys.dtype)


def forecast_scores(forecast: Tensor, compressed_keys: Tensor) -> Tensor:
    """Window scores of a Forecast: the raw dot product (SparDA, Forecast scoring).

    There is no softmax and no scale: they would not change a ranking within one head.

    Args:
        forecast: Post-RoPE Forecast of the layer before, one vector per KV head, ``[G, T, D]``.
        compressed_keys: ``[G, windows, D]``.

    Returns:
        float32 ``[G, T, windows]``. Future windows are not masked: they cannot reach a block that
        is not forced (:func:`select_blocks`), and future blocks are never selected.
    """
    return forecast.float() @ compressed_keys.float().transpose(-1, -2)


def query_scores(
    query: Tensor,
    compressed_keys: Tensor,
    positions: Tensor,
    *,
    kernel_size: int = 32,
    kernel_stride: int = 16,
    scale: float | None = None,
) -> Tensor:
    """Window scores of the queries themselves (the InfLLM-v2 selector, "stage 1").

    Each head's softmax over the windows that are complete at its position, summed over the query
    heads of a KV head.

    Args:
        query: Post-RoPE queries, ``[H, T, D]``.
        compressed_keys: ``[G, windows, D]``.
        positions: Absolute position of each query token, ``[T]``.
        kernel_size: Tokens per window.
        kernel_stride: Tokens from one window's start to the next.
        scale: Logit scale, ``1 / sqrt(D)`` if omitted.

    Returns:
        float32 ``[G, T, windows]``; zero where a token sees no complete window.
    """
    kv_heads, windows, dim = compressed_keys.shape[-3:]
    grouped = query.float().reshape(*query.shape[:-3], kv_heads, -1, *query.shape[-2:])
    logits = grouped @ compressed_keys.float().transpose(-1, -2).unsqueeze(-3)
    logits = logits * (dim**-0.5 if scale is None else scale)
    ends = torch.arange(windows, device=query.device) * kernel_stride + kernel_size - 1
    hidden = (ends > positions.unsqueeze(-1)).unsqueeze(-3).unsqueeze(-3)
    logits = logits.masked_fill(hidden, float("-inf"))
    # A row without a visible window is all -inf, whose softmax is NaN.
    probabilities = torch.softmax(logits, -1).masked_fill(hidden, 0.0)
    return probabilities.sum(-3)


def block_scores(scores: Tensor, num_blocks: int, windows_per_block: int = 4) -> Tensor:
    """Largest score of the windows that overlap each block.

    Args:
        scores: ``[G, T, windows]``.
        num_blocks: Blocks to score.
        windows_per_block: ``block_size / kernel_stride``; a window spans two strides.

    Returns:
        ``[G, T, num_blocks]``; minus infinity where a block has no window. Block ``m`` takes the
        windows ``[m * windows_per_block - 1, (m + 1) * windows_per_block)``.
    """
    lowest = float("-inf")
    wanted = num_blocks * windows_per_block
    missing = max(0, wanted - scores.shape[-1])
    scores = functional.pad(scores[..., :wanted], (1, missing), value=lowest)
    flat = scores.flatten(0, -2).unsqueeze(1)
    pooled = functional.max_pool1d(flat, windows_per_block + 1, windows_per_block)
    return pooled.view(*scores.shape[:-1], num_blocks)


def select_blocks(
    scores: Tensor,
    positions: Tensor,
    *,
    block_size: int = 64,
    init_blocks: int = 1,
    local_blocks: int = 32,
    top_k: int = 96,
    kernel_stride: int = 16,
) -> Tensor:
    """The blocks that each token reads (InfLLM-v2, block selection).

    Always the first ``init_blocks``, the token's own block and the ``local_blocks`` before it; then
    the highest scores until there are ``top_k`` (the *total*; Hugging Face checkpoints of MiniCPM4
    count without the local blocks). Equal scores favour the earlier block. For ``local_blocks`` of
    at least one the result depends only on windows that are complete before the token's own
    block, so it is the same for any chunking of the prompt and may be computed a layer ahead.

    Args:
        scores: Window scores, ``[G, T, windows]``.
        positions: Absolute position of each token, ``[T]``.
        block_size: Tokens per block, a multiple of ``kernel_stride``.
        init_blocks: Blocks at the start that are always read.
        local_blocks: Blocks before the token's own that are always read.
        top_k: Blocks to read in total.
        kernel_stride: Tokens from one window's start to the next.

    Returns:
        int64 ``[G, T, top_k]``, ascending, padded with -1 at the end.

    Raises:
        ValueError: ``top_k`` is smaller than the number of blocks that are always read.
    """
    if top_k < init_blocks + local_blocks + 1:
        raise ValueError(
            f"top_k={top_k} is less than the {init_blocks + local_blocks + 1} blocks that are "
            "always read"
        )
    if not positions.numel():
        return scores.new_empty(*scores.shape[:-1], top_k, dtype=torch.int64)
    own = (positions // block_size).unsqueeze(-2).unsqueeze(-1)
    num_blocks = int(own.max()) + 1
    pooled = block_scores(scores, num_blocks, block_size // kernel_stride)
    block = torch.arange(num_blocks, device=scores.device)
    forced = (block < init_blocks) | (block >= own - local_blocks)
    future = block > own
    pooled = pooled.masked_fill(forced, float("inf"))
    # Below every score of a visible block, those without a window included.
    rank = torch.where(future, float("nan"), pooled).nan_to_num(
        nan=float("-inf"), posinf=float("inf"), neginf=torch.finfo(pooled.dtype).min
    )
    order = rank.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
    sentinel = num_blocks
    order = torch.where(order > own, sentinel, order).sort(-1).values
    order = functional.pad(order, (0, top_k - order.shape[-1]), value=sentinel)
    return torch.where(order == sentinel, -1, order)
