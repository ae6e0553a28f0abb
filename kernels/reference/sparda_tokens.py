# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Stores a step's new tokens, the windows of compressed keys that they complete, and queries."""

from __future__ import annotations

import torch
from torch import Tensor


def write_tokens(
    host: Tensor, slab: Tensor, frame_of: Tensor, slots: Tensor, key: Tensor, value: Tensor
) -> None:
    """Store tokens on the host, and in those frames that hold their pieces.

    Args:
        host: ``[blocks, G, block_size, 2 * D]``, changed.
        slab: ``[frames, block_size, 2 * D]``, changed.
        frame_of: Frame of each piece or negative, ``[blocks * G]``.
        slots: ``block * block_size + offset`` of each token, negative for padding, ``[T]``.
        key: ``[T, G, D]``.
        value: ``[T, G, D]``.
    """
    kv_heads, size = host.shape[1:3]
    real = slots >= 0
    rows = torch.cat((key, value), -1)[real].to(host.dtype)
    block, offset = slots[real] // size, slots[real] % size
    host[block, :, offset] = rows.to(host.device)
    pieces = block[:, None] * kv_heads + torch.arange(kv_heads, device=block.device)
    frame = frame_of[pieces].long()
    held = frame >= 0
    slab[frame[held], offset[:, None].expand_as(frame)[held]] = rows[held]


def update_windows(
    compressed: Tensor,
    source: Tensor,
    positions: Tensor,
    block_table: Tensor,
    stride: int,
    *,
    slab: Tensor | None = None,
    frame_of: Tensor | None = None,
) -> None:
    """Store the windows of compressed keys that decode rows complete, means of two strides.

    A window is stored with the block that holds its last token; it may begin in the one before.

    Args:
        compressed: ``[blocks, G, windows per block, D]``, changed.
        source: ``[blocks, G, block_size, 2 * D]``, the rows' newest tokens written.
        positions: Position of each row's newest token, negative for padding, ``[R]``.
        block_table: Physical blocks of each row, ``[R, blocks]``.
        stride: Tokens from one window's start to the next.
        slab: Read instead of ``source`` where a piece has a frame, ``[frames, block_size, 2 * D]``.
        frame_of: Frame of each piece or negative, ``[blocks * G]``; needed with ``slab``.
    """
    kv_heads, size = source.shape[1:3]
    dim = compressed.shape[3]
    for row, position in enumerate(positions.tolist()):
        if position + 1 < 2 * stride or (position + 1) % stride:
            continue
        token = torch.arange(position + 1 - 2 * stride, position + 1, device=source.device)
        block = block_table[row].long()[token // size]
        rows = source[block, :, token % size]
        if slab is not None and frame_of is not None:
            pieces = block[:, None] * kv_heads + torch.arange(kv_heads, device=block.device)
            frame = frame_of[pieces].long()
            held = frame >= 0
            rows[held] = slab[frame[held], (token % size)[:, None].expand_as(frame)[held]]
        window = position % size // stride
        mean = mean_of_windows(rows[None, ..., :dim])[0]
        compressed[block[-1], :, window] = mean.to(compressed.dtype)


def mean_of_windows(keys: Tensor) -> Tensor:
    """Means of windows, added up half by half so that no implementation rounds differently.

    Args:
        keys: ``[W, tokens, G, D]``.

    Returns:
        float32 ``[W, G, D]``.
    """
    tokens, keys = keys.shape[1], keys.float()
    while keys.shape[1] % 2 == 0:
        half = keys.shape[1] // 2
        keys = keys[:, :half] + keys[:, half:]
    total = keys[:, 0]
    for rest in keys.unbind(1)[1:]:
        total = total + rest
    return total / tokens


def record_queries(
    kept: Tensor, query: Tensor, slots: Tensor, last: Tensor, block_size: int
) -> None:
    """Store the queries of the last token of each block under that block's id.

    Args:
        kept: ``[blocks, H, D]``, changed.
        query: ``[T, H, D]``.
        slots: ``block * block_size + offset`` of each token, negative for padding, ``[T]``.
        last: The last token that this step writes to each block, ``[n]``.
        block_size: Tokens per block.
    """
    real = last[slots[last] >= 0]
    kept[slots[real] // block_size] = query[real].to(kept.dtype)
