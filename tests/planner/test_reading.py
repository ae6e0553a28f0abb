# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What a ``config.json`` leaves out and vLLM's classes know; expected is what vLLM 0.32 says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from support.planner import LLAMA

from vllm_sparse.doctor import model as examined
from vllm_sparse.doctor.model import model_findings
from vllm_sparse.errors import ConfigError
from vllm_sparse.planner import reading
from vllm_sparse.planner.model import read_model
from vllm_sparse.planner.reading import _PLAIN, _by_class

SMALL = {
    "hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1000,
    "intermediate_size": 512, "num_hidden_layers": 4, "head_dim": 64,
    "max_position_embeddings": 4096,
}  # fmt: skip
GEMMA = {
    "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3",
    "torch_dtype": "float16",
    "text_config": {
        "architectures": ["Inner"], "model_type": "gemma3_text", "hidden_size": 2560,
        "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    },
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
LENGTHS = {
    "linear": ("llama", {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    "dynamic": ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
    "yarn": ("llama", {"rope_scaling": YARN}),
    "separate": ("cohere", {"model_max_length": 131072, "max_position_embeddings": 8192}),
}
MIXTURE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
FACTS = ("furthest", "is_hybrid", "layers", "full_layers", "windowed_layers")


@pytest.fixture
def read(tmp_path):
    def reads(**config):
        (tmp_path / "config.json").write_text(json.dumps(config))
        return read_model(str(tmp_path))

    return reads


@pytest.mark.parametrize(
    ("kind", "changes", "facts"),
    [
        ("gemma3_text", {"num_hidden_layers": 26, "sliding_window": 512,
         "sliding_window_pattern": 6}, (4096, False, 26, 4, 22)),
        ("qwen3_next", {"num_hidden_layers": 48, "full_attention_interval": 4},
         (4096, True, 48, 12, 0)),
        ("nemotron_h", {"hybrid_override_pattern": "M-M*M*-", "num_hidden_layers": 7},
         (4096, True, 7, 2, 0)),
        ("jamba", {"num_hidden_layers": 8}, (4096, True, 8, 1, 0)),
        ("granitemoehybrid", {"layer_types": ["attention"] * 4}, (4096, False, 4, 4, 0)),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 100, "max_window_layers": 3},
         (4096, False, 4, 3, 1)),
        ("mistral", {"sliding_window": 1024}, (4096, False, 4, 0, 4)),
        (*LENGTHS["linear"], (16384, False, 4, 4, 0)),
        (*LENGTHS["dynamic"], (8192, False, 4, 4, 0)),
        (*LENGTHS["yarn"], (4096, False, 4, 4, 0)),
        (*LENGTHS["separate"], (131072, False, 4, 4, 0)),
        ("gemma3n_text", {"intermediate_size": [512] * 4, "layer_types": ["full_attention"] * 4},
         (4096, False, 4, 4, 0)),
    ],
)  # fmt: skip
def test_layers_and_lengths_are_those_of_the_class(read, kind, changes, facts):
    pytest.importorskip("transformers")
    model = read(architectures=["SomeForCausalLM"], model_type=kind, **{**SMALL, **changes})
    assert tuple(getattr(model, name) for name in FACTS) == facts
    assert model.shape().intermediate >= 512
    assert (model.get_total_num_kv_heads(), model.get_head_size()) == (2, 64)
    assert model.max_model_len == facts[0]


def test_a_part_about_language_may_name_few_of_its_sizes(read, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(examined, "available_bytes", lambda: 64 << 30)  # whatever else runs here
    model = read(**GEMMA)
    assert (model.furthest, model.full_layers, model.windowed_layers) == (131072, 5, 29)
    assert (model.get_total_num_kv_heads(), model.get_head_size()) == (4, 256)
    assert model.text["vocab_size"] > 262000
    assert model.architecture == "Gemma3ForConditionalGeneration"
    assert str(model.dtype) == "torch.float16"
    findings = model_findings(str(model.folder))
    assert {finding.level for finding in findings} == {"ok", "warning"}


@pytest.mark.parametrize("kind", _PLAIN)
def test_plain_files_need_no_class(monkeypatch, read, kind):
    """It would say the same."""
    pytest.importorskip("transformers")
    config = {**LLAMA, "model_type": kind, **MIXTURE} if "moe" in kind else LLAMA
    plain = read(**{**config, "model_type": kind})
    assert plain.config["text_config"] == {}
    monkeypatch.setattr(reading, "_PLAIN", ())
    by_class = read(**{**config, "model_type": kind})
    assert by_class.config["text_config"]["model_type"] == kind
    assert plain.shape() == by_class.shape()
    for name in FACTS:
        assert getattr(plain, name) == getattr(by_class, name)


def test_without_transformers_or_such_a_class_the_file_counts(monkeypatch, read):
    assert read(model_type="of another", **SMALL).layers == 4
    refused = {**SMALL, "num_attention_heads": "4"}
    assert _by_class({**refused, "model_type": "gemma2"}) is None
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert read(model_type="cohere", **SMALL).layers == 4
    with pytest.raises(ConfigError, match="lacks num_attention_heads, vocab_size"):
        read(**GEMMA)


def test_the_hub_s_cache_may_lie_elsewhere(monkeypatch, tmp_path):
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "huggingface/hub/models--some--model/snapshots/abc"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(LLAMA))
    assert read_model("some/model").folder == folder


def test_a_class_is_loaded_without_the_network_or_vllm(tmp_path):
    """Nor code of the model's own, which its file may name."""
    (tmp_path / "config.json").write_text(
        json.dumps({**GEMMA, "auto_map": {"AutoConfig": "some/repository--own.Config"}})
    )
    code = (
        "import sys\n"
        "def forbid(event, _):\n"
        "    assert event not in ('socket.connect', 'socket.getaddrinfo'), event\n"
        "sys.addaudithook(forbid)\n"
        "from vllm_sparse.planner.model import read_model\n"
        f"assert read_model({str(tmp_path)!r}).full_layers == 5\n"
        "assert 'vllm' not in sys.modules"
    )
    pytest.importorskip("transformers")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "none")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("case", [*LENGTHS, "gemma3_text"])
def test_lengths_are_those_that_vllm_derives(read, case):
    vllm_model = pytest.importorskip("vllm.config.model")
    from transformers import AutoConfig
    from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase

    kind, changes = LENGTHS.get(case, (case, {"rope_scaling": {"type": "linear", "factor": 8.0}}))
    config = {**SMALL, **changes}
    known = AutoConfig.for_model(kind, **config).get_text_config()
    derived = SimpleNamespace(
        derived_max_model_len_and_key=ModelArchConfigConvertorBase(
            known, known
        ).derive_max_model_len_and_key()
    )
    theirs = vllm_model._get_and_verify_max_len(known, derived, None, None, False, None)
    assert read(model_type=kind, **config).furthest == theirs
