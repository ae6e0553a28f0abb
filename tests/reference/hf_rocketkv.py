# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Greedy generation with RocketKV semantics by a Hugging Face model under an explicit keep mask.

The model's own attention does all the arithmetic (queries and keys after RoPE, grouped heads,
scale, softmax): nothing is ever removed from its cache, the mask just hides, per layer and head,
what RocketKV would have evicted or not read. Independent of the library under test.
"""

import math
import sys
from typing import NamedTuple

import torch
from transformers import AttentionInterface, DynamicCache

from .hf_policies import Run
from .rocketkv_bruteforce import pick_prompt_tokens, prompt_scores

ATTENTION_NAME = "rocketkv_reference"


class Generation(NamedTuple):
    """What a run produced, and how close it came to producing something else."""

    tokens: list[int]
    logits: torch.Tensor  # [num_tokens, vocab]
    margins: list[float]  # per step: the best logit minus the second best
    prompt_gap: float  # stage 1, relative: smallest distance of the cut to another score
    page_gaps: list[float]  # stage 2, per decode step: smallest log-score gap at the cut
    channel_gaps: list[float]  # stage 2, per decode step: smallest relative gap, see the selection
    kept: list[torch.Tensor]  # per layer [G, kept prompt tokens], ascending


# ---- stage 2, fast -------------------------------------------------------------------------------


def select_decode_tokens_fast(
    query, keys, page_size, top_r, top_k, *, force_newest=True, dtype=torch.float32, scale=None,
    sinks=None,
):  # fmt: skip
    """Stage 2 on compacted keys [G, n, D] for one query [H, D].

    Returns a sorted LongTensor of min(top_k, n) slots per group and two distances to another
    choice: the smallest log-score gap between two pages whose exchange would change the choice, and
    the smallest relative gap of the channels (between the last chosen and the first other one, and
    of the sum that decides between minimum and maximum to zero).
    """
    num_groups, n, head_dim = keys.shape
    num_pages = -(-n // page_size)
    q = query.to(dtype).view(num_groups, -1, head_dim)  # [G, heads of the group, D]
    keys = keys.to(dtype)

    missing = num_pages * page_size - n
    paged_low = torch.nn.functional.pad(keys, (0, 0, 0, missing), value=math.inf)
    paged_high = torch.nn.functional.pad(keys, (0, 0, 0, missing), value=-math.inf)
    low = paged_low.view(num_groups, num_pages, page_size, head_dim).amin(2)
    high = paged_high.view(num_groups, num_pages, page_size, head_dim).amax(2)
    bound = torch.where((q.sum(1) > 0)[:, None, :], high, low)  # [G, pages, D]

    magnitude, order = torch.sort(q.abs().sum(1), dim=-1, descending=True, stable=True)
    chosen = torch.zeros(num_groups, 1, head_dim, dtype=dtype)
    chosen.scatter_(2, order[:, None, :top_r], 1.0)
    q_chosen = q * chosen
    part, whole = q_chosen.abs().sum(-1), q.abs().sum(-1)
    scale = head_dim**-0.5 if scale is None else scale
    factor = torch.where(part > 0, scale / (part / whole).sqrt(), torch.ones_like(part))

    logits = (q_chosen @ bound.transpose(1, 2)) * factor[..., None]  # [G, heads, pages]
    count = torch.full((num_pages,), page_size, dtype=dtype)
    count[-1] = page_size - missing
    entries = logits + count.log()
    if sinks is not None:  # learned ones, [H]
        entries = torch.cat((entries, sinks.to(dtype).view(num_groups, -1, 1)), -1)
    log_prob = logits - torch.logsumexp(entries, dim=-1, keepdim=True)
    score = torch.logsumexp(log_prob, dim=1)  # [G, pages]

    rank = score.clone()
    if force_newest:
        rank[:, -1] = math.inf
    pages = torch.sort(rank, dim=-1, descending=True, stable=True).indices

    balance = (q.sum(1).abs() / q.abs().sum(1)).gather(1, order[:, :top_r])
    channel_gap = float(balance.min())
    if top_r < head_dim:
        step = magnitude[:, top_r - 1] - magnitude[:, top_r]
        channel_gap = min(channel_gap, float((step / magnitude[:, top_r - 1]).min()))

    slots, gap = [], math.inf
    for g in range(num_groups):
        tokens = (pages[g][:, None] * page_size + torch.arange(page_size)).flatten()
        tokens = tokens[tokens < n][:top_k]
        slots.append(tokens.sort().values)
        if len(tokens) < n:
            ranked = rank[g][pages[g]].tolist()
            last = pages[g].tolist().index(int(tokens[-1]) // page_size)
            size = min((pages[g, last] + 1) * page_size, n) - pages[g, last] * page_size
            partial = int((tokens // page_size == pages[g, last]).sum()) < size
            if not partial and last + 1 < num_pages:
                gap = min(gap, ranked[last] - ranked[last + 1])
            if partial:
                for other in (last - 1, last + 1):
                    if 0 <= other < num_pages:
                        gap = min(gap, abs(ranked[last] - ranked[other]))
    return slots, gap, channel_gap


# ---- the attention function ----------------------------------------------------------------------


class _Run(Run):
    """What the attention function needs to know of the generation in progress."""

    def __init__(self, prompt_len, num_kept, settings):
        super().__init__(prompt_len)
        self.num_kept, self.settings = num_kept, settings

    def end_prompt_of_layer(self, layer, query, keys):
        n = keys.shape[1]
        if self.num_kept >= n:
            super().end_prompt_of_layer(layer, query, keys)
            return
        w = min(self.settings["window"], n)
        scores = prompt_scores(
            query[:, n - w :],
            keys,
            self.settings["kernel_size"],
            scale=self.scaling,
            sinks=self.learned_sinks,
        )
        self.kept[layer] = pick_prompt_tokens(scores, w, self.num_kept)
        for row in scores:
            self.prompt_gap = min(self.prompt_gap, _cut_gap(row, self.num_kept - w))

    def visible_tokens(self, layer, query, keys):
        """Per group the logical positions that this step's token attends to."""
        num_groups, n, _ = keys.shape
        generated = torch.arange(self.prompt_len, n)  # includes the current token
        compacted = [torch.cat([self.kept[layer][g], generated]) for g in range(num_groups)]
        s = self.settings
        if not (s["sparse"] and s["stage2"]) or layer < s["skip_layers"]:
            return compacted
        compacted_keys = torch.stack([keys[g, compacted[g]] for g in range(num_groups)])
        slots, gap, channel_gap = select_decode_tokens_fast(
            query,
            compacted_keys,
            s["page_size"],
            s["top_r"],
            s["top_k"],
            dtype=s["select_dtype"],
            scale=self.scaling,
            sinks=self.learned_sinks,
        )
        self.page_gap = min(self.page_gap, gap)
        self.channel_gap = min(self.channel_gap, channel_gap)
        return [compacted[g][slots[g]] for g in range(num_groups)]


