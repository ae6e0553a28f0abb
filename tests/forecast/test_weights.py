# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Forecast files as they are served: what is read and refused, and weights without training."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from support.forecast import DIM, HEADS, HIDDEN, LAYERS, MODEL, tensors

from vllm_sparse.errors import ConfigError
from vllm_sparse.forecast.file import canonical_name
from vllm_sparse.forecast.weights import (
    check_metadata,
    load_forecast,
    lookahead_weights,
    other_prompts,
    shard_heads,
)
from vllm_sparse.policies.sparda import SpardaSettings
from vllm_sparse.training.files import export_forecast
from vllm_sparse.training.forecast import Forecast
from vllm_sparse.training.geometry import BlockGeometry


@pytest.mark.parametrize("prefix", ["", "model.", "model.model.", "_orig_mod.module.model."])
def test_loads_any_prefix(tmp_path, prefix):
    weights = tensors(prefix)
    save_file(weights, tmp_path / "f.safetensors", {"block_size": "64", "unrelated": "x"})
    loaded = load_forecast(tmp_path / "f.safetensors", *MODEL)
    assert len(loaded.future) == LAYERS - 1
    for layer, weight in enumerate(loaded.future):
        name = f"{prefix}layers.{layer}.self_attn.q_future_proj.weight"
        assert torch.equal(weight, weights[name])
    assert torch.equal(loaded.current, weights[f"{prefix}layers.0.self_attn.q_curr_proj.weight"])
    assert loaded.metadata == {"block_size": "64"}


def test_loads_a_directory_and_needs_no_last_layer(tmp_path):
    weights = tensors()
    del weights[canonical_name(LAYERS - 1, "q_future_proj")]
    for number, (name, weight) in enumerate(weights.items()):
        save_file({name: weight}, tmp_path / f"part-{number}.safetensors")
    loaded = load_forecast(tmp_path, *MODEL)
    assert torch.equal(loaded.future[2], weights[canonical_name(2, "q_future_proj")])


def test_a_misshapen_last_layer_is_ignored(tmp_path):
    weights = tensors()
    weights[canonical_name(LAYERS - 1, "q_future_proj")] = torch.zeros(1, 1)
    save_file(weights, tmp_path / "f.safetensors")
    assert len(load_forecast(tmp_path, *MODEL).future) == LAYERS - 1


def test_every_problem_is_named(tmp_path):
    weights = tensors(layers=LAYERS + 1)
    del weights[canonical_name(1, "q_future_proj")]
    del weights[canonical_name(0, "q_curr_proj")]
    weights[canonical_name(2, "q_future_proj")] = torch.zeros(HEADS * DIM, HIDDEN + 1)
    weights[canonical_name(0, "q_future_proj")] = torch.zeros(HEADS * DIM, HIDDEN, dtype=torch.int8)
    save_file(weights, tmp_path / "f.safetensors")
    with pytest.raises(ConfigError) as failure:
        load_forecast(tmp_path / "f.safetensors", *MODEL)
    text = str(failure.value)
    assert "model.layers.1.self_attn.q_future_proj.weight is missing" in text
    assert "model.layers.0.self_attn.q_curr_proj.weight is missing (expected [16, 24])" in text
    assert "layers.2.self_attn.q_future_proj.weight: expected [16, 24], got [16, 25]" in text
    assert "layers.0.self_attn.q_future_proj.weight: expected [16, 24], got [16, 24], not" in text
    assert "layers.4.self_attn.q_future_proj.weight: the model has 4 layers" in text
    assert "selector lookahead-query" in text


def test_what_cannot_be_opened_says_so(tmp_path):
    with pytest.raises(ConfigError, match="there is no file"):
        load_forecast(tmp_path / "absent.safetensors", *MODEL)
    with pytest.raises(ConfigError, match="holds no"):
        load_forecast(tmp_path, *MODEL)
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    with pytest.raises(ConfigError, match="not a readable safetensors file"):
        load_forecast(tmp_path / "broken.safetensors", *MODEL)
    save_file({**tensors(), **tensors("module.")}, tmp_path / "twice.safetensors")
    with pytest.raises(ConfigError, match="two tensors are for the same layer"):
        load_forecast(tmp_path / "twice.safetensors", *MODEL)


def test_metadata_against_settings():
    settings = SpardaSettings(forecast="f")
    trained = {
        "base_model": "any",
        "block_size": "64",
        "kernel_size": "32",
        "kernel_stride": "16",
        "local_blocks": "32",
        "init_blocks": "1",
        "top_k": "96",
    }
    assert check_metadata(trained, settings) is None
    assert check_metadata({}, settings) is None
    warning = check_metadata({**trained, "top_k": "48", "local_blocks": "16"}, settings)
    assert "top_k 48 (here 96)" in warning
    assert "local_blocks 16 (here 32)" in warning
    for key in ("block_size", "kernel_stride", "kernel_size"):
        with pytest.raises(ConfigError, match=f"{key} 8 "):
            check_metadata({**trained, key: "8"}, settings)
    with pytest.raises(ConfigError, match="top_k should be a whole number"):
        check_metadata({"top_k": "many"}, settings)


