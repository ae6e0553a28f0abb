# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Steps that ``vllm-sparse plan`` estimates."""

from __future__ import annotations

import json

import pytest
from support.planner import plan

from vllm_sparse.cli import main


def test_a_measured_bandwidth_scales_the_steps(config, capsys):
    _, estimated = plan(capsys, config(), "--device", "cpu")
    _, measured = plan(capsys, config(), "--device", "cpu", "--bandwidth", "40")
    for name, arm in measured.items():
        assert arm["step_ms"] == pytest.approx(estimated[name]["step_ms"] / 2)
        assert arm["wins_from"] == estimated[name]["wins_from"]
    assert main(["plan", config(), "--bandwidth", "0"]) == 1


def test_a_cpu_pays_for_sparda_s_copies(config, capsys):
    """Each fetched block is read and written once more than a resident one."""
    settings = {"top_k": 65, "local_blocks": 32, "dense_len": 0, "host_gib": 60}
    options = ("--backend", "SPARDA", "--device", "cpu", "--concurrency", "1", "--settings")
    _, fetched = plan(capsys, config(), *options, json.dumps(settings))
    _, resident = plan(capsys, config(), *options, json.dumps({**settings, "resident": True}))
    free, block = 65 - 34, 64 * 128 * 1024
    extra = 1e3 * 2 * 0.25 * free * block / 20e9
    assert fetched["SPARDA"]["step_ms"] - resident["SPARDA"]["step_ms"] == pytest.approx(extra)
    assert fetched["SPARDA"]["wins_from"] is not None
    assert "bookkeeping" in fetched["SPARDA"]["left_out"]


def test_a_gpu_whose_blocks_all_have_frames_fetches_nothing(config, capsys):
    """Each length is asked by itself: a pool that the device does not hold fetches at any."""

    def sparda(**settings):
        options = ("--backend", "SPARDA", "--context", "16384", "--settings", json.dumps(settings))
        return plan(capsys, config(), *options)[1]["SPARDA"]

    default, resident, hosted = sparda(), sparda(resident=True), sparda(host_gib=200)
    assert default["host_bytes"] == resident["host_bytes"] == 0 < hosted["host_bytes"]
    assert default["step_ms"] == resident["step_ms"] < hosted["step_ms"]
    assert default["wins_from"] == resident["wins_from"] < 16384 < hosted["wins_from"]
    only_first = sparda(host_gib=200, resident_first_layer=True)
    launches = 8 * 32 * 2.4e-3
    moved = (only_first["step_ms"] - launches) / (hosted["step_ms"] - launches)
    assert moved == pytest.approx(31 / 32)


def test_a_length_whose_blocks_no_longer_all_have_frames_is_asked_as_such(config, capsys):
    """32 requests have the first shorter step where all blocks have frames, whatever is asked."""
    options = ("--backend", "SPARDA", "--concurrency", "32", "--context")
    short, long = (plan(capsys, config(), *options, n)[1]["SPARDA"] for n in ("4096", "40960"))
    assert short["host_bytes"] == 0 < long["host_bytes"]
    assert short["wins_from"] == long["wins_from"]


def test_the_text_says_where_nothing_is_fetched_or_saved(config, capsys):
    for context, said in (("16384", True), ("65536", False)):
        main(["plan", config(), "--context", context, "--host-memory", "400"])
        text = capsys.readouterr().out
        assert ("nothing is fetched and no device memory is saved" in text) == said
        assert ("host pool" in text) == (not said)


FP8 = {"quantization_config": {"quant_method": "fp8"}}
MIXTURE = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}
ONE = ("--context", "16", "--output", "1", "--concurrency")


def dense_ms(capsys, path, *options):
    """A step's time, launches apart: a bandwidth so low that they do not show."""
    options = ("--device", "cpu", "--bandwidth", "1", *options)
    return plan(capsys, path, *options, "--backend", "ROCKETKV")[1]["dense"]["step_ms"]


def test_weights_of_8_bits_are_half_as_many_bytes_to_read(config, capsys):
    """But for the head, which stays as it is; what a checkpoint packs unheard of counts least."""
    whole, packed = (dense_ms(capsys, config(**more), *ONE, "1") for more in ({}, FP8))
    head, layers = 128256 * 4096, 32 * (2 * 4096 * 40 * 128 + 3 * 4096 * 14336)
    assert whole - packed == pytest.approx(1e3 * layers / 1e9, rel=1e-6)
    unknown = dense_ms(capsys, config(quantization_config={"quant_method": "quark"}), *ONE, "1")
    assert unknown == pytest.approx(1e3 * (layers / 2 + 2 * head) / 1e9, rel=1e-2)


def test_a_quantised_model_leaves_room_for_its_blocks(config, capsys):
    """70 billion numbers: 131 GiB in 16 bits, half of it in 8, which an H200 has room for."""
    shape = {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
        "num_attention_heads": 64,
    }  # fmt: skip
    options = ("--device", "h200", "--concurrency", "1")
    status, arms = plan(capsys, config(**shape), *options)
    assert (status, arms["dense"]["fits"]) == (4, 0)
    status, arms = plan(capsys, config(**shape, **FP8), *options)
    assert status == 0
    assert min(arm["fits"] for arm in arms.values()) > 0


def test_requests_choose_experts_of_their_own(config, capsys):
    """One reads 8 of 128; 64 read nearly all, and never more."""
    one, some, all_of_them = (
        dense_ms(capsys, config(**MIXTURE), *ONE, rows) for rows in ("1", "64", "4096")
    )
    expert = 1e3 * 32 * 3 * 4096 * 768 * 2 / 1e9
    keys = 1e3 * 16 * 131072 / 1e9
    assert some - one == pytest.approx((128 * (1 - (15 / 16) ** 64) - 8) * expert, rel=0.02)
    assert all_of_them - 4096 * keys - one < 120 * expert * 1.05
    wide = config(**MIXTURE, shared_expert_intermediate_size=1536)
    assert dense_ms(capsys, wide, *ONE, "64") - some == pytest.approx(2 * expert)


def test_ranks_beyond_the_kv_heads_read_copies_of_them(config, capsys):
    """What a rank holds is what it reads, and its weights are an eighth."""
    few = config(num_key_value_heads=2)
    options = ("--tensor-parallel-size", "8", "--concurrency", "16", "--context", "65536")
    options += ("--device", "h100", "--bandwidth", "1000", "--backend", "ROCKETKV", "--output", "1")
    dense = plan(capsys, few, *options)[1]["dense"]
    read = 65536 / 65552 * dense["request_bytes"] * 16  # blocks are not full
    weights = 15.1e9 / 8
    assert 1e3 * read / 1e12 < dense["step_ms"] < 1e3 * (read + 1.2 * weights) / 1e12
