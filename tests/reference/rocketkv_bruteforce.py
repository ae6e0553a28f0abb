# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""RocketKV in the slowest and most obvious form: loops over heads, queries, tokens and pages.

Written from the description of the algorithm only; independent of the library under test.
Notation: H query heads, G KV heads (head h belongs to group ``h // (H // G)``), D head size.
"""

import math

import torch


def plan(prompt_len, max_new_tokens, token_budget, head_dim, window=32, page_sizes=None):
    """Split one token budget into the parameters of the two stages."""
    total = prompt_len + max_new_tokens
    ratio = max(1.0, total / token_budget)
    split = min(0.2 + 0.06 * math.log2(ratio), 0.8)
    capacity = math.floor(total / ratio**split)
    capacity = max(capacity, min(2 * max_new_tokens, total))

    prompt_budget = capacity - max_new_tokens
    prompt_budget = max(prompt_budget, window)
    prompt_budget = min(prompt_budget, prompt_len)

    ratio2 = max(1.0, capacity / token_budget)
    page_size = math.ceil(math.sqrt(ratio2))
    if page_size > ratio2:
        page_size = 1
    if page_sizes is not None:
        large_enough = [size for size in sorted(page_sizes) if size >= page_size]
        page_size = large_enough[0] if large_enough else max(page_sizes)
    top_r = math.floor(head_dim * page_size / ratio2)
    top_r = min(max(top_r, 1), head_dim)

    return {
        "capacity": capacity,
        "prompt_budget": prompt_budget,
        "page_size": page_size,
        "top_r": top_r,
        "top_k": token_budget // 2,
        "dense": prompt_budget >= prompt_len,
    }


# ---- stage 1 -------------------------------------------------------------------------------------


def prompt_scores(query_window, keys, kernel_size=63, dtype=torch.float32, scale=None, sinks=None):
    """Pooled score of each prompt token before the window: [G, n - w]."""
    num_heads, w, head_dim = query_window.shape
    num_groups, n, _ = keys.shape
    heads_per_group = num_heads // num_groups
    assert kernel_size % 2 == 1
    scale = 1.0 / math.sqrt(head_dim) if scale is None else scale
    query_window = query_window.to(dtype)
    keys = keys.to(dtype)

    pooled = torch.empty(num_groups, n - w, dtype=dtype)
    for g in range(num_groups):
        votes = torch.zeros(n - w, dtype=dtype)
        for h in range(g * heads_per_group, (g + 1) * heads_per_group):
            for i in range(w):
                visible = n - w + i + 1  # query i is the token n - w + i and sees itself
                logits = (keys[g, :visible] * query_window[h, i]).sum(dim=-1) * scale
                # The window keys are in the denominator, and a learned sink (one per head).
                if sinks is not None:
                    logits = torch.cat((logits, sinks[h : h + 1].to(dtype)))
                probability = torch.softmax(logits, dim=0)
                votes += probability[: n - w]
        half = kernel_size // 2
        for t in range(n - w):
            pooled[g, t] = votes[max(0, t - half) : t + half + 1].max()
    return pooled


def pick_prompt_tokens(scores, window_len, prompt_budget):
    """The best tokens before the window (ties: the lowest index), then the window: [G, budget]."""
    num_groups, before = scores.shape
    n = before + window_len
    if n <= prompt_budget:
        return torch.arange(n).repeat(num_groups, 1)
    assert prompt_budget >= window_len
    rows = []
    for g in range(num_groups):
        score = scores[g].tolist()
        ranked = sorted(range(before), key=lambda t: (-score[t], t))
        best = sorted(ranked[: prompt_budget - window_len])
        rows.append(best + list(range(before, n)))
    return torch.tensor(rows, dtype=torch.long)


def select_prompt_tokens(
    query_window, keys, prompt_budget, kernel_size=63, dtype=torch.float32, scale=None, sinks=None
) -> torch.Tensor:
    """Stage 1. query_window [H, w, D] (the last w queries), keys [G, n, D]; all after RoPE."""
    num_groups, n, _ = keys.shape
    if n <= prompt_budget:
        return torch.arange(n).repeat(num_groups, 1)
    scores = prompt_scores(query_window, keys, kernel_size, dtype, scale, sinks)
    return pick_prompt_tokens(scores, query_window.shape[1], prompt_budget)


# ---- stage 2 -------------------------------------------------------------------------------------


def page_extrema(keys, page_size):
    """Smallest and largest key component per page; the last page may hold fewer tokens."""
    num_groups, n, head_dim = keys.shape
    num_pages = math.ceil(n / page_size)
    key_min = torch.empty(num_groups, num_pages, head_dim, dtype=keys.dtype)
    key_max = torch.empty(num_groups, num_pages, head_dim, dtype=keys.dtype)
    for g in range(num_groups):
        for p in range(num_pages):
            low, high = keys[g, p * page_size].clone(), keys[g, p * page_size].clone()
            for t in range(p * page_size, min((p + 1) * page_size, n)):
                low = torch.minimum(low, keys[g, t])
                high = torch.maximum(high, keys[g, t])
            key_min[g, p], key_max[g, p] = low, high
    return key_min, key_max


def log_sum_exp(values):
    top = max(values)
    return top + math.log(math.fsum(math.exp(value - top) for value in values))


def of_head(sinks, h):
    """The learned sink of a head, [H] for all, if there are any."""
    return [] if sinks is None else [float(sinks[h])]


def decode_page_scores(
    query, key_min, key_max, num_tokens, page_size, top_r, scale=None, sinks=None
):
    """Per group, the logarithm of each page's group score (that of any one of its tokens).

    SparQ's temperature sharpens what a few channels estimate; with a model's own ``scale`` the
    factor is that scale where SparQ has 1 / sqrt(D).

    A head whose chosen channels are all zero has temperature 0 / 0; it votes evenly here.
    """
    num_heads, head_dim = query.shape
    num_groups = key_min.shape[0]
    heads_per_group = num_heads // num_groups
    num_pages = math.ceil(num_tokens / page_size)
    q = query.double().tolist()
    low, high = key_min.double().tolist(), key_max.double().tolist()

    result = []
    for g in range(num_groups):
        heads = range(g * heads_per_group, (g + 1) * heads_per_group)
        magnitude = [math.fsum(abs(q[h][j]) for h in heads) for j in range(head_dim)]
        channels = sorted(range(head_dim), key=lambda j: (-magnitude[j], j))[:top_r]
        takes_max = [math.fsum(q[h][j] for h in heads) > 0 for j in range(head_dim)]

        log_probability = []  # [heads of the group][page]
        for h in heads:
            part = math.fsum(abs(q[h][j]) for j in channels)
            whole = math.fsum(abs(q[h][j]) for j in range(head_dim))
            own = 1.0 / math.sqrt(head_dim) if scale is None else scale
            factor = own / math.sqrt(part / whole) if part > 0 else 1.0
            page_logit = []
            for p in range(num_pages):
                score = 0.0
                for j in channels:
                    score += q[h][j] * (high[g][p][j] if takes_max[j] else low[g][p][j])
                page_logit.append(score * factor)
            token_logit = [page_logit[t // page_size] for t in range(num_tokens)]
            normaliser = log_sum_exp(token_logit + of_head(sinks, h))
            log_probability.append([logit - normaliser for logit in page_logit])

        result.append(
            [log_sum_exp([each[p] for each in log_probability]) for p in range(num_pages)]
        )
    return result


def select_decode_tokens(
    query, key_min, key_max, num_tokens, page_size, top_r, top_k, force_newest=True, scale=None,
    sinks=None,
):  # fmt: skip
    """Stage 2: per group the sorted indices of the min(top_k, num_tokens) tokens to attend to.

    ``force_newest`` (a deviation from the paper): the page of the newest token is taken first.
    """
    newest_page = (num_tokens - 1) // page_size
    selection = []
    for score in decode_page_scores(
        query, key_min, key_max, num_tokens, page_size, top_r, scale, sinks
    ):
        ranked = sorted(range(len(score)), key=lambda p: (-score[p], p))
        if force_newest:
            ranked.remove(newest_page)
            ranked.insert(0, newest_page)
        taken = []
        for p in ranked:
            for t in range(p * page_size, min((p + 1) * page_size, num_tokens)):
                if len(taken) < top_k:
                    taken.append(t)
        selection.append(sorted(taken))
    return selection


def attend(query, keys, values, token_index, scale=None, sinks=None):
    """Exact softmax attention of each head over its group's ``token_index[g]``; float64 inside."""
    num_heads, head_dim = query.shape
    heads_per_group = num_heads // keys.shape[0]
    scale = 1.0 / math.sqrt(head_dim) if scale is None else scale
    output = torch.zeros(num_heads, values.shape[-1], dtype=torch.float64)
    for h in range(num_heads):
        g = h // heads_per_group
        tokens = [int(t) for t in token_index[g]]
        logits = [float(query[h].double() @ keys[g, t].double()) * scale for t in tokens]
        normaliser = log_sum_exp(logits + of_head(sinks, h))
        for t, logit in zip(tokens, logits, strict=True):
            output[h] += math.exp(logit - normaliser) * values[g, t].double()
    return output.to(query.dtype)
