# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Whole engines against each other: verdicts, variants, sizes."""

from __future__ import annotations

import contextlib

import pytest

from benchmarks.gpu import shapes, stages, tokens


def test_the_first_difference_of_each_request_is_found_with_its_gap():
    likely = [{1: -0.5, 2: -3.5}, {5: -1.0, 6: -1.01, 4: -1.02}, {7: -0.1, 8: -2.1}]
    baseline = [[tokens.step_of(max(row, key=row.get), row) for row in likely]] * 5
    outputs = [[1, 5, 7], [1, 6, 9], [1, 4, 7], [2, 5, 7], [1, 5, 3]]
    found = tokens.divergences(outputs, baseline)
    assert [(d.request, d.position) for d in found] == [(1, 1), (2, 1), (3, 0), (4, 2)]
    # What follows a near-tie is another text, and is not judged.
    assert [d.gap for d in found] == pytest.approx([0.01, 0.02, 3.0, tokens.UNLIKELY])


def test_variants_cover_what_is_asked_for():
    every = tokens.variants()
    assert {"whole-graphs", "whole-eager", "chunked", "prefix-cache", "preemption"} <= set(every)
    assert {"sparda-whole", "sparda-ahead", "sparda-blocking", "sparda-graphs"} <= set(every)
    for name, variant in every.items():
        assert variant.baseline or variant.differs_from or name == tokens.STOCK
        if variant.settings:
            assert variant.expect  # or it could pass without having done anything


@pytest.mark.parametrize("tiny", [False, True])
def test_the_slabs_of_sparda_are_as_small_as_start_up_allows(tiny):
    from vllm_sparse.config import load_settings
    from vllm_sparse.errors import ConfigError
    from vllm_sparse.kv.host.geometry import GIB, block_bytes, host_blocks, plan_frames

    longest = max(map(len, shapes.parity_prompts(0, tiny=tiny))) + (24 if tiny else 80)
    max_model_len = 1024 if tiny else 4096
    seen = []
    for name, variant in tokens.variants(tiny=tiny).items():
        if variant.backend != "SPARDA":
            continue
        settings = load_settings({"vllm_sparse": variant.settings}, "sparda")
        shape = {"num_layers": 3, "num_kv_heads": 2}
        block = block_bytes(**shape, block_size=settings.block_size, head_dim=64, itemsize=2)
        blocks = host_blocks(settings, block, max_model_len)
        each = -(-longest // settings.block_size)
        assert blocks > tokens.REQUESTS * each  # none is preempted
        sizes = {
            **shape,
            "num_pieces": blocks * 2,
            "piece_bytes": block // 6,
            "max_num_seqs": variant.arguments["max_num_seqs"],
            "max_model_len": max_model_len,
        }
        frames = plan_frames(settings, **sizes)
        seen.append(name)
        if settings.resident:
            continue
        assert frames == (tokens.REQUESTS * 2 * settings.blocks_read,) * 3
        assert frames[0] < sizes["num_pieces"]
        dense = name in ("sparda-whole", "sparda-compiled")
        assert settings.blocks_read >= each if dense else settings.top_k < each
        little = variant.settings | {"slab_gib": variant.settings["slab_gib"] - 1 / GIB}
        with pytest.raises(ConfigError, match="slab_gib"):
            plan_frames(load_settings({"vllm_sparse": little}, "sparda"), **sizes)
    assert len(seen) == 8


def test_graphs_are_compared_with_eager_steps():
    from benchmarks.gpu import llms

    every = tokens.variants()
    for name in (tokens.SPARDA, tokens.SPARDA_AHEAD):
        assert every[name].mode == llms.EAGER
        compared = [variant for variant in every.values() if variant.baseline == name]
        assert all(variant.mode == llms.GRAPHS for variant in compared)
        paged = [variant.settings for variant in compared if "slab_gib" in variant.settings]
        assert paged


def test_steps_without_the_graphs_that_were_asked_for_are_an_error():
    from benchmarks.gpu import llms

    for mode, found, fine in (
        (llms.GRAPHS, "FULL_DECODE_ONLY", True),
        (llms.GRAPHS, "NONE", False),
        (llms.GRAPHS, "PIECEWISE", False),
        (llms.EAGER, "NONE", True),
        (llms.COMPILED, "FULL_AND_PIECEWISE", True),
        (llms.COMPILED, "PIECEWISE", False),
    ):
        facts = {"graphs": f"CUDAGraphMode.{found}"}
        with contextlib.nullcontext() if fine else pytest.raises(stages.CheckFailedError):
            llms.check_graphs(facts, mode)
