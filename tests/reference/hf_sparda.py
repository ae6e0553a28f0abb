# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Greedy generation with SparDA semantics by a Hugging Face model under an explicit mask.

The model's own attention does all the arithmetic: nothing is ever removed from its cache, the mask
just hides, per layer, KV head and query token, what is not selected. Independent of the library
under test.

A token at position ``i`` of a request with a prompt of ``P`` tokens is sparse iff
``i + 1 > dense_len`` and (``i >= P`` or ``sparse_prefill``). If ``sparse_prefill`` is a number, a
prompt's token reads so many blocks instead of ``top_k``; ``prompt_selector``, if there is one,
chooses them. Windows are counted where they are complete at the token that scores them. Selectors,
for layer ``l`` with input ``x_l`` (after its input_layernorm):

- ``forecast``: ``RoPE_i(W_future[l - 1] x_{l - 1})``, layer 0 ``RoPE_i(W_curr x_0)``; raw dot
  product with the compressed keys of layer ``l``.
- ``lookahead-query``: the same with layer ``l``'s own query projection (and bias), averaged over
  the query heads of each KV head; layer 0 projects ``x_0``. Of a query norm only the
  weight counts: its scale by token and head is positive and changes no ranking within a head.
- ``query``: the layer's queries, a softmax per head (InfLLM-v2).
- ``previous``: the same with the queries of token ``i - 1`` and the windows complete there; forced
  blocks are those of token ``i``.

