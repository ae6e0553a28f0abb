# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""How well a Forecast finds the blocks that answers attend to, beside selectors without training.

What `vllm-sparse eval-forecast` measures, on questions that no Forecast of ours was trained on (set
``needles`` of `benchmarks.training_text`), at the tokens of their answers.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from benchmarks.quality.schemes import FEW_FORCED
from benchmarks.results import Recorder
from benchmarks.training_text import answered
from vllm_sparse.training.backbone import Backbone
from vllm_sparse.training.evaluate import Evaluation
from vllm_sparse.training.files import import_forecast

ANSWER_TOKENS = 12
QUICK = {"contexts": [2048], "documents": 1}


def main(arguments: list[str] | None = None) -> None:
    """Command line entry point."""
    parser = harness.parser("recall", __doc__, "one document of 2048 tokens")
    harness.add_model(parser, "qwen")
    parser.add_argument("--forecast", type=Path, metavar="FILE", help="trained weights to compare")
    parser.add_argument("--contexts", nargs="+", type=int, default=[4096, 8192])
    parser.add_argument("--documents", type=int, default=4)
    parser.add_argument("--top", type=int, default=16, help="blocks in total")
    harness.add_threads(parser)
    options = harness.parse(parser, arguments, QUICK)
    torch.set_num_threads(options.threads)
    sizes = dataclasses.replace(FEW_FORCED, top_k=options.top)
    body: dict[str, Any] = {
        "model": options.model,
        "forecast": options.forecast.name if options.forecast else None,
        "documents": options.documents,
        "geometry": dataclasses.asdict(sizes),
        "cells": [],
    }
    with Recorder(options.out, "recall", body) as record:
        tokenizer = harness.tokenizer_of(options.model)
        backbone = Backbone.load(str(harness.resolve_model(options.model)))
        forecast = import_forecast(options.forecast, backbone)[0] if options.forecast else None
        for context in options.contexts:
            started = time.perf_counter()
            documents = map(torch.tensor, answered(tokenizer, context, options.documents))
            rows = {"queries": ANSWER_TOKENS, "tail_queries": ANSWER_TOKENS}
            report = Evaluation(backbone, sizes, forecast, **rows).run(documents)
            body["cells"].append({"context": context, **report.as_dict()})
            record.save()
            harness.progress(f"{context}: {time.perf_counter() - started:.0f} s\n{report.table()}")


if __name__ == "__main__":
    main()