def _cut_gap(row, num_best):
    """Relative distance between the scores around the cut; equal neighbours are one plateau."""
    ranked = row.sort(descending=True).values.tolist()
    if not 0 < num_best < len(ranked):
        return math.inf
    last, first_out = ranked[num_best - 1], ranked[num_best]
    if last > first_out:
        return (last - first_out) / last
    others = [value for value in ranked if value != last]
    return min((abs(value - last) / max(value, last) for value in others), default=math.inf)


def _attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    run = kwargs.pop("rocketkv_run")
    run.scaling, run.learned_sinks = scaling, getattr(module, "sinks", None)
    assert query.shape[0] == 1, "one request at a time"
    num_heads, num_queries = query.shape[1:3]
    num_groups, n = key.shape[1:3]
    if run.stored is not None:
        key, value = run.stored(key, value)
    heads_per_group = num_heads // num_groups
    window = getattr(module, "sliding_window", None)
    if run.in_prompt:
        assert num_queries == n == run.prompt_len
        keep = torch.ones(n, n, dtype=torch.bool).tril()[None, None]
        if window is not None:
            keep = keep.triu(1 - window)
        else:
            run.end_prompt_of_layer(module.layer_idx, query[0], key[0])
    elif window is not None:  # such layers lose nothing
        keep = (torch.arange(n) > n - 1 - window).expand(1, num_heads, 1, n)
    else:
        assert num_queries == 1
        keep = torch.zeros(1, num_heads, 1, n, dtype=torch.bool)
        visible = run.visible_tokens(module.layer_idx, query[0, :, 0], key[0])
        for h in range(num_heads):
            keep[0, h, 0, visible[h // heads_per_group]] = True
    mask = torch.zeros(keep.shape, dtype=query.dtype).masked_fill(~keep, -math.inf)
    own_attention = sys.modules[type(module).__module__].eager_attention_forward
    if run.in_prompt and run.asked is not None:
        query = run.asked(query)
    return own_attention(module, query, key, value, mask, scaling=scaling, dropout=dropout)


AttentionInterface.register(ATTENTION_NAME, _attention)


# ---- generation ----------------------------------------------------------------------------------


@torch.inference_mode()
def generate(
    model,
    prompt_ids: list[int],
    num_tokens: int,
    *,
    dropped_blocks: int = 0,
    block_size: int = 16,
    page_size: int = 1,
    top_r: int = 1,
    top_k: int = 1,
    window: int = 32,
    kernel_size: int = 63,
    stage1: bool = True,
    stage2: bool = True,
    skip_layers: int = 0,
    sparse: bool = True,
    select_dtype: torch.dtype = torch.float32,
    return_logits: bool = False,
    stored=None,
    asked=None,
    forced=None,
):
    """Greedy tokens (or a Generation with ``return_logits``) of ``model`` with RocketKV.

    The prompt runs densely and gives the first token; each layer and KV head then keeps
    ``len(prompt_ids) - dropped_blocks * block_size`` prompt tokens. ``sparse=False`` is plain dense
    generation. ``skip_layers``: the first layers read all that stage 1 kept.
    """
    prompt_len = len(prompt_ids)
    num_kept = prompt_len
    if sparse:
        if not stage1 and dropped_blocks:
            raise ValueError("without stage 1 nothing is dropped: dropped_blocks must be 0")
        num_kept = prompt_len - dropped_blocks * block_size
        if num_kept < min(window, prompt_len):
            raise ValueError(f"{num_kept} kept tokens do not hold the window of {window}")
    settings = {
        "page_size": page_size,
        "top_r": top_r,
        "top_k": top_k,
        "window": window,
        "kernel_size": kernel_size,
        "stage2": stage2,
        "skip_layers": skip_layers,
        "sparse": sparse,
        "select_dtype": select_dtype,
    }
    run = _Run(prompt_len, num_kept, settings)
    return run_greedily(model, prompt_ids, num_tokens, run, return_logits, stored, asked, forced)


@torch.inference_mode()
def run_greedily(
    model,
    prompt_ids: list[int],
    num_tokens: int,
    run,
    return_logits: bool = False,
    stored=None,
    asked=None,
    forced=None,
):
    """Greedy generation under a mask.

    ``run`` decides: ``end_prompt_of_layer(layer, query [H, n, D], keys [G, n, D])`` sees the
    prompt, ``visible_tokens(layer, query [H, D], keys [G, n, D])`` returns per group the positions
    that a decode step attends to. It has ``in_prompt``, ``prompt_len``, ``prompt_gap``,
    ``page_gap``, ``channel_gap`` and ``kept`` as :class:`_Run`, and is told ``scaling``, what the
    model multiplies logits with, and ``learned_sinks`` if it has any. Layers with sliding windows
    are left to the model. ``stored(key, value)`` returns what a rounding cache would give
    back of both; all attention reads that. ``asked(query)`` returns what dense attention over the
    prompt makes of its queries. ``forced`` tokens go in as if the model had said them.
    """
    run.stored, run.asked = stored, asked
    # A cache that knows of windows would forget what the mask hides.
    windows = "sliding_attention" in (getattr(model.config, "layer_types", None) or ())
    cache = DynamicCache() if windows else DynamicCache(config=model.config)
    tokens, logits, page_gaps, channel_gaps = [], [], [], []
    before = model.config._attn_implementation
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny operations: on a busy machine, waiting costs more than working
    model.set_attn_implementation(ATTENTION_NAME)
    try:
        step_ids, position = list(prompt_ids), 0
        for _ in range(num_tokens):
            run.page_gap = run.channel_gap = math.inf
            out = model(
                input_ids=torch.tensor([step_ids]),
                position_ids=torch.arange(position, position + len(step_ids))[None],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
                rocketkv_run=run,
            )
            if not run.in_prompt:
                page_gaps.append(run.page_gap)
                channel_gaps.append(run.channel_gap)
            run.in_prompt = False
            logits.append(out.logits[0, -1].float())
            tokens.append(int(logits[-1].argmax()))
            position += len(step_ids)
            step_ids = [tokens[-1] if forced is None else forced[len(tokens) - 1]]
    finally:
        torch.set_num_threads(threads)
        model.set_attn_implementation(before)
    if not return_logits:
        return tokens
    best = [row.topk(2).values.tolist() for row in logits]
    margins = [first - second for first, second in best]
    return Generation(
        tokens,
        torch.stack(logits) if logits else torch.empty(0, model.config.vocab_size),
        margins,
        run.prompt_gap,
        page_gaps,
        channel_gaps,
        [run.kept[layer] for layer in sorted(run.kept)],
    )