MiniCPM checkpoints (:mod:`reference.random_models`) run here as Granite, which has the same
scalings.
"""

import json
import math
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch.nn import functional
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    DynamicCache,
    GraniteForCausalLM,
)

from .random_models import granite_config

ATTENTION_NAME = "sparda_reference"
SELECTORS = ("forecast", "lookahead-query", "query", "previous")


class Settings(NamedTuple):
    selector: str = "lookahead-query"
    block_size: int = 64
    kernel_stride: int = 16  # a window is twice as long
    init_blocks: int = 1
    local_blocks: int = 32
    top_k: int = 96  # the total, with the forced blocks
    dense_len: int = 8192
    sparse_prefill: bool | int = False
    prompt_selector: str | None = None


class Generation(NamedTuple):
    """What a run produced, and how close it came to producing something else."""

    tokens: list[int]
    logits: torch.Tensor  # [num_tokens, vocab]
    margins: list[float]  # per step: the best logit minus the second best
    gaps: list[float]  # per step: smallest relative gap at the top-k cut, see `cut_gap`
    # [step][layer]: [G, T, top_k] ascending, padded with -1; a dense token has -1 only. T is the
    # prompt's length in step 0, one later.
    blocks: list[list[torch.Tensor]]

    @property
    def min_margin(self) -> float:
        return min(self.margins, default=math.inf)

    @property
    def min_gap(self) -> float:
        return min(self.gaps, default=math.inf)

    def reliable_steps(self, margin: float, gap: float) -> int:
        """Leading steps whose tokens another implementation must agree on.

        A near tie of the selection, or of two tokens, may change everything after it.
        """
        for step, pair in enumerate(zip(self.margins, self.gaps, strict=True)):
            if pair[0] < margin or pair[1] < gap:
                return step
        return len(self.tokens)


# ---- selection -----------------------------------------------------------------------------------


def compressed_keys(keys, stride):
    """Mean of every complete window of keys [G, n, D]: [G, C, D]."""
    count = max(0, keys.shape[1] // stride - 1)
    halves = keys[:, : (count + 1) * stride].float().unflatten(1, (-1, stride)).mean(2)
    return (halves[:, :-1] + halves[:, 1:]) / 2 if count else halves[:, :0]


def window_probabilities(query, compressed, positions, stride, scale=None):
    """The query selector's window scores of queries [H, T, D]: [G, T, C].

    ``scale`` of logits, if not ``1 / sqrt(D)``.
    """
    num_groups, num_windows, head_dim = compressed.shape
    logits = torch.einsum("ghtd,gcd->ghtc", query.unflatten(0, (num_groups, -1)), compressed)
    ends = torch.arange(num_windows) * stride + 2 * stride - 1
    visible = ends <= positions[:, None]  # [T, C]
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    weights = torch.where(visible, logits * scale, -math.inf)
    weights = torch.exp(weights - weights.amax(-1, keepdim=True).clamp(min=-1e30))
    total = weights.sum(-1, keepdim=True)
    return (weights / torch.where(total > 0, total, 1)).sum(1)


def select(scores, positions, settings, top_k=None):
    """Window scores [G, T, C] to chosen blocks (bool [G, T, M]) and block scores [G, T, M].

    ``top_k`` [T, 1], if not that of the settings.
    """
    top_k = torch.tensor(settings.top_k) if top_k is None else top_k
    own = positions[:, None] // settings.block_size
    num_blocks = int(own.max()) + 1
    per_block = settings.block_size // settings.kernel_stride
    num_windows = scores.shape[-1]
    pooled = torch.full((*scores.shape[:2], num_blocks), -math.inf)
    for m in range(num_blocks):
        first, end = max(0, m * per_block - 1), min(num_windows, (m + 1) * per_block)
        if first < end:
            pooled[..., m] = scores[..., first:end].amax(-1)
    block = torch.arange(num_blocks)
    future = block > own  # [T, M]
    forced = ((block < settings.init_blocks) | (block >= own - settings.local_blocks)) & ~future
    rank = pooled.masked_fill(forced, math.inf).masked_fill(future, -math.inf)
    # Stable: of equal scores the lower block; future blocks come after all visible ones.
    order = rank.sort(dim=-1, descending=True, stable=True).indices
    count = torch.minimum(own + 1, top_k)
    taken = (torch.arange(num_blocks) < count).expand_as(order)
    chosen = torch.zeros(order.shape, dtype=torch.bool).scatter(-1, order, taken)
    return chosen, pooled.masked_fill(forced | future, math.nan)


def cut_gap(candidates, num_free, logarithmic):
    """Distance of the cut to another choice, for the scores of a row's blocks that are not forced.

    The last taken score minus the first one left out: relative to the former for probabilities
    (``logarithmic``), whose error is relative, else to the largest magnitude of the row. Adjacent
    blocks share a window, so equal scores are one value: then the distance to the nearest other.
    """
    ranked = sorted(candidates, reverse=True)
    if not 0 < num_free < len(ranked):
        return math.inf
    last, first_out = ranked[num_free - 1], ranked[num_free]
    others = [first_out] if last > first_out else [x for x in ranked if x != last]
    scale = max(abs(x) for x in ranked)
    gaps = []
    for x in others:
        unit = max(last, x) if logarithmic else scale
        gaps.append(abs(last - x) / unit if unit > 0 else 0.0)
    return min(gaps, default=math.inf)


def block_lists(chosen, sparse, top_k):
    """Bool [G, T, M] to ascending block numbers [G, T, top_k]; -1 for dense tokens and padding."""
    lists = torch.full((*chosen.shape[:2], top_k), -1)
    for g, t in torch.cartesian_prod(torch.arange(chosen.shape[0]), sparse.nonzero().flatten()):
        found = chosen[g, t].nonzero().flatten()
        lists[g, t, : len(found)] = found
    return lists


# ---- the attention function ----------------------------------------------------------------------


class _Run:
    """What the attention function needs to know of the generation in progress."""

    def __init__(self, settings, prompt_len, projections, stored=None):
        self.settings = settings
        self.stored = stored
        self.prompt_len = prompt_len
        self.projections = projections  # per layer: weight [G * D, hidden] and bias or None
        self.position = 0  # of the first token of the current forward
        self.inputs = {}  # layer -> input of its attention in the current forward [T, hidden]
        self.rope = None  # cos and sin of the current forward
        self.last_query = {}  # layer -> query of the token before the current forward [H, 1, D]
        self.gap = math.inf
        self.blocks = {}

    @property
    def selector(self):
        """Of the current forward, which has tokens of the prompt or generated ones."""
        in_prompt = self.position < self.prompt_len
        return (in_prompt and self.settings.prompt_selector) or self.settings.selector

    def scores(self, module, query, compressed, positions):
        """Window scores [G, T, C] of this layer's tokens."""
        layer, s = module.layer_idx, self.settings
        how = s.kernel_stride, module.scaling
        if self.selector == "query":
            return window_probabilities(query, compressed, positions, *how)
        if self.selector == "previous":
            before = self.last_query.get(layer, torch.zeros_like(query[:, :1]))
            before = torch.cat([before, query[:, :-1]], dim=1)
            return window_probabilities(before, compressed, positions - 1, *how)
        weight, bias = self.projections[layer]
        x = self.inputs[max(layer - 1, 0)]
        f = functional.linear(x, weight, bias).unflatten(-1, (-1, module.head_dim))
        f = f.transpose(0, 1)[None]  # [1, G, T, D]
        rotate = sys.modules[type(module).__module__].apply_rotary_pos_emb
        f = rotate(f, f, *self.rope)[0][0]
        scores = torch.einsum("gtd,gcd->gtc", f, compressed)
        ends = torch.arange(compressed.shape[1]) * s.kernel_stride + 2 * s.kernel_stride - 1
        return scores.masked_fill(ends > positions[:, None], -math.inf)

    def keep(self, module, query, keys):
        """Which tokens each query may see: bool [1, H or 1, T, n]."""
        s, n, num_tokens = self.settings, keys.shape[1], query.shape[1]
        positions = torch.arange(n - num_tokens, n)
        assert positions[0] == self.position
        causal = torch.arange(n) <= positions[:, None]
        sparse = positions + 1 > s.dense_len
        if not s.sparse_prefill:
            sparse &= positions >= self.prompt_len
        num_groups = keys.shape[0]
        if not sparse.any():
            self.last_query[module.layer_idx] = query[:, -1:]
            self.blocks[module.layer_idx] = torch.full((num_groups, num_tokens, s.top_k), -1)
            return causal[None, None]
        compressed = compressed_keys(keys, s.kernel_stride)
        scores = self.scores(module, query, compressed, positions)
        self.last_query[module.layer_idx] = query[:, -1:]
        top_k = torch.full((num_tokens, 1), s.top_k)
        if s.sparse_prefill is not True and s.sparse_prefill:
            top_k[positions < self.prompt_len] = s.sparse_prefill
        chosen, pooled = select(scores, positions, s, top_k)
        self._note_gap(chosen[:, sparse], pooled[:, sparse])
        self.blocks[module.layer_idx] = block_lists(chosen, sparse, max(s.top_k, int(top_k.max())))
        seen = chosen.repeat_interleave(s.block_size, dim=-1)[..., :n] | ~sparse[:, None]
        seen = (seen & causal).repeat_interleave(query.shape[0] // num_groups, dim=0)
        return seen[None]

    def _note_gap(self, chosen, pooled):
        probabilities = self.selector in ("query", "previous")
        for taken, row in zip(chosen.flatten(0, 1), pooled.flatten(0, 1), strict=True):
            free = ~row.isnan()
            gap = cut_gap(row[free].tolist(), int((taken & free).sum()), probabilities)
            self.gap = min(self.gap, gap)


def _attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    run = kwargs.pop("sparda_run")
    assert query.shape[0] == 1, "one request at a time"
    if run.stored is not None:
        key, value = run.stored(key, value)
    keep = run.keep(module, query[0], key[0])
    mask = torch.zeros(keep.shape, dtype=query.dtype).masked_fill(~keep, -math.inf)
    own_attention = sys.modules[type(module).__module__].eager_attention_forward
    return own_attention(module, query, key, value, mask, scaling=scaling, dropout=dropout)


AttentionInterface.register(ATTENTION_NAME, _attention)


@contextmanager
def _instrumented(model, run):
    """Run ``model`` with our attention and note what its layers see."""

    def note_input(layer):
        def hook(module, args, output):
            run.inputs[layer] = output[0]

        return hook

    def note_rope(module, args, output):
        run.rope = output

    handles = [model.model.rotary_emb.register_forward_hook(note_rope)]
    for number, layer in enumerate(model.model.layers):
        handles.append(layer.input_layernorm.register_forward_hook(note_input(number)))
    before = model.config._attn_implementation
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny operations: on a busy machine, waiting costs more than working
    model.set_attn_implementation(ATTENTION_NAME)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        model.set_attn_implementation(before)
        for handle in handles:
            handle.remove()


# ---- generation ----------------------------------------------------------------------------------


def load_model(path):
    """The float32 Hugging Face model of a checkpoint folder; MiniCPM becomes Granite."""
    config = json.loads((Path(path) / "config.json").read_text())
    if config["architectures"] != ["MiniCPMForCausalLM"]:
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    model = GraniteForCausalLM(granite_config(config))
    model.load_state_dict(load_file(Path(path) / "model.safetensors"))
    return model.to(torch.float32).eval()


def load_forecast(path):
    """(weight, bias or None) of each layer's Forecast and of layer 0's own, from safetensors."""
    tensors = load_file(path)

    def pair(name):
        bias = tensors.get(f"{name}.bias")
        return tensors[f"{name}.weight"].float(), None if bias is None else bias.float()

    future = []
    while (name := f"model.layers.{len(future)}.self_attn.q_future_proj") + ".weight" in tensors:
        future.append(pair(name))
    return future, pair("model.layers.0.self_attn.q_curr_proj")


def _projections(model, settings, forecast):
    """Per layer, what maps the input of the layer before (layer 0: its own) to the Forecast."""
    if settings.selector == "forecast":
        if forecast is None:
            raise ValueError("selector forecast needs a forecast file")
        future, current = forecast if isinstance(forecast, tuple) else load_forecast(forecast)
        assert len(future) == len(model.model.layers)
        return [current, *future[:-1]]
    num_groups = model.config.num_key_value_heads
    projections = []
    for layer in model.model.layers:
        attention = layer.self_attn
        grouped = (num_groups, -1, attention.head_dim)
        weight = attention.q_proj.weight.unflatten(0, grouped).mean(1).flatten(0, 1)
        bias = attention.q_proj.bias
        if bias is not None:
            bias = bias.unflatten(0, grouped).mean(1).flatten(0, 1)
        if hasattr(attention, "q_norm"):
            weight = weight * attention.q_norm.weight.repeat(num_groups)[:, None]
        projections.append((weight, bias))
    return projections


def _start(model, prompt_len, forecast, settings, stored=None):
    settings = Settings(**settings)
    if settings.selector not in SELECTORS:
        raise ValueError(f"unknown selector {settings.selector!r}")
    if settings.block_size % (2 * settings.kernel_stride):
        raise ValueError("block_size must be a multiple of the window")
    if settings.top_k < settings.init_blocks + settings.local_blocks + 1:
        raise ValueError(f"top_k={settings.top_k} does not hold the forced blocks")
    if not hasattr(model, "config"):
        model = load_model(model)
    return model, _Run(settings, prompt_len, _projections(model, settings, forecast), stored)


def _forward(model, run, cache, ids):
    """Logits [len(ids), vocab], gap and per-layer blocks of the next tokens."""
    run.gap, run.blocks, run.inputs = math.inf, {}, {}
    out = model(
        input_ids=torch.tensor([ids]),
        position_ids=torch.arange(run.position, run.position + len(ids))[None],
        past_key_values=cache,
        use_cache=True,
        sparda_run=run,
    )
    run.position += len(ids)
    blocks = [run.blocks[layer] for layer in sorted(run.blocks)]
    return out.logits[0].float(), run.gap, blocks


@torch.inference_mode()
def generate(
    model, prompt, num_tokens, *, forecast=None, continuation=None, stored=None, **settings
):
    """Greedy :class:`Generation` of ``num_tokens`` tokens.

    Args:
        model: Checkpoint folder, or a model that :func:`load_model` returned.
        prompt: Token ids.
        num_tokens: Tokens to generate.
        forecast: safetensors file of Forecast weights, for selector ``forecast``.
        continuation: Tokens to feed instead of the greedy ones (at least ``num_tokens - 1``), to
            follow another implementation past a near tie. ``tokens`` stays what would be greedy.
        stored: Maps keys and values to those that a cache would hold.
        **settings: Fields of :class:`Settings`.
    """
    model, run = _start(model, len(prompt), forecast, settings, stored)
    cache = DynamicCache(config=model.config)
    tokens, logits, gaps, blocks = [], [], [], []
    with _instrumented(model, run):
        ids = list(prompt)
        for step in range(num_tokens):
            rows, gap, of_layers = _forward(model, run, cache, ids)
            logits.append(rows[-1])
            gaps.append(gap)
            blocks.append(of_layers)
            tokens.append(int(rows[-1].argmax()))
            if step + 1 < num_tokens:
                ids = [(tokens if continuation is None else continuation)[step]]
    best = [row.topk(2).values.tolist() for row in logits]
    margins = [first - second for first, second in best]
    stacked = torch.stack(logits) if logits else torch.empty(0, model.config.vocab_size)
    return Generation(tokens, stacked, margins, gaps, blocks)


@torch.inference_mode()
def evaluate(model, tokens, prompt_len, *, forecast=None, **settings):
    """All of ``tokens`` in one forward: logits [n, vocab], gap, blocks [layer] of [G, n, top_k].

    The first ``prompt_len`` tokens count as the prompt, so a row must equal the decode step of
    :func:`generate` for the same token.
    """
    model, run = _start(model, prompt_len, forecast, settings)
    assert run.settings.prompt_selector is None, "one forward has one selector"
    with _instrumented(model, run):
        return _forward(model, run, DynamicCache(config=model.config), list(tokens))
