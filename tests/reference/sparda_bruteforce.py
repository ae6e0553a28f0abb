# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""SparDA's block selection in the slowest and most obvious form: loops over heads and tokens.

Written from the description of the algorithm only; independent of the library under test. All
arithmetic is in float64. Notation: H query heads, G KV heads (head h belongs to group
``h // (H // G)``), D head size, T query tokens, n tokens. Window j covers the tokens
``[j * stride, j * stride + kernel)`` and counts once it is complete; block m covers
``[m * block_size, (m + 1) * block_size)``.
"""

import math


def complete_windows(tokens, kernel=32, stride=16):
    """The windows that lie within the first ``tokens`` tokens."""
    windows = []
    while len(windows) * stride + kernel <= tokens:
        windows.append(len(windows))
    return windows


def compress_keys(keys, kernel=32, stride=16):
    """Mean key of every complete window of keys [G, n, D]: [G][windows][D]."""
    num_groups, n, head_dim = keys.shape
    keys = keys.double().tolist()
    compressed = []
    for g in range(num_groups):
        of_group = []
        for j in complete_windows(n, kernel, stride):
            mean = []
            for d in range(head_dim):
                total = math.fsum(keys[g][t][d] for t in range(j * stride, j * stride + kernel))
                mean.append(total / kernel)
            of_group.append(mean)
        compressed.append(of_group)
    return compressed


def _dot(left, right):
    return math.fsum(x * y for x, y in zip(left, right, strict=True))


def forecast_scores(forecast, compressed):
    """Raw dot products of the Forecast [G, T, D] with compressed keys [G, C, D]: [G][T][C]."""
    forecast, compressed = forecast.double().tolist(), compressed.double().tolist()
    scores = []
    for vectors, windows in zip(forecast, compressed, strict=True):
        scores.append([[_dot(vector, window) for window in windows] for vector in vectors])
    return scores


def query_scores(query, compressed, positions, kernel=32, stride=16, scale=None):
    """Softmax per head over the windows complete at the token, summed over a group: [G][T][C]."""
    num_heads, num_tokens, head_dim = query.shape
    num_groups, num_windows, _ = compressed.shape
    heads_per_group = num_heads // num_groups
    scale = 1.0 / math.sqrt(head_dim) if scale is None else scale
    query, compressed = query.double().tolist(), compressed.double().tolist()
    scores = []
    for g in range(num_groups):
        of_group = []
        for t in range(num_tokens):
            i = int(positions[t])
            visible = [j for j in range(num_windows) if j * stride + kernel - 1 <= i]
            row = [0.0] * num_windows
            for h in range(g * heads_per_group, (g + 1) * heads_per_group):
                logits = {j: _dot(query[h][t], compressed[g][j]) * scale for j in visible}
                top = max(logits.values(), default=0.0)
                weights = {j: math.exp(logit - top) for j, logit in logits.items()}
                total = math.fsum(weights.values())
                for j in visible:
                    row[j] += weights[j] / total
            of_group.append(row)
        scores.append(of_group)
    return scores


def block_score(row, block, windows_per_block=4):
    """Max pool of a row of window scores: kernel ``windows_per_block + 1``, padding 1."""
    first = block * windows_per_block - 1
    last = block * windows_per_block + windows_per_block - 1
    found = [row[j] for j in range(first, last + 1) if 0 <= j < len(row)]
    return max(found, default=-math.inf)


def is_forced(block, own, init_blocks, local_blocks):
    return block < init_blocks or own - local_blocks <= block <= own


def select_blocks(
    scores,
    positions,
    block_size=64,
    init_blocks=1,
    local_blocks=32,
    top_k=96,
    stride=16,
):
    """The ascending blocks of each token, padded with -1 to ``top_k``: [G][T][top_k].

    Forced blocks first, then the highest block scores; of equal ones, the lower block.
    """
    windows_per_block = block_size // stride
    selection = []
    for of_group in scores.double().tolist():
        rows = []
        for t, row in enumerate(of_group):
            own = int(positions[t]) // block_size
            forced, others = [], []
            for m in range(own + 1):
                if is_forced(m, own, init_blocks, local_blocks):
                    forced.append(m)
                else:
                    others.append((-block_score(row, m, windows_per_block), m))
            assert len(forced) <= top_k
            others.sort()
            chosen = forced + [m for _, m in others[: top_k - len(forced)]]
            rows.append(sorted(chosen) + [-1] * (top_k - len(chosen)))
        selection.append(rows)
    return selection
