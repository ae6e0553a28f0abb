# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Stores a step's new tokens, the windows of compressed keys that they complete, and queries."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from vllm_sparse.kernels.fp8 import UNSCALED, Scales, encode

if TYPE_CHECKING:
    from vllm_sparse.kernels.types import NewQueries, NewWindows


def write_tokens(
    host: Tensor,
    slab: Tensor,
    frame_of: Tensor,
    slots: Tensor,
    key: Tensor,
    value: Tensor,
    windows: NewWindows | None = None,
    scales: Scales = UNSCALED,
    queries: NewQueries | None = None,
) -> None:
    """Store tokens on the host, and in those frames that hold their pieces; complete windows.

    With ``queries`` it does what :func:`record_queries` does, in the same launch.

    Args:
        host: ``[blocks, G, block_size, 2 * D]``, changed.
        slab: ``[frames, block_size, 2 * D]``, changed.
        frame_of: Frame of each piece or negative, ``[blocks * G]``.
        slots: ``block * block_size + offset`` of each token, negative for padding, ``[T]``.
        key: ``[T, G, D]``.
        value: ``[T, G, D]``.
        windows: For tokens that each are the newest one of a row.
        scales: Of an fp8 cache.
        queries: Of tokens that each are the newest one of a row.
    """
    kv_heads, size = host.shape[1:3]
    real = slots >= 0
    stored = (
        encode(part[real], host.dtype, scale, scales.truncates)
        for part, scale in ((key, scales.key), (value, scales.value))
    )
    rows = torch.cat(tuple(stored), -1)
    block, offset = slots[real] // size, slots[real] % size
    host[block, :, offset] = rows.to(host.device)
    pieces = block[:, None] * kv_heads + torch.arange(kv_heads, device=block.device)
    frame = frame_of[pieces].long()
    held = frame >= 0
    slab[frame[held], offset[:, None].expand_as(frame)[held]] = rows[held]
    if windows is not None:
        _complete_windows(windows, host, slab, frame_of, scales.key)
    if queries is not None:
        every = torch.arange(len(slots), device=slots.device)
        record_queries(queries.kept, queries.query, slots, every, size)
        if queries.recent is not None:
            queries.recent[: len(slots)][real] = queries.query[real].to(queries.recent.dtype)


def _complete_windows(
    windows: NewWindows, host: Tensor, slab: Tensor, frame_of: Tensor, key_scale: float
) -> None:
    """Add windows; pieces are read from their frames where they have one."""
    kv_heads, size = host.shape[1:3]
    dim, stride = windows.compressed.shape[3], windows.stride
    for row, position in enumerate(windows.positions.tolist()):
        if position + 1 < 2 * stride or (position + 1) % stride:
            continue
        token = torch.arange(position + 1 - 2 * stride, position + 1, device=slab.device)
        block = windows.table[row].long()[token // size]
        rows = host[block, :, token % size].to(slab.device)
        pieces = block[:, None] * kv_heads + torch.arange(kv_heads, device=block.device)
        frame = frame_of[pieces].long()
        held = frame >= 0
        rows[held] = slab[frame[held], (token % size)[:, None].expand_as(frame)[held]]
        mean = mean_of_windows(rows[None, ..., :dim])[0] * key_scale
        target = windows.compressed[block[-1], :, position % size // stride]
        target.copy_(mean)


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
    kept[slots[real] // block_size] = query[real].to(kept.device, kept.dtype)


def recall_queries(
    kept: Tensor, recent: Tensor, places: Tensor, blocks: Tensor, output: Tensor
) -> None:
    """Find the queries that all layers have recorded.

    Args:
        kept: ``[layers, blocks, H, D]``.
        recent: ``[layers, n, H, D]`` of the same dtype.
        places: Where each row's are in ``recent``, negative if nowhere, ``[R]``.
        blocks: Under which block each row's are kept, ``[R]``.
        output: Written, ``[layers, R or more, H, D]`` of the same dtype.
    """
    afar = kept[:, blocks.to(kept.device)].to(recent.device)
    near = (places >= 0)[:, None, None]
    output[:, : len(places)] = torch.where(near, recent[:, places.clamp(min=0)], afar)
