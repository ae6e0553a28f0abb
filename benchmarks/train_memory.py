# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Peak memory and speed of Forecast training against the length of the sequence.

One optimiser step of one sequence on a random two-layer model (8 query and 2 KV heads of size 64),
every token a query, with SparDA's teacher; in chunks of query rows and all rows at once. Each point
runs in a process of its own. Points that would take more than ``--limit-gib`` are left out.
"""

from __future__ import annotations

import multiprocessing
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from benchmarks import harness
from benchmarks.results import FOLDER, Recorder

HEADS, KV_HEADS, HEAD_DIM, LAYERS = 8, 2, 64, 2
CHUNK, TEACHER = 256, "fine"
# Tensors of [heads, rows, tokens] in float32 that are alive together at the peak.
_COPIES = 4


def point(tokens: int, chunk: int) -> dict:
    """Trains one step in this process."""
    import torch
    from transformers import LlamaConfig, LlamaModel

    from vllm_sparse.training.backbone import Backbone
    from vllm_sparse.training.forecast import Forecast
    from vllm_sparse.training.samples import SampleSource
    from vllm_sparse.training.settings import TrainSettings
    from vllm_sparse.training.trainer import Trainer

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=HEADS * HEAD_DIM, intermediate_size=1024,
        num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS,
        max_position_embeddings=tokens,
    )  # fmt: skip
    backbone = Backbone(LlamaModel(config).bfloat16(), "random")
    settings = TrainSettings(
        seq_len=tokens, local_blocks=4, top_k=16, teacher=TEACHER, sparse_forward=False,
        batch_size=1, steps=1, chunk=chunk,
    )  # fmt: skip
    forecast = Forecast(LAYERS, HEADS * HEAD_DIM, KV_HEADS, HEAD_DIM)
    forecast.initialise("lookahead", backbone, 0)
    source = SampleSource(backbone, settings.geometry, TEACHER, chunk=chunk)
    data = torch.randint(0, 256, (1, tokens))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(settings, backbone, forecast, source, data, Path(folder))
        started = time.monotonic()
        (entry,) = trainer.train()
        seconds = time.monotonic() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "tokens": tokens, "chunk": chunk, "teacher": TEACHER, "peak_mib": round(peak / 1024),
        "peak_beyond_start_mib": round((peak - before) / 1024),
        "tokens_per_s": round(tokens / seconds, 1), "loss": entry.loss,
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Command line entry point."""
    parser = harness.parser("train_memory", __doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192, 16384, 32768])
    parser.add_argument("--limit-gib", type=float, default=8.0)
    parser.set_defaults(out=FOLDER / "train-memory.json")
    options = harness.parse(parser, arguments)
    body: dict = {"teacher": TEACHER, "cells": []}
    fresh = {"mp_context": multiprocessing.get_context("spawn"), "max_tasks_per_child": 1}
    with (
        Recorder(options.out, "train-memory", body) as record,
        ProcessPoolExecutor(1, **fresh) as pool,
    ):
        for tokens, chunk in ((n, size) for n in options.lengths for size in (CHUNK, n)):
            expected_gib = _COPIES * HEADS * chunk * tokens * 4 / 2**30
            cell = {"tokens": tokens, "chunk": chunk, "left_out_gib": expected_gib}
            if expected_gib <= options.limit_gib:
                cell = pool.submit(point, tokens, chunk).result()
            body["cells"].append(cell)
            record.save()
            harness.progress(str(cell))


if __name__ == "__main__":
    main()
