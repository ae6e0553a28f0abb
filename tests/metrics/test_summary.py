# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The line of the log."""

from __future__ import annotations

from vllm_sparse.metrics.summary import line


def test_a_policys_line():
    before = {("requests", ""): 5.0, ("blocks_evicted", ""): 100.0}
    after = {
        ("requests", ""): 7.0,
        ("dense_fallbacks", "short_prompt"): 2.0,
        ("dense_fallbacks", "fits_budget"): 1.0,
        ("decode_rows", ""): 10.0,
        ("visible_tokens", ""): 1000.0,
        ("selected_tokens", ""): 125.0,
        ("blocks_evicted", ""): 140.0,
        ("blocks_saved", ""): 30.0,
    }
    assert line("ROCKETKV", before, after) == (
        "ROCKETKV: Sparse: 2 reqs, Dense: 3 reqs (fits_budget: 1, short_prompt: 2), decode read "
        "12.5% of the context's tokens, KV blocks freed: 40 (running requests save 30)"
    )


def test_spardas_line():
    after = {
        ("requests", ""): 1.0,
        ("decode_rows", ""): 10.0,
        ("visible_blocks", ""): 100.0,
        ("selected_blocks", ""): 36.0,
        ("frame_hits", ""): 90.0,
        ("frame_misses", ""): 10.0,
        ("prefetch_issued", ""): 8.0,
        ("prefetch_late", ""): 2.0,
        ("host_to_device_bytes", ""): 3 * 2.0**20,
        ("streamed_bytes", ""): 512.0,
        ("exposed_wait_seconds", ""): 0.0125,
    }
    assert line("SPARDA", {}, after) == (
        "SPARDA: Sparse: 1 reqs, Dense: 0 reqs, decode read 36.0% of the context's blocks, "
        "fetched: 10.0% of the blocks read, 3.0 MiB, 80.0% a layer ahead, 25.0% of these late, "
        "streamed for prompts: 512.0 B, layers waited 12.5 ms for copies"
    )


def test_silence_where_nothing_was_counted():
    values = {("requests", ""): 7.0, ("frame_hits", ""): 1.0}
    assert line("SPARDA", values, {**values, ("slab_frames_in_use", ""): 9.0}) is None


def test_steps_without_a_prompts_end_are_told_too():
    text = line("QUEST", {}, {("decode_rows", ""): 3.0, ("visible_tokens", ""): 0.0})
    assert (
        text == "QUEST: Sparse: 0 reqs, Dense: 0 reqs, decode read 100.0% of the context's tokens"
    )
