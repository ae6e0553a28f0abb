# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The Forecast's loss, one row and one head at a time in float64, from the specification."""

from __future__ import annotations

import math

import torch


def naive_teacher(kind, query, keys, row, head, sizes, scale):
    """Distribution over windows, or over blocks for ``block-mass``."""
    group = query.shape[0] // keys.shape[0]
    tokens = keys.shape[1]
    stride, size = sizes.kernel_stride, 2 * sizes.kernel_stride
    windows = (tokens - size) // stride + 1
    total = None
    for member in range(group):
        vector = query[head * group + member, row]
        if kind == "fine":
            count = min(row + 1, tokens - 1)
            means = torch.stack([(keys[head, j] + keys[head, j + 1]) / 2 for j in range(count)])
        elif kind == "query":
            count = max(0, (row + 1 - size) // stride + 1)
            if not count:
                return torch.zeros(windows, dtype=torch.float64)
            starts = range(0, count * stride, stride)
            means = torch.stack([keys[head, j : j + size].mean(0) for j in starts])
        else:
            count, means = row + 1, keys[head, : row + 1]
        weights = torch.softmax(means @ vector * scale, 0)
        total = weights if total is None else total + weights
    if kind == "fine":
        result = torch.zeros(windows, dtype=torch.float64)
        for window in range(windows):
            near = range(max(0, window * stride - 1), window * stride + stride)
            near = [j for j in near if j < len(total)]
            if near:
                result[window] = total[near].max()
    elif kind == "query":
        result = torch.zeros(windows, dtype=torch.float64)
        result[:count] = total
    else:
        result = torch.zeros(-(-tokens // sizes.block_size), dtype=torch.float64)
        for block in range(len(result)):
            result[block] = total[block * sizes.block_size : (block + 1) * sizes.block_size].sum()
    return result / (result.sum() + 1e-8)


def naive_row(kind, supervision, query, keys, forecast, row, head, sizes, scale):
    """KL divergence of one row."""
    tokens = keys.shape[1]
    stride, per_block = sizes.kernel_stride, sizes.windows_per_block
    target = naive_teacher(kind, query, keys, row, head, sizes, scale)
    windows = (tokens - 2 * stride) // stride + 1
    logits = []
    for window in range(windows):
        mean = keys[head, window * stride : (window + 2) * stride].mean(0)
        seen = stride * window <= row
        logits.append((forecast @ mean) * scale if seen else torch.tensor(-math.inf))
    logits = torch.stack([value.double() for value in logits])
    blocks = -(-tokens // sizes.block_size)

    def best(values, block):
        near = [w for w in range(block * per_block - 1, (block + 1) * per_block) if w >= 0]
        near = [w for w in near if w < windows]
        return max((values[w] for w in near), default=torch.tensor(-math.inf))

    own = row // sizes.block_size
    free = [b for b in range(blocks) if sizes.init_blocks <= b < own - sizes.local_blocks]
    if kind == "block-mass":
        logits = torch.stack([best(logits, block).double() for block in range(blocks)])
        rank = {block: target[block] for block in free}
    else:
        rank = {block: best(target, block) for block in free}
    chosen = free
    if supervision == "selected":
        chosen = sorted(free, key=lambda block: (-rank[block], block))[: sizes.free_picks]
    columns = chosen
    if kind != "block-mass":
        columns = [w for b in chosen for w in range(b * per_block, (b + 1) * per_block)]
        columns = [w for w in columns if w < windows]
    if supervision == "free":
        if not columns or target[columns].sum() == 0:
            return torch.zeros((), dtype=torch.float64)
        wanted = target[columns] / target[columns].sum()
        given = torch.log_softmax(logits[columns], 0)
        return sum(t * (t.log() - g) for t, g in zip(wanted, given, strict=True) if t > 0)
    student = torch.softmax(logits, 0)

    def reduced(values):
        rest = (values.sum() - values[columns].sum()).clamp_min(1e-8).reshape(1)
        joined = torch.cat((values[columns].clamp_min(1e-8), rest))
        return joined / joined.sum()

    wanted, given = reduced(target), reduced(student)
    return (wanted * (wanted.log() - given.log())).sum()