def test_blocks_of_prompts_are_compared_where_the_forecast_chooses_them():
    trained = {"top_k": "96"}
    prompts = {"forecast": "f", "sparse_prefill": 40}
    warning = check_metadata(trained, SpardaSettings(**prompts))
    assert "in prompts top_k 96 (here 40)" in warning
    assert check_metadata(trained, SpardaSettings(**prompts, prompt_selector="query")) is None
    assert check_metadata({"top_k": "40"}, SpardaSettings(**prompts)).count("top_k") == 1
    both = check_metadata({"top_k": "48"}, SpardaSettings(forecast="f", sparse_prefill=True))
    assert both.count("top_k") == 1


@pytest.mark.parametrize("history", [{"sparse_forward": True}, {"sparse_forward": False}, None])
def test_a_forecast_of_dense_prompts_that_chooses_in_sparse_ones_is_told(tmp_path, history):
    """By the file that training writes."""
    forecast, geometry = Forecast(LAYERS, HIDDEN, HEADS, DIM), BlockGeometry(64, 16, 1, 32, 96)
    path = tmp_path / "trained.safetensors"
    export_forecast(path, forecast, geometry, "any", history)
    metadata = load_forecast(path, *MODEL).metadata
    prompts = {"forecast": "f", "sparse_prefill": True}
    warning = other_prompts(metadata, SpardaSettings(**prompts))
    assert ("prompt_selector to query" in (warning or "")) == (history == {"sparse_forward": False})
    for silent in ({"forecast": "f"}, {**prompts, "prompt_selector": "query"}):
        assert other_prompts(metadata, SpardaSettings(**silent)) is None


# ---- without training, and sharding --------------------------------------------------------------


@pytest.mark.parametrize("has_bias", [False, True])
def test_lookahead_weights_give_the_mean_query(has_bias):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(6 * DIM, HIDDEN, generator=generator)
    bias = torch.randn(6 * DIM, generator=generator) if has_bias else None
    mean, mean_bias = lookahead_weights(weight, bias, 6, HEADS, DIM)
    x = torch.randn(5, HIDDEN, generator=generator)
    queries = torch.nn.functional.linear(x, weight, bias).view(5, HEADS, 3, DIM)
    got = torch.nn.functional.linear(x, mean, mean_bias).view(5, HEADS, DIM)
    torch.testing.assert_close(got, queries.mean(2))
    assert (mean_bias is None) is not has_bias
    assert lookahead_weights(weight.bfloat16(), None, 6, HEADS, DIM)[0].dtype == torch.bfloat16


def test_ranks_own_disjoint_kv_heads():
    heads, dim = 8, 4
    weight = torch.arange(heads).repeat_interleave(dim)[:, None].expand(-1, 3)
    for world in (1, 2, 4, 8):
        parts = [shard_heads(weight, heads, rank, world) for rank in range(world)]
        assert torch.equal(torch.cat(parts), weight)
        for rank, part in enumerate(parts):
            own = range(rank * heads // world, (rank + 1) * heads // world)
            assert sorted(set(part[:, 0].tolist())) == list(own)
    with pytest.raises(ValueError, match="8 KV heads cannot be split over 3 ranks"):
        shard_heads(weight, heads, 0, 3)


def test_ranks_beyond_the_kv_heads_have_copies_in_order():
    """As vLLM's projection copies the rows of keys and values."""
    weight = torch.arange(2).repeat_interleave(DIM)[:, None].expand(-1, 3)
    for world in (2, 4, 8):
        parts = [shard_heads(weight, 2, rank, world)[:, 0] for rank in range(world)]
        assert [part.unique().tolist() for part in parts] == [
            [2 * rank // world] for rank in range(world)
        ]
        assert all(len(part) == DIM for part in parts)
    with pytest.raises(ValueError, match="2 KV heads cannot be split over 3 ranks"):
        shard_heads(weight, 2, 0, 3)


def test_sharding_commutes_with_averaging():
    """A rank averages its own query heads; that must be its shard of the whole average."""
    generator = torch.Generator().manual_seed(2)
    weight, bias = torch.randn(8 * DIM, HIDDEN, generator=generator), torch.randn(8 * DIM)
    whole, whole_bias = lookahead_weights(weight, bias, 8, 4, DIM)
    for world in (1, 2, 4):
        for rank in range(world):
            rows = slice(rank * 8 * DIM // world, (rank + 1) * 8 * DIM // world)
            own, own_bias = lookahead_weights(weight[rows], bias[rows], 8 // world, 4 // world, DIM)
            assert torch.equal(own, shard_heads(whole, 4, rank, world))
            assert torch.equal(own_bias, shard_heads(whole_bias, 4, rank, world))
