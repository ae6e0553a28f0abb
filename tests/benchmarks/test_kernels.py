# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The floor of the decode kernel's time: what others do to the machine must not lower it."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch

from benchmarks import kernels, tables

BODY = {
    "kept_tokens": 2432, "top_k": 256, "top_r": 54, "bytes_read": 3_000_000,
    "sequential_read_gb_per_s": 10.0, "floor_us": 300.0, "over_floor": 2.0,
    "variants": {"fused": {"us": 600.0, "us_p10": 590.0}},
}  # fmt: skip


def test_the_fastest_pass_counts(monkeypatch):
    """Passes of 3, 1 and 2 seconds."""
    clock = itertools.chain([0, 3], [10, 11], [20, 22])
    monkeypatch.setattr(kernels, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    assert kernels.read_bandwidth(torch.zeros(64, 4, dtype=torch.bfloat16), 3) == 512


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, "floor 300 us a layer (3.00 MB at 10.0 GB/s): fused is 2.0x the floor"),
        ({"over_floor": 0.5}, "no floor: 3.00 MB at 10.0 GB/s were measured, which the kernel"),
    ],
)
def test_a_kernel_faster_than_memory_has_no_floor(change, said):
    assert said in tables.kernels({"threads": 1, "result": {**BODY, **change}})
