# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Forecast files of other servers and trainers are served as they are, or refused by name."""

from __future__ import annotations

import functools
import io
import random

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file
from support.forecast import LAYERS, MODEL, Malicious, tensors

from vllm_sparse.errors import ConfigError
from vllm_sparse.forecast.file import canonical_name
from vllm_sparse.forecast.weights import load_forecast


def extended():
    """A q_curr_proj in every layer, of which only layer 0's is for anything."""
    weights = tensors()
    own = weights[canonical_name(0, "q_curr_proj")]
    extra = {canonical_name(layer, "q_curr_proj"): own + layer for layer in range(1, LAYERS)}
    return {**weights, **extra}


def training(weights):
    # Not this process's: what a file is damaged by should be the same in every run.
    own = torch.Generator().manual_seed(0)
    rng = {"numpy": np.random.RandomState(0).get_state(), "torch": own.get_state()}
    return {
        "step": 2,
        "model_state_dict": weights,
        "rng_state": np.array([1, 2], dtype=np.uint32),
        "rng_state_by_rank": [rng],
        "optimizer_state_dict": {"state": {}, "param_groups": [{"lr": 5e-4, "params": [0]}]},
        "sparse_config": {"block_size": 64, "window_size": 2048, "topk": 64},
    }


# What sglang's pull requests 38302 and 38397 read, and the official training writes.
LAYOUTS = {
    "bare": lambda: tensors(),
    "nested": lambda: {"state_dict": tensors()},
    "training": lambda: training(tensors()),
    "module": lambda: {"model": tensors("module.model.")},
    "nested twice": lambda: {"model": {"state_dict": tensors("module.")}},
    "extra q_curr_proj": lambda: {"state_dict": extended()},
}


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_others_load_unchanged(tmp_path, layout, suffix):
    path = tmp_path / f"indexer{suffix}"
    torch.save(LAYOUTS[layout](), path)
    loaded = load_forecast(path, *MODEL)
    for layer, weight in enumerate(loaded.future):
        assert torch.equal(weight, tensors()[canonical_name(layer, "q_future_proj")])
    assert torch.equal(loaded.current, tensors()[canonical_name(0, "q_curr_proj")])
    last = canonical_name(LAYERS - 1, "q_future_proj")
    extra = {canonical_name(layer, "q_curr_proj") for layer in range(1, LAYERS)}
    unused = {last} | (extra if layout == "extra q_curr_proj" else set())
    assert {name[name.index("layers.") :] for name in loaded.unused} == {
        name[name.index("layers.") :] for name in unused
    }
    expected = {"block_size": "64", "local_blocks": "32", "top_k": "96"}
    assert loaded.metadata == (expected if layout == "training" else {})


def test_a_directory_of_shards(tmp_path):
    weights = list(tensors().items())
    torch.save(dict(weights[:2]), tmp_path / "a.bin")
    torch.save({"state_dict": dict(weights[2:])}, tmp_path / "b.pt")
    assert torch.equal(
        load_forecast(tmp_path, *MODEL).future[2],
        tensors()[canonical_name(2, "q_future_proj")],
    )
    # Beside safetensors, which hold everything, they are what these were converted from.
    save_file(tensors(), tmp_path / "c.safetensors")
    assert load_forecast(tmp_path, *MODEL).current is not None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_poisoned_weights_are_named(tmp_path, value, suffix):
    weights = tensors()
    name = canonical_name(1, "q_future_proj")
    weights[name][3, 4] = value
    path = tmp_path / f"f{suffix}"
    if suffix == ".pt":
        torch.save({"state_dict": weights}, path)
    else:
        save_file(weights, path)
    with pytest.raises(ConfigError, match=f"no finite numbers, in {name}:"):
        load_forecast(path, *MODEL)
    # What nobody reads may be anything: official files have an untrained last layer.
    weights = tensors()
    weights[canonical_name(LAYERS - 1, "q_future_proj")][:] = value
    torch.save(weights, tmp_path / "g.pt")
    load_forecast(tmp_path / "g.pt", *MODEL)


def test_wrong_shapes_are_named(tmp_path):
    weights = tensors("module.model.")
    name = "module." + canonical_name(2, "q_future_proj")
    weights[name] = weights[name][:-1]
    torch.save({"state_dict": weights}, tmp_path / "f.pt")
    with pytest.raises(ConfigError, match=rf"{name}: expected \[16, 24\], got \[15, 24\]"):
        load_forecast(tmp_path / "f.pt", *MODEL)
    torch.save({**tensors(), **tensors("module.")}, tmp_path / "twice.pt")
    with pytest.raises(ConfigError, match="two tensors are for the same layer"):
        load_forecast(tmp_path / "twice.pt", *MODEL)
    torch.save({"state_dict": {}}, tmp_path / "empty.pt")
    with pytest.raises(ConfigError, match=r"q_curr_proj\.weight is missing"):
        load_forecast(tmp_path / "empty.pt", *MODEL)


def test_pickled_code_is_refused_and_not_run(tmp_path):
    proof, path = tmp_path / "executed", tmp_path / "evil.pt"
    torch.save({"state_dict": tensors(), "config": Malicious(proof)}, path)
    with pytest.raises(ConfigError, match=r"evil\.pt was not read.*exec"):
        load_forecast(path, *MODEL)
    assert not proof.exists()
    torch.load(path, weights_only=False)
    assert proof.exists(), "the file should have been dangerous"


@functools.cache
def whole_files() -> dict[str, tuple[str, bytes]]:
    """A Forecast in each format: suffix and content."""
    files = {"safetensors": (".safetensors", save(tensors(), {"block_size": "64"}))}
    for kind in ("zip", "legacy"):
        buffer = io.BytesIO()
        torch.save(training(tensors()), buffer, _use_new_zipfile_serialization=kind == "zip")
        files[kind] = ".pt", buffer.getvalue()
    return files


def damaged(content: bytes, draw: random.Random) -> bytes:
    """A few bytes overwritten, mostly where the names are, or an end that is missing."""
    if draw.random() < 0.3:
        return content[: draw.randrange(len(content))]
    broken = bytearray(content)
    for _ in range(draw.choice([1, 2, 9])):
        broken[draw.randrange(draw.choice([600, 2500, len(broken)]))] ^= 1 << draw.randrange(8)
    return bytes(broken)


@pytest.mark.filterwarnings("ignore")  # PyTorch warns of odd pickle protocols
@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_a_damaged_file_is_refused_by_name(tmp_path, kind):
    """It loads, or it is refused; nothing else."""
    suffix, content = whole_files()[kind]
    path, refused = tmp_path / f"damaged{suffix}", 0
    for seed in range(150):
        path.write_bytes(damaged(content, random.Random(seed)))
        try:
            loaded = load_forecast(path, *MODEL)
        except ConfigError as error:
            message = str(error)
        else:
            message = ""
        if message:
            assert path.name in message
            refused += 1
        else:
            assert len(loaded.future) == LAYERS - 1
            assert all(weight.isfinite().all() for weight in loaded.future)
    assert 50 < refused < 150


def test_a_path_that_nobody_can_open_is_named(tmp_path):
    for name in ("x" * 300, "a\0b"):
        with pytest.raises(ConfigError, match="forecast: "):
            load_forecast(tmp_path / name, *MODEL)
