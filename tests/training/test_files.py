# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The Forecast file: what training writes, evaluation and the server read."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from support.training import GEOMETRY, backbone
from transformers import Qwen2Config, Qwen2Model

from vllm_sparse.errors import ConfigError
from vllm_sparse.training.files import export_forecast, import_forecast, load_tensors
from vllm_sparse.training.forecast import Forecast


@pytest.mark.parametrize("bias", [False, True])
def test_exported_file_loads(tmp_path, bias):
    frozen = backbone((Qwen2Config, Qwen2Model))
    forecast = Forecast(3, 64, 2, 16, bias)
    forecast.initialise("lookahead", frozen, 0)
    path = tmp_path / "forecast.safetensors"
    export_forecast(path, forecast, GEOMETRY, "some/model")
    tensors, metadata = load_tensors(path)
    names = {
        "model.layers.0.self_attn.q_curr_proj",
        "model.layers.0.self_attn.q_future_proj",
        "model.layers.1.self_attn.q_future_proj",
    }
    kinds = ("weight", "bias") if bias else ("weight",)
    assert set(tensors) == {f"{name}.{kind}" for name in names for kind in kinds}
    assert tensors["model.layers.1.self_attn.q_future_proj.weight"].shape == (32, 64)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert metadata == {
        "base_model": "some/model",
        "block_size": "32",
        "kernel_size": "16",
        "kernel_stride": "8",
        "init_blocks": "1",
        "local_blocks": "1",
        "top_k": "5",
        "version": "1",
    }
    loaded, geometry = import_forecast(path, frozen)
    assert geometry == GEOMETRY
    for old, new in zip(forecast.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(old.bfloat16().float(), new)


def test_files_that_are_no_forecast_are_refused(tmp_path):
    path, frozen = tmp_path / "x.safetensors", backbone()
    with pytest.raises(ConfigError, match="not a readable"):
        load_tensors(path)
    with pytest.raises(ConfigError, match="there is no file"):
        import_forecast(path, frozen)
    path.write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="not a readable"):
        import_forecast(path, frozen)
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(ConfigError, match=r"q_curr_proj\.weight is missing"):
        import_forecast(path, frozen)
    export_forecast(path, Forecast(3, 64, 2, 16), GEOMETRY, "m")
    tensors, metadata = load_tensors(path)
    save_file(tensors, path)
    with pytest.raises(ConfigError, match="lacks block_size"):
        import_forecast(path, frozen)
    save_file(tensors, path, {**metadata, "version": "2"})
    with pytest.raises(ConfigError, match="of version 2, this vllm-sparse reads 1"):
        import_forecast(path, frozen)
    export_forecast(path, Forecast(3, 64, 2, 24), GEOMETRY, "m")
    with pytest.raises(ConfigError, match=r"trained for m.*expected \[32, 64\], got \[48, 64\]"):
        import_forecast(path, frozen)


def test_weights_that_are_not_finite_are_not_written(tmp_path):
    forecast = Forecast(3, 64, 2, 16)
    with torch.no_grad():
        forecast.projections[1].weight[0, 0] = torch.inf
    with pytest.raises(ConfigError, match="layer 1 is not finite; not written"):
        export_forecast(tmp_path / "f.safetensors", forecast, GEOMETRY, "m")
    assert not list(tmp_path.iterdir())
