# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""How well each selector of SPARDA finds a real model's attention, layer by layer, outside vLLM.

The model runs in transformers and attends densely. In every decode step and layer each selector
chooses blocks of 64 tokens, as many in total as ``--top`` says, of which the first one, the current
one and the two before it are forced. Reported per layer:

* attention mass beyond the forced blocks: the share of it that the other chosen blocks hold. Mass
  is summed over the query heads of a KV head, and over KV heads and steps before it is divided;
* miss rate: share of the free picks that the step before had not chosen.

``exact`` chooses by the mass itself. What a perfect choice answers is measured by
`benchmarks.oracle` with ``--blocks``.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch
from torch.nn import functional
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from benchmarks import corpus, harness, needles, oracle
from benchmarks.results import Recorder
from vllm_sparse.forecast.weights import load_forecast, lookahead_weights
from vllm_sparse.policies import sparda

KERNEL = 2 * oracle.STRIDE
FORECAST = "forecast"
TASKS = ("multikey", "prose")
QUICK = {"contexts": [1024], "questions": 2, "passages": 1, "tokens": 8, "top": [6, 8]}


class Probe:
    """Attention function for transformers that measures while it attends densely.

    Attributes:
        tops: How many blocks to choose.
        mass: Per layer: mass of all blocks and of those that are not forced, float64 [2].
        captured: Per selector, top and layer: mass of the free picks.
        picks: Per selector, top and layer: free picks, and those that the step before had not
            chosen, where there was one, [2].
        rows: Decode steps measured.
    """

    def __init__(self, tops: list[int]) -> None:
        """Needs `attach` before it is used."""
        self.tops = tops
        self._projections: dict[str, list] = {}
        self._inputs: dict[int, torch.Tensor] = {}
        self._rope = None
        self.reset()

    def reset(self) -> None:
        """Counts from zero."""
        self.mass = defaultdict(lambda: torch.zeros(2, dtype=torch.float64))
        self.captured = defaultdict(float)
        self.picks = defaultdict(lambda: torch.zeros(2, dtype=torch.int64))
        self.rows = 0
        self.begin()

    def begin(self) -> None:
        """Forgets the previous step, before a new sequence."""
        self._query: dict[int, torch.Tensor] = {}
        self._chosen: dict[tuple, torch.Tensor] = {}

    def attach(self, model, forecast: Path | None) -> None:
        """Watches the layers' inputs and prepares what projects them."""
        layers, config = model.model.layers, model.config
        if hasattr(layers[0].self_attn, "q_norm"):
            raise ValueError("models with a query norm are not supported here")
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        size = layers[0].self_attn.head_dim
        self._projections["lookahead-query"] = [
            lookahead_weights(proj.weight, proj.bias, heads, kv_heads, size)
            for proj in (layer.self_attn.q_proj for layer in layers)
        ]
        if forecast is not None:
            weights = load_forecast(forecast, len(layers), kv_heads, size, config.hidden_size)
            own = [weights.current, *weights.future]
            self._projections[FORECAST] = [(weight.to(model.dtype), None) for weight in own]
        for number, layer in enumerate(layers):
            layer.input_layernorm.register_forward_hook(self._note_input(number))
        model.model.rotary_emb.register_forward_hook(self._note_rope)

    @property
    def selectors(self) -> list[str]:
        """Their names."""
        return ["exact", "query", *self._projections, "previous"]

    def _note_input(self, layer: int):
        def hook(module, args, output) -> None:
            self._inputs[layer] = output[0, -1:]

        return hook

    def _note_rope(self, module, args, output) -> None:
        self._rope = output

    def __call__(self, module, query, key, value, attention_mask, scaling=None, **kwargs):
        """Attends densely, and measures decode steps; arguments are those of transformers."""
        if query.shape[2] == 1:
            self._measure(module, query[0], key[0], scaling)
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )

    def _measure(self, module, query, keys, scaling) -> None:
        """Measures one layer in one step; the first step of a sequence only begins a history.

        Args:
            module: The attention layer.
            query: [H, 1, D].
            keys: [G, n, D].
            scaling: Factor of the scores.
        """
        layer, kv_heads, position = module.layer_idx, keys.shape[0], keys.shape[1] - 1
        before = self._query.get(layer)
        self._query[layer] = query
        if before is None:
            return
        self.rows += layer == 0
        grouped = query.float().view(kv_heads, -1, query.shape[-1])
        logits = grouped @ keys.float().transpose(1, 2) * scaling
        mass = oracle.block_mass(logits.softmax(-1).sum(1))  # [G, blocks]
        num_blocks = mass.shape[1]
        block = torch.arange(num_blocks)
        forced = (block < oracle.INIT_BLOCKS) | (
            block >= position // oracle.BLOCK - oracle.LOCAL_BLOCKS
        )
        self.mass[layer] += torch.stack([mass.sum(), mass[:, ~forced].sum()]).double()
        scores = self._scores(module, query, before, keys, position, scaling)
        for name, top in itertools.product(self.selectors, self.tops):
            if name == "exact":
                blocks = oracle.heaviest_blocks(mass, position, top)
            else:
                blocks = oracle.choose_blocks(scores[name], position, top)
            chosen = oracle.as_mask(blocks, num_blocks)
            free = chosen & ~forced
            self.captured[name, top, layer] += mass[free].sum().item()
            last = self._chosen.get((name, top, layer))
            self._chosen[name, top, layer] = chosen
            if last is not None:
                last = functional.pad(last, (0, num_blocks - last.shape[1]))
                self.picks[name, top, layer] += torch.stack([free.sum(), (free & ~last).sum()])

    def _scores(self, module, query, before, keys, position, scaling) -> dict[str, torch.Tensor]:
        """Window scores of every selector but exact, [G, windows]."""
        compressed = sparda.compress_keys(keys, KERNEL, oracle.STRIDE)
        scores = {}
        for name, vectors, at in (("query", query, position), ("previous", before, position - 1)):
            scores[name] = sparda.query_scores(
                vectors, compressed, torch.tensor([at]), kernel_size=KERNEL,
                kernel_stride=oracle.STRIDE, scale=scaling,
            )[:, 0]  # fmt: skip
        source = self._inputs[max(module.layer_idx - 1, 0)]
        rotate = sys.modules[type(module).__module__].apply_rotary_pos_emb
        for name, projections in self._projections.items():
            vector = functional.linear(source, *projections[module.layer_idx])
            vector = vector.view(1, keys.shape[0], 1, keys.shape[2])  # [1, G, 1, D]
            vector = rotate(vector, vector, *self._rope)[0][0]
            scores[name] = sparda.forecast_scores(vector, compressed)[:, 0]
        return scores

    def result(self, num_layers: int) -> dict:
        """Returns the shares, per layer and on average over the layers."""
        layers = range(num_layers)
        selectors: dict[str, dict] = {}
        for name, top in itertools.product(self.selectors, self.tops):
            captured = [
                self.captured[name, top, layer] / self.mass[layer][1].item() for layer in layers
            ]
            picks = [self.picks[name, top, layer].tolist() for layer in layers]
            missed = [new / max(1, total) for total, new in picks]
            selectors.setdefault(name, {})[str(top)] = {
                "captured": sum(captured) / num_layers,
                "miss_rate": sum(missed) / num_layers,
                "captured_by_layer": [round(share, 4) for share in captured],
                "miss_rate_by_layer": [round(share, 4) for share in missed],
            }
        forced = [1 - (self.mass[layer][1] / self.mass[layer][0]).item() for layer in layers]
        return {
            "steps": self.rows,
            "forced_share": sum(forced) / num_layers,
            "forced_share_by_layer": [round(share, 4) for share in forced],
            "selectors": selectors,
        }


