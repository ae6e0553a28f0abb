# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""How well each selector of SPARDA finds a real model's attention, layer by layer, outside vLLM.

The model runs in transformers and attends densely to texts whose last tokens stand for decode
steps: the continuation of prose, or the right answer to a question. For each of them and in every
layer each selector chooses blocks of 64 tokens, as many in total as ``--top`` says, of which the
first one, the current one and the two before it are forced. Reported per layer:

* attention mass beyond the forced blocks: the share of it that the other chosen blocks hold. Mass
  is summed over the query heads of a KV head, and over KV heads and steps before it is divided;
* miss rate: share of the free picks that the step before had not chosen.

``exact`` chooses by the mass itself. What a perfect choice answers is measured by the laboratory
of `benchmarks.quality.judge`, arm ``exactblocks-N``.
"""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks import corpus, harness, needles
from benchmarks.quality.schemes import FEW_FORCED
from benchmarks.results import Recorder
from vllm_sparse.policies.windows import compress_keys, forecast_scores, query_scores
from vllm_sparse.training.backbone import Backbone
from vllm_sparse.training.evaluate import forecasts_of
from vllm_sparse.training.files import import_forecast
from vllm_sparse.training.objective import LiveTeacher, best_free_blocks, pooled
from vllm_sparse.training.samples import visit_layers

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from vllm_sparse.training.backbone import LayerView
    from vllm_sparse.training.forecast import Forecast

TASKS = ("multikey", "prose")
QUICK = {"contexts": [1024], "questions": 2, "passages": 1, "tokens": 8, "top": [6, 8]}


class Probe:
    """Sums over the last tokens of sequences what selectors would have chosen.

    Attributes:
        selectors: Their names.
        mass: Per layer: mass of all blocks and of those that are not forced, float64 [2].
        captured: Per selector, top and layer: mass of the free picks.
        picks: Per selector, top and layer: free picks of steps that have one before them, and those
            that it had not chosen, [2].
        rows: Steps measured.
    """

    def __init__(self, backbone: Backbone, tops: list[int], forecasts: dict[str, Forecast]) -> None:
        self._backbone, self._tops, self._forecasts = backbone, tops, forecasts
        self.selectors = ["exact", "query", *forecasts, "previous"]
        self.mass: dict[int, Tensor] = defaultdict(lambda: torch.zeros(2, dtype=torch.float64))
        self.captured: dict[tuple, float] = defaultdict(float)
        self.picks: dict[tuple, Tensor] = defaultdict(lambda: torch.zeros(2, dtype=torch.int64))
        self.rows = 0

    @torch.no_grad()
    def add(self, tokens: list[int], steps: int) -> None:
        """Measures the last steps of a sequence."""
        rows = torch.arange(len(tokens) - steps, len(tokens))
        visit_layers(self._backbone, torch.tensor(tokens), lambda *seen: self._layer(*seen, rows))
        self.rows += steps

    def _layer(self, view: LayerView, inputs: Tensor, rows: Tensor) -> None:
        """Adds a layer; the look-ahead sees ``inputs``."""
        tokens, layer = view.query.shape[1], view.layer
        exact = LiveTeacher(
            "block-mass", view.query[:, rows], view.keys, rows, FEW_FORCED, view.scale
        )
        mass = exact.rows(0, len(rows))  # [G, T, blocks]
        free = FEW_FORCED.free(rows, mass.shape[-1])
        self.mass[layer] += torch.stack([mass.sum(), (mass * free).sum()]).double()
        scores = {"exact": mass}
        for name, windows in self._windows(view, inputs, rows).items():
            scores[name] = pooled(windows, tokens, FEW_FORCED)
        for name, top in itertools.product(self.selectors, self._tops):
            picked = best_free_blocks(scores[name], rows, replace(FEW_FORCED, top_k=top))
            self.captured[name, top, layer] += (mass * picked).sum().item()
            new = picked[:, 1:] & free[:-1] & ~picked[:, :-1]  # what was forced was there, too
            self.picks[name, top, layer] += torch.stack([picked[:, 1:].sum(), new.sum()])

    def _windows(self, view: LayerView, inputs: Tensor, rows: Tensor) -> dict[str, Tensor]:
        """Window scores of every selector but exact, [G, T, windows]."""
        sizes = {"kernel_size": FEW_FORCED.kernel_size, "kernel_stride": FEW_FORCED.kernel_stride}
        keys = compress_keys(view.keys, **sizes)
        scores = {}
        for name, at in (("query", rows), ("previous", rows - 1)):
            scores[name] = query_scores(view.query[:, at], keys, at, **sizes, scale=view.scale)
        for name, forecast in self._forecasts.items():
            vectors = forecast(view.layer, inputs[rows], view.cos[rows], view.sin[rows])
            scores[name] = forecast_scores(vectors, keys)
        return scores

    def result(self) -> dict[str, Any]:
        """Returns the shares, per layer and on average over the layers."""
        layers = range(self._backbone.num_layers)
        selectors: dict[str, dict] = {}
        for name, top in itertools.product(self.selectors, self._tops):
            picks = [self.picks[name, top, layer].tolist() for layer in layers]
            captured = [
                self.captured[name, top, layer] / self.mass[layer][1].item() for layer in layers
            ]
            selectors.setdefault(name, {})[str(top)] = {
                **_by_layer("captured", captured),
                **_by_layer("miss_rate", [new / max(1, total) for total, new in picks]),
            }
        forced = [1 - (self.mass[layer][1] / self.mass[layer][0]).item() for layer in layers]
        return {"steps": self.rows, **_by_layer("forced_share", forced), "selectors": selectors}


def _by_layer(name: str, shares: list[float]) -> dict[str, Any]:
    rounded = [round(share, 4) for share in shares]
    return {name: sum(shares) / len(shares), f"{name}_by_layer": rounded}


def sequences(tokenizer: Any, task: str, context: int, options: Any) -> Iterator[tuple]:
    """Yields prompts of `context` tokens with what follows them, and how many tokens that is."""
    if task == "prose":
        length = context + options.tokens
        for passage in corpus.prose_tokens(tokenizer, options.passages, length):
            yield passage, options.tokens
        return
    limit = context - needles.ANSWER_TOKENS
    for question in needles.multikey(tokenizer, limit, options.questions, options.seed):
        answer = tokenizer(f" {question.answer}.", add_special_tokens=False)["input_ids"]
        yield question.prompt + answer, len(answer)


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
    harness.add_threads(parser)
    options = harness.parse(parser, arguments, QUICK)
    torch.set_num_threads(options.threads)
    body = {
        "model": options.model, "seed": options.seed,
        "forecast": options.forecast.name if options.forecast else None,
        "block_tokens": FEW_FORCED.block_size, "init_blocks": FEW_FORCED.init_blocks,
        "local_blocks": FEW_FORCED.local_blocks, "cells": [],
    }  # fmt: skip
    with Recorder(options.out, "blocks", body) as record:
        tokenizer = harness.tokenizer_of(options.model)
        backbone = Backbone.load(str(harness.resolve_model(options.model)))
        trained = import_forecast(options.forecast, backbone)[0] if options.forecast else None
        forecasts = forecasts_of(backbone, trained)
        for task, context in itertools.product(options.tasks, options.contexts):
            started = time.perf_counter()
            probe = Probe(backbone, options.top, forecasts)
            for sequence in sequences(tokenizer, task, context, options):
                probe.add(*sequence)
            body["cells"].append({"task": task, "context": context, **probe.result()})
            record.save()
            harness.progress(f"{task} {context}: {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
