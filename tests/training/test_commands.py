# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""``train-forecast``, ``eval-forecast`` and ``inspect`` as a user runs them."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch
from support.training import GEOMETRY, SETTINGS, config, sequences
from transformers import LlamaModel

from vllm_sparse.cli import main
from vllm_sparse.training import commands
from vllm_sparse.training.files import export_forecast
from vllm_sparse.training.forecast import Forecast
from vllm_sparse.training.settings import load_train_settings
from vllm_sparse.training.trainer import Trainer

pytest.importorskip("accelerate")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A tiny model with a tokenizer, as files."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-model")
    torch.manual_seed(0)
    LlamaModel(config()).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1").save_pretrained(folder)
    return folder


def test_commands(model_folder, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{token}" for token in sequences(4).flatten().tolist()))
    out = tmp_path / "forecast.safetensors"
    options = [
        f"--{name.replace('_', '-')}={value}"
        for name, value in {**SETTINGS, "steps": 3, "init": "uniform"}.items()
    ]
    command = ["train-forecast", "--model", str(model_folder), "--data", str(text)]
    command += ["--out", str(out), *options]
    assert main(command) == 0
    warned = capsys.readouterr().err
    assert "has no sparse_config" in warned
    assert "was trained densely." not in warned  # nobody knows
    assert main(command) == 1
    assert "--resume" in capsys.readouterr().err
    assert main([*command[:-1], "--steps=4", "--init=uniform", "--resume"]) == 0
    assert "step 4 of 4" in capsys.readouterr().out

    assert main(["inspect", str(out)]) == 0
    shown = capsys.readouterr().out
    assert f"base_model: {model_folder.name}" in shown
    assert "trained_steps: 4" in shown
    assert f"trained_seq_len: {SETTINGS['seq_len']}" in shown
    assert "q_curr_proj.weight" in shown

    numbers = tmp_path / "numbers.json"
    command = ["eval-forecast", "--model", str(model_folder), "--forecast", str(out)]
    command += ["--data", str(text), "--seq-len=256", "--sequences=2", "--dtype=float32"]
    assert main([*command, "--json", str(numbers)]) == 0
    assert "lookahead-query" in capsys.readouterr().out
    found = json.loads(numbers.read_text())
    assert found["top_k"] == 5
    assert len(found["recall"]["forecast"]) == 3

    wrong = Forecast(2, 64, 2, 16)
    export_forecast(out, wrong, GEOMETRY, "another/model")
    assert main(command) == 1
    assert "trained for another/model" in capsys.readouterr().err


def test_what_cannot_be_written_is_refused_before_anything_is_read(tmp_path, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "checkpoint-000001.pt").touch()
    begin = ["train-forecast", "--recipe", "dense-small", "--model", "/no/such", "--data", "/none"]
    for out, options, expected in (
        ("forecast.pt", [], "must be a file whose name ends in .safetensors"),
        ("folder.safetensors", [], "must be a file"),
        ("file/f.safetensors", [], "file: no files can be written there"),
        ("f.safetensors", ["--folder", str(tmp_path / "file")], "choose another folder"),
        ("f.safetensors", ["--cache", str(tmp_path / "file")], "choose another folder"),
        ("f.safetensors", ["--folder", str(tmp_path / "old")], "add --resume"),
        ("f.safetensors", [], "cannot load the tokenizer of '/no/such'"),
    ):
        assert main([*begin, "--out", str(tmp_path / out), *options]) == 1
        assert expected in capsys.readouterr().err


def test_sigterm_exports_what_there_is(model_folder, tmp_path, monkeypatch, capsys):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{token}" for token in sequences(2).flatten().tolist()))
    out = tmp_path / "forecast.safetensors"
    monkeypatch.setattr(Trainer, "_backward", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SETTINGS.items()]
    command = ["train-forecast", "--model", str(model_folder), "--data", str(text)]
    command += ["--out", str(out), *options, "--sparse-forward=false"]
    assert main(command) == 128 + signal.SIGTERM
    assert out.exists()
    said = capsys.readouterr().err
    assert "--resume goes on from there" in said
    assert "sparse_config" not in said


def test_models_that_were_trained_sparsely_may_attend_so(model_folder, tmp_path, capsys):
    values = json.loads((model_folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "sparse_config": {"topk": 64}}))
    commands._warn_of_sparse_forward(str(tmp_path), load_train_settings("sparda", {}))
    assert not capsys.readouterr().err