def measure(model: oracle.Model, tokenizer, task: str, context: int, options) -> dict:
    """Decodes all sequences of one task and context and returns what the probe measured.

    Args:
        model: With the probe as its attention.
        tokenizer: The model's tokenizer.
        task: ``prose`` (given continuations) or ``multikey`` (the model's answers to questions).
        context: Tokens of the prompts.
        options: From the command line.
    """
    probe = model.attention
    probe.reset()
    if task == "prose":
        # The first decode step has no step before it.
        length = context + options.tokens + 1
        for passage in corpus.prose_tokens(tokenizer, options.passages, length):
            model.prefill(passage[:context])
            probe.begin()
            model.force(passage[context:])
    else:
        limit = context - needles.ANSWER_TOKENS
        for question in needles.multikey(tokenizer, limit, options.questions, options.seed):
            model.prefill(question.prompt)
            probe.begin()
            model.generate(needles.ANSWER_TOKENS, {tokenizer.eos_token_id})
    return {
        "task": task,
        "context": context,
        **probe.result(model.network.config.num_hidden_layers),
    }


def main(arguments: list[str] | None = None) -> None:
    """Command line entry point."""
    parser = harness.parser("blocks", __doc__, "1024 tokens, 2 questions, 1 passage")
    harness.add_model(parser, "qwen")
    parser.add_argument("--contexts", nargs="+", type=int, default=[4096, 8192])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--top", nargs="+", type=int, default=[8, 16, 32], help="blocks in total")
    parser.add_argument("--forecast", type=Path, metavar="FILE", help="trained weights to compare")
    parser.add_argument("--questions", type=int, default=12)
    parser.add_argument("--passages", type=int, default=3, help="of prose")
    parser.add_argument("--tokens", type=int, default=64, help="steps per passage")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--threads", type=int, default=1, help="more are faster, but only on a quiet machine"
    )
    options = harness.parse(parser, arguments, QUICK)
    torch.set_num_threads(options.threads)
    body = {
        "model": options.model, "seed": options.seed,
        "forecast": options.forecast.name if options.forecast else None,
        "block_tokens": oracle.BLOCK, "init_blocks": oracle.INIT_BLOCKS,
        "local_blocks": oracle.LOCAL_BLOCKS, "cells": [],
    }  # fmt: skip
    with Recorder(options.out, "blocks", body) as record:
        tokenizer = harness.tokenizer_of(options.model)
        model = oracle.Model(harness.resolve_model(options.model), Probe(options.top))
        model.attention.attach(model.network, options.forecast)
        for task, context in itertools.product(options.tasks, options.contexts):
            started = time.perf_counter()
            body["cells"].append(measure(model, tokenizer, task, context, options))
            record.save()
            harness.progress(f"{task} {context}: {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
