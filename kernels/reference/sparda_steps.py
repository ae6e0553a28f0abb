# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What SparDA's GPU kernels compute, step by step, in PyTorch.

The functions of :mod:`.selection`, :mod:`.paging` and :mod:`.prefill` as a captured graph needs
them: results of a fixed size, counts in tensors, padding rows, errors as flags.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from vllm_sparse.kernels.reference import paging, prefill, selection


class Selected(NamedTuple):
    """What each decode row reads.

    Attributes:
        blocks: Logical blocks, ascending, -1 beyond the last, int32 ``[R, G, capacity]``.
        pieces: Their pieces on the host, ``block * G + g``, likewise.
        lengths: Tokens in a row's blocks, the same for all KV heads, int32 ``[R]``.
    """

    blocks: Tensor
    pieces: Tensor
    lengths: Tensor


def select_blocks(
    compressed: Tensor,
    vectors: Tensor,
    block_table: Tensor,
    positions: Tensor,
    ranking: selection.Ranking,
    blocks: selection.Blocks,
    *,
    dense_len: int = 0,
    capacity: int | None = None,
) -> Selected:
    """The blocks that each decode row reads: the best ones, or all if they are few.

    Args:
        compressed: ``[blocks, G, windows per block, D]``.
        vectors: ``[R, H, D]`` for a softmax, else ``[R, G, D]``.
        block_table: Physical blocks of each row ``[R, blocks]``; anything beyond its last.
        positions: Position of each row's token ``[R]``; negative for padding, which reads nothing.
        ranking: How to score.
        blocks: What to take.
        dense_len: Rows of at most so many tokens read all their blocks.
        capacity: Width of the result; at least what one row may read, which is the default.

    Returns:
        See :class:`Selected`.
    """
    rows, width = block_table.shape
    kv_heads, size = compressed.shape[1], blocks.block_size
    if capacity is None:
        capacity = min(max(blocks.top_k, -(-dense_len // size)), width)
    logical = torch.full((rows, kv_heads, capacity), -1)
    pieces = logical.clone()
    lengths = torch.zeros(rows, dtype=torch.int32)
    for row, position in enumerate(positions.tolist()):
        if position < 0:
            continue
        count = position // size + 1
        table = block_table[row, :count].cpu().long()
        if count <= blocks.top_k or position < dense_len:
            chosen = torch.arange(count).expand(kv_heads, -1)
        else:
            here = slice(row, row + 1)
            chosen = selection.select_blocks(
                compressed, vectors[here], table[None].to(compressed.device),
                positions[here].long(), ranking, blocks,
            )[0].cpu()  # fmt: skip
        reads = chosen.shape[1]
        logical[row, :, :reads] = chosen
        pieces[row, :, :reads] = table[chosen] * kv_heads + torch.arange(kv_heads)[:, None]
        lengths[row] = (reads - 1) * size + position % size + 1
    return Selected(*(part.int().to(compressed.device) for part in (logical, pieces, lengths)))


class Resolution(NamedTuple):
    """Where the wanted pieces are, and what must be copied before they may be read.

    Attributes:
        frames: Frame of each wanted piece, -1 where none was wanted, int32, in its shape.
        missing: Pieces to copy, int32, as long as ``frames``; only the first ``misses`` count.
        targets: Their frames, likewise.
        misses: How many, int32 ``[1]``.
    """

    frames: Tensor
    missing: Tensor
    targets: Tensor
    misses: Tensor


def resolve(table: paging.PageTable, wanted: Tensor, step: Tensor, counters: Tensor) -> Resolution:
    """Give every wanted piece a frame; see :func:`.paging.resolve`.

    Args:
        table: Changed.
        wanted: Pieces, -1 for none, repetitions allowed, int32, any shape, contiguous.
        step: Number of this step, larger than any before, int64 ``[1]``.
        counters: Added to, int64 ``[3]``: wanted pieces that had a frame, each counted once;
            copies to make; 1 if there are more pieces than frames. Then the pieces that found no
            frame have -1, and nothing else about the step can be relied on.

    Returns:
        See :class:`Resolution`.
    """
    size = wanted.numel()
    missing, targets = (torch.zeros(size, dtype=torch.int32) for _ in range(2))
    misses = torch.zeros(1, dtype=torch.int32)
    try:
        resolved = paging.resolve(table, wanted.long(), int(step))
    except paging.SlabFullError:
        counters[2] += 1
        pieces = wanted.long()
        frames = torch.where(pieces >= 0, table.frame_of[pieces.clamp(min=0)], -1)
        return Resolution(frames, missing, targets, misses)
    misses += len(resolved.missing)
    counters[0] += resolved.hits
    counters[1] += len(resolved.missing)
    missing[: len(resolved.missing)] = resolved.missing.int()
    targets[: len(resolved.targets)] = resolved.targets.int()
    return Resolution(resolved.frames, missing, targets, misses)


class Unframed(NamedTuple):
    """Rows that read all their tokens, from the host pool.

    Attributes:
        host: The pool, ``[blocks, G, block_size, 2 * D]``.
        table: Physical blocks, ``[T, blocks]``.
        lengths: Tokens of each such row, 0 for all others, ``[T]``.
    """

    host: Tensor
    table: Tensor
    lengths: Tensor


def attend_frames(
    slab: Tensor,
    query: Tensor,
    output: Tensor,
    frames: Tensor,
    lengths: Tensor,
    scale: float,
    unframed: Unframed | None = None,
) -> None:
    """Exact decode attention; see :func:`.paging.attend_frames`.

    Args:
        slab: See there, as for the others.
        query: ``[T, H, D]``.
        output: ``[T, H, D]``.
        frames: ``[T, G, K]``.
        lengths: ``[T]``.
        scale: Logit scale.
        unframed: Rows that have no frames.
    """
    paging.attend_frames(slab, query, output, frames, lengths, scale)
    if unframed is None:
        return
    host, table, whole = unframed
    kv_heads = host.shape[1]
    for row in whole.nonzero()[:, 0].tolist():
        here, blocks = slice(row, row + 1), -(-int(whole[row]) // host.shape[2])
        head = torch.arange(kv_heads, device=table.device)[:, None]
        pieces = table[row, :blocks].long() * kv_heads + head
        paging.attend_frames(
            host.flatten(0, 1), query[here], output[here], pieces[None], whole[here], scale
        )


def copy_pieces(
    target: Tensor,
    target_index: Tensor,
    source: Tensor,
    source_index: Tensor,
    count: Tensor,
    *,
    programs: int = 32,
) -> None:
    """Copy whole pieces, as many as a tensor says; see :func:`.paging.copy_pieces`.

    Args:
        target: Contiguous ``[n, ...]``, changed.
        target_index: ``[most]``.
        source: Contiguous ``[m, ...]`` with pieces of the same size.
        source_index: ``[most]``.
        count: How many, ``[1]``.
        programs: How many share the work on a GPU.
    """
    del programs
    first = slice(int(count))
    paging.copy_pieces(target, target_index[first].long(), source, source_index[first].long())


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
        mean = rows[..., :dim].float().mean(0)
        window = position % size // stride
        compressed[block[-1], :, window] = mean.to(compressed.dtype)


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


def attend_part(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    chosen: Tensor | None,
    causal: bool,
    scale: float,
    *,
    first_position: int = 0,
    block_size: int = 0,
    past_from: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over some of the keys; see :func:`.prefill.attend_part`.

    Args:
        query: ``[G, group, T, D]``.
        keys: ``[G, n, D]``, of consecutive positions.
        values: ``[G, n, D]``.
        chosen: Blocks that each token may read, bool ``[G, T, blocks]``; ``None`` allows all.
        causal: The first key is the first query's own, so that it is ``past_from``.
        scale: Logit scale.
        first_position: Position of the first key.
        block_size: Tokens per block; needed with ``chosen``.
        past_from: Position of the first query: no token sees keys of later positions. ``None``
            hides nothing.

    Returns:
        float32 output ``[G, group, T, D]`` and log-sum-exp ``[G, group, T]``; zero and minus
        infinity where nothing is visible.
    """
    if causal:
        past_from = first_position
    sizes = query.shape[2], keys.shape[1]
    mask = visible(*sizes, chosen, first_position, block_size, past_from, keys.device)
    return prefill.attend_part(query, keys, values, mask, False, scale)


def visible(
    tokens: int,
    num_keys: int,
    chosen: Tensor | None,
    first_position: int,
    block_size: int,
    past_from: int | None,
    device: torch.device | None = None,
) -> Tensor | None:
    """The keys that tokens may read, token by token; see :func:`attend_part`.

    Returns:
        bool ``[G or 1, tokens, num_keys]``; ``None`` allows all.
    """
    device = device if chosen is None else chosen.device
    position = first_position + torch.arange(num_keys, device=device)
    mask = None
    if chosen is not None:
        mask = chosen[..., position // block_size].bool()
    if past_from is not None:
        own = past_from + torch.arange(tokens, device=device)
        past = (position <= own[:, None])[None]
        mask = past if mask is None else mask & past
    return mask
