# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What the pretended GPU refuses and replays, tried in a process that has one."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable


def serve(job: dict[str, Any]) -> None:
    """Try everything; writes what was found to ``job["result"]``."""
    from vllm_sparse.kernels.triton.topk import top_indices

    there = torch.ones(4, device="cuda")
    here, pinned = torch.ones(4), torch.ones(4).pin_memory()
    event = torch.cuda.Event()
    event.record()
    scores, count = torch.rand(1, 1, 16), torch.tensor([4], dtype=torch.int32)
    wrong: dict[str, Callable[[], object]] = {
        "mixed": lambda: there + here,
        "host index": lambda: here[there.long()],
        "kernel": lambda: top_indices(scores, count * 4, count, 4),
    }
    captured: dict[str, Callable[[], object]] = {
        "item": lambda: there.sum().item(),
        "branch": lambda: bool(there[0] > 0),
        "mask": lambda: there[there > 0],
        "lengths": lambda: there.repeat_interleave(there.long()),
        "pairs": lambda: torch.unique_consecutive(there),
        "download": there.cpu,
        "upload": lambda: here.to("cuda"),
        "constant": lambda: torch.tensor([1.0], device="cuda"),
        "event": event.query,
        "synchronize": torch.cuda.synchronize,
    }
    right: dict[str, Callable[[], object]] = {
        "pinned": lambda: pinned.to("cuda", non_blocking=True),
        "zeros": lambda: torch.zeros(3, device="cuda"),
        "host": lambda: bool(here[0] > 0),
        "flags": lambda: (there > 0).__setitem__(slice(2), there[:2] > 0),
        "known lengths": lambda: there.repeat_interleave(there.long(), output_size=4),
    }
    found = {
        "refused": _refused(wrong, contextlib.nullcontext),
        "not captured": _refused(captured, lambda: torch.cuda.graph(torch.cuda.CUDAGraph())),
        "not captured, wrongly": _refused(
            right, lambda: torch.cuda.graph(torch.cuda.CUDAGraph())
        ),
        "expected": [*wrong], "expected in captures": [*captured],
        "devices": [str(there.device), str(here.device), str((there * 2)[1:].device)],
        "replayed": _replayed(there),
    }  # fmt: skip
    Path(job["result"]).write_text(json.dumps(found))


def _refused(attempts: dict[str, Callable[[], object]], context: Callable[[], Any]) -> list[str]:
    refused = []
    for name, attempt in attempts.items():
        try:
            with context():
                attempt()
        except (RuntimeError, ValueError):
            refused.append(name)
    return refused


def _replayed(numbers: torch.Tensor) -> list[list[float]]:
    """What a graph gives before and after its input and a number of Python's have changed."""
    graph, factor = torch.cuda.CUDAGraph(), 2
    doubled = numbers * factor
    with torch.cuda.graph(graph):
        doubled = numbers * factor
        doubled[1:] += torch.arange(3, device=numbers.device)
    factor = 5  # too late: it was captured
    found = []
    for value in (1.0, 10.0):
        numbers.fill_(value)
        doubled.fill_(torch.nan)
        graph.replay()
        found.append(doubled.tolist())
    return found
