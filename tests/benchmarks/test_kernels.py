# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The C++ kernels' times: their floor, which others on the machine must not lower, and the file."""

from __future__ import annotations

import itertools
import json
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
    assert kernels.read_bandwidth(torch.zeros(64, 4, dtype=torch.bfloat16), passes=3) == 512


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, "floor 300 us a layer (3.00 MB at 10.0 GB/s): fused is 2.0x the floor"),
        ({"over_floor": 0.5}, "no floor: 3.00 MB at 10.0 GB/s were measured, which the kernel"),
    ],
)
def test_a_kernel_faster_than_memory_has_no_floor(change, said):
    assert said in tables.kernels({"threads": 1, "result": {**BODY, **change}})


# What a run at this size takes is its set-up.
SMALL = ["--context", "800", "--batch", "1", "--budget", "64", "--layers", "2"]
SMALL += ["--rounds", "1", "--threads", "1"]
DECODE = ["fused, small pages", "fused", "fused, fp8"]
EVERY = [*DECODE, "fused, every kept token", "fused, every kept token, fp8", "reference"]
OTHERS = ["attend slots", "attend all kept", "select blocks", "resolve", "copy pieces"]


def test_a_run_that_was_cut_short_is_in_the_file_and_goes_on(tmp_path, monkeypatch):
    """Ctrl-C after two measurements; the same command measures the others only."""
    file, asked, right = tmp_path / "kernels.json", [], kernels.in_turns
    monkeypatch.setenv("VLLM_SPARSE_COMMIT", "a")

    def cut(works, rounds):
        if len(asked) == len(DECODE):
            raise KeyboardInterrupt
        asked.extend(works)
        return right(works, rounds)

    monkeypatch.setattr(kernels, "in_turns", cut)
    with pytest.raises(KeyboardInterrupt):
        kernels.main([*SMALL, "--out", str(file)])
    first = json.loads(file.read_text())
    assert first["interrupted"] == "KeyboardInterrupt"
    assert list(first["result"]["variants"]) == asked == DECODE
    assert "floor" in tables.kernels(first)
    del first["result"]["over_floor"]  # as if it had been cut a moment before
    assert "no floor yet" in tables.kernels(first)

    for code, same in (("a", True), ("b", False), ("a-dirty", False)):
        monkeypatch.setenv("VLLM_SPARSE_COMMIT", code)
        assert kernels.is_unfinished(file) is same
    monkeypatch.setenv("VLLM_SPARSE_COMMIT", "a")
    with pytest.raises(SystemExit):  # another size is another file's
        kernels.main([*SMALL, "--layers", "3", "--out", str(file)])

    def noted(works, rounds):
        asked.extend(works)
        return right(works, rounds)

    monkeypatch.setattr(kernels, "in_turns", noted)
    kernels.main([*SMALL, "--out", str(file)])
    found = json.loads(file.read_text())
    assert asked == [*EVERY, *OTHERS, "attend frames"]
    assert "interrupted" not in found
    assert len(found["resumed"]) == 1
    times = found["result"]["variants"]
    assert {name: times[name] for name in DECODE} == first["result"]["variants"]
    assert all(times[name]["least_bytes"] > 0 for name in OTHERS)
    assert not kernels.is_unfinished(file)
