# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Official checkpoints: converted there and back, and nothing in them is executed."""

from __future__ import annotations

import pickle
import random
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from support.forecast import DIM, HEADS, LAYERS, MODEL, Malicious, tensors

from vllm_sparse.cli import main
from vllm_sparse.errors import ConfigError
from vllm_sparse.forecast.file import canonical_name
from vllm_sparse.forecast.official import convert_official, export_official
from vllm_sparse.forecast.weights import check_metadata, load_forecast
from vllm_sparse.policies.sparda import SpardaSettings

if TYPE_CHECKING:
    from pathlib import Path

SPARSE_CONFIG = {
    "kernel_size": 32,
    "kernel_stride": 16,
    "init_blocks": 1,
    "block_size": 64,
    "window_size": 2048,
    "topk": 64,
    "use_nope": False,
}


def checkpoint() -> dict:
    """An official training checkpoint, optimiser and random states included."""
    weights = tensors()
    parameters = [torch.nn.Parameter(weight.clone()) for weight in weights.values()]
    optimiser = torch.optim.AdamW(parameters)
    sum(parameter.float().sum() for parameter in parameters).backward()
    optimiser.step()
    rng_state = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": [torch.get_rng_state()],
    }
    return {
        "step": 500,
        "model_state_dict": weights,
        "optimizer_state_dict": optimiser.state_dict(),
        "sparse_config": dict(SPARSE_CONFIG),
        "base_model_path": "openbmb/MiniCPM4.1-8B",
        "rng_state": rng_state,
        "rng_state_by_rank": [rng_state],
        "accuracy": np.float64(0.5),
    }


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def test_converts_a_training_checkpoint(tmp_path):
    content = checkpoint()
    torch.save(content, tmp_path / "ckpt-500.pt")
    convert_official(tmp_path / "ckpt-500.pt", tmp_path / "f.safetensors")
    loaded = load_forecast(tmp_path / "f.safetensors", *MODEL)
    for layer, weight in enumerate(loaded.future):
        name = canonical_name(layer, "q_future_proj")
        assert torch.equal(weight, content["model_state_dict"][name])
    assert loaded.metadata == {
        "base_model": "openbmb/MiniCPM4.1-8B",
        "block_size": "64",
        "kernel_size": "32",
        "kernel_stride": "16",
        "local_blocks": "32",
        "init_blocks": "1",
        "top_k": "96",  # 64 beside the 32 local ones
        "version": "1",
    }
    assert check_metadata(loaded.metadata, SpardaSettings(forecast="f")) is None


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "net", "weights", None])
@pytest.mark.parametrize("prefix", ["module.model.", "base_model.model.model.", "_orig_mod."])
def test_wrappers_and_prefixes(tmp_path, wrapper, prefix):
    weights = tensors(prefix)
    torch.save({wrapper: weights} if wrapper else weights, tmp_path / "f.bin")
    convert_official(tmp_path / "f.bin", tmp_path / "f.safetensors", base_model="mine")
    assert metadata_of(tmp_path / "f.safetensors") == {"base_model": "mine", "version": "1"}
    with safe_open(tmp_path / "f.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(tensors())


def test_directories_and_safetensors(tmp_path):
    for folder, write in (
        ("torch", lambda weights, name: torch.save(weights, name.with_suffix(".bin"))),
        ("safe", lambda weights, name: save_file(weights, name.with_suffix(".safetensors"))),
    ):
        source = tmp_path / folder
        source.mkdir()
        weights = list(tensors().items())
        write(dict(weights[:2]), source / "a")
        write(dict(weights[2:]), source / "b")
        convert_official(source, tmp_path / f"{folder}.safetensors")
        loaded = load_forecast(tmp_path / f"{folder}.safetensors", *MODEL)
        assert torch.equal(loaded.current, tensors()[canonical_name(0, "q_curr_proj")])
    torch.save(tensors(), tmp_path / "torch" / "c.bin")
    with pytest.raises(ConfigError, match="Name the one file to use"):
        convert_official(tmp_path / "torch", tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


def test_numpy_1_names_are_known(tmp_path, monkeypatch):
    """Checkpoints written with numpy 1 name numpy.core instead of numpy._core."""
    monkeypatch.setattr(np._core.multiarray._reconstruct, "__module__", "numpy.core.multiarray")
    torch.save(checkpoint(), tmp_path / "f.pt")
    monkeypatch.undo()
    assert b"numpy.core.multiarray" in (tmp_path / "f.pt").read_bytes()
    convert_official(tmp_path / "f.pt", tmp_path / "f.safetensors")


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
def test_code_is_never_executed(tmp_path, kind):
    proof, source = tmp_path / "executed", tmp_path / "evil.pt"
    content = {**checkpoint(), "rng_state": Malicious(proof)}
    if kind == "pickle":
        source.write_bytes(pickle.dumps({"rng_state": Malicious(proof)}, protocol=2))
    else:
        torch.save(content, source, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(ConfigError) as failure:
        convert_official(source, tmp_path / "f.safetensors")
    if kind != "pickle":
        assert "exec" in str(failure.value)
    assert "evil.pt" in str(failure.value)
    assert not proof.exists()
    assert not (tmp_path / "f.safetensors").exists()
    torch.load(source, weights_only=False) if kind != "pickle" else pickle.loads(
        source.read_bytes()
    )
    assert proof.exists(), "the file should have been dangerous"


def test_the_allow_list_does_not_leak(tmp_path):
    torch.save({"state": np.random.get_state()}, tmp_path / "f.pt")
    with pytest.raises(ConfigError, match="holds no Forecast"):
        convert_official(tmp_path / "f.pt", tmp_path / "f.safetensors")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "f.pt", weights_only=True)


def test_unusable_checkpoints(tmp_path):
    target = tmp_path / "f.safetensors"
    with pytest.raises(ConfigError, match="there is no file"):
        convert_official(tmp_path / "absent.pt", target)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no"):
        convert_official(tmp_path / "empty", target)
    (tmp_path / "broken.pt").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"broken\.pt"):
        convert_official(tmp_path / "broken.pt", target)
    torch.save({"model": {"w": torch.zeros(1)}}, tmp_path / "other.pt")
    with pytest.raises(ConfigError, match="holds no Forecast"):
        convert_official(tmp_path / "other.pt", target)
    gap = tensors()
    del gap[canonical_name(1, "q_future_proj")]
    torch.save(gap, tmp_path / "gap.pt")
    with pytest.raises(ConfigError, match=r"missing: model\.layers\.1\.self_attn\.q_future_proj"):
        convert_official(tmp_path / "gap.pt", target)
    mixed = tensors()
    mixed[canonical_name(1, "q_future_proj")] = torch.zeros(3, 3)
    torch.save(mixed, tmp_path / "mixed.pt")
    with pytest.raises(ConfigError, match="matrices of one shape"):
        convert_official(tmp_path / "mixed.pt", target)
    without = {**checkpoint(), "sparse_config": {**SPARSE_CONFIG, "use_nope": True}}
    torch.save(without, tmp_path / "without.pt")
    with pytest.raises(ConfigError, match=r"without\.pt: use_nope is true"):
        convert_official(tmp_path / "without.pt", target)
    uneven = {**checkpoint(), "sparse_config": {**SPARSE_CONFIG, "window_size": 100}}
    torch.save(uneven, tmp_path / "uneven.pt")
    said = r"uneven\.pt: window_size 100 is not a multiple of block_size 64"
    with pytest.raises(ConfigError, match=said):
        convert_official(tmp_path / "uneven.pt", target)


def test_there_and_back(tmp_path, capsys):
    """The command, both ways, and both meanings of top-k."""
    source, ours, back = (tmp_path / name for name in ("a.pt", "b.safetensors", "c.pt"))
    torch.save(checkpoint(), source)
    assert main(["convert-forecast", str(source), str(ours), "--base-model", "x/y"]) == 0
    assert main(["convert-forecast", str(ours), str(back)]) == 0
    assert capsys.readouterr().out.splitlines() == [str(ours), str(back)]
    content = torch.load(back, weights_only=True)
    assert content["base_model_path"] == "x/y"
    assert content["sparse_config"] == {
        key: value for key, value in SPARSE_CONFIG.items() if key != "use_nope"
    }
    assert content["model_state_dict"].keys() == tensors().keys()
    for name, weight in tensors().items():
        assert torch.equal(content["model_state_dict"][name], weight)
    again = tmp_path / "d.safetensors"
    convert_official(back, again)
    assert metadata_of(again) == metadata_of(ours)


def test_command_reports_errors(tmp_path, capsys):
    source = tmp_path / "a.safetensors"
    save_file(tensors(), source)
    assert main(["convert-forecast", str(source), str(tmp_path / "b.pt")]) == 1
    assert "does not say block_size" in capsys.readouterr().err
    assert main(["convert-forecast", str(source), str(tmp_path / "b.txt")]) == 2
    assert "should end in" in capsys.readouterr().err
    assert main(["convert-forecast", str(tmp_path / "no"), str(tmp_path / "b.safetensors")]) == 1
    save_file(dict(list(tensors().items())[:2]), tmp_path / "p.safetensors")
    with pytest.raises(ConfigError, match="incomplete"):
        export_official(tmp_path / "p.safetensors", tmp_path / "p.pt")


def biases_of(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name.replace(".weight", ".bias"): torch.full((HEADS * DIM,), float(i))
        for i, name in enumerate(weights)
    }


def test_biases_are_converted_all_or_none(tmp_path):
    weights, source, target = tensors(), tmp_path / "f.pt", tmp_path / "f.safetensors"
    biases, name = biases_of(weights), canonical_name(1, "q_future_proj.bias")
    torch.save({**weights, **biases}, source)
    convert_official(source, target)
    loaded = load_forecast(target, *MODEL)
    assert torch.equal(loaded.current, weights[canonical_name(0, "q_curr_proj")])
    assert torch.equal(loaded.current_bias, biases[canonical_name(0, "q_curr_proj.bias")])
    for layer, bias in enumerate(loaded.future_bias):
        assert torch.equal(bias, biases[canonical_name(layer, "q_future_proj.bias")])
    target.unlink()
    for wrong, said in ((None, "missing: " + name), (torch.zeros(3), "of as many rows")):
        spoilt = {key: bias for key, bias in biases.items() if key != name}
        torch.save({**weights, **spoilt, **({} if wrong is None else {name: wrong})}, source)
        with pytest.raises(ConfigError, match=said):
            convert_official(source, target)
        assert not target.exists()


def test_biases_are_read_all_or_none_and_never_exported(tmp_path):
    weights = tensors()
    biases = biases_of(weights)
    path = tmp_path / "f.safetensors"
    save_file({**weights, **biases}, path)
    loaded = load_forecast(path, *MODEL)
    assert [float(bias[0]) for bias in loaded.future_bias] == [0.0, 1.0, 2.0]
    assert float(loaded.current_bias[0]) == LAYERS
    with pytest.raises(ConfigError, match="has biases"):
        export_official(path, tmp_path / "f.pt")
    save_file(weights, path)
    assert load_forecast(path, *MODEL).future_bias is None
    name = canonical_name(1, "q_future_proj.bias")
    del biases[name]
    save_file({**weights, **biases}, path)
    with pytest.raises(ConfigError, match=f"{name} is missing"):
        load_forecast(path, *MODEL)
