# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""How much memory weights take that are not stored in 16 bits, and what files say of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from support.configuration import configuration

from vllm_sparse import device_room
from vllm_sparse.kv.host.geometry import GIB
from vllm_sparse.paths import hub_cache
from vllm_sparse.quantized import weight_bits

FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
EMBEDDINGS = 2 * 128256 * 8192 * 2


def model_of(**given):
    """Llama 3.1 70B's shape, by a name that no folder has."""
    model = configuration("SPARDA").model_config
    model.kv_heads, model.get_head_size = 8, lambda: 128
    model.hf_text_config = SimpleNamespace(
        hidden_size=8192, num_hidden_layers=80, num_attention_heads=64, intermediate_size=28672,
        vocab_size=128256, tie_word_embeddings=False,
    )  # fmt: skip
    model.model = "some/model"
    vars(model).update(given)
    return model


def described(**section):
    return SimpleNamespace(architectures=["LlamaForCausalLM"], quantization_config=section)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("section", [{"hf_config": described(**FP8)}, {}])
def test_70_billion_numbers_of_8_bits_leave_room_on_an_h200(section):
    """Whether they are stored so, or packed as they are loaded."""
    config = configuration("SPARDA", model_config=model_of(quantization="fp8", **section))
    config.cache_config.gpu_memory_utilization = 0.92
    config.scheduler_config.max_num_batched_tokens = 8192
    assert 40 * GIB < device_room.left_bytes(config, 140 * GIB) < 60 * GIB


@pytest.mark.parametrize(
    ("method", "section", "bits"),
    [
        ("fp8", FP8, 8),
        ("awq_marlin", {"bits": 4, "group_size": 128, "zero_point": True}, 4.125),
        ("awq", {"w_bit": 4, "q_group_size": 64}, 4.25),
        ("gptq_marlin", {"bits": 8, "group_size": -1}, 8),
        ("bitsandbytes", {"load_in_4bit": True}, 4.5),
        ("bitsandbytes", {"load_in_8bit": True}, 8),
        ("modelopt", {"quant_algo": "NVFP4"}, 4.5),
        ("modelopt_fp4", {}, 4.5),
        ("mxfp8", {}, 8.25),
        ("quark", {}, None),
        ("modelopt", {"quant_algo": "MIXED_PRECISION"}, None),
        ("modelopt", {"quant_algo": "W4A16_NVFP4"}, 4.5),
    ],
)
def test_bits_are_those_that_a_checkpoint_names(method, section, bits):
    assert weight_bits(method, section) == bits


@pytest.mark.parametrize(
    ("weights", "bits"),
    [
        ([{"num_bits": 8, "type": "float", "strategy": "channel", "group_size": None}], 8),
        ([{"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}], 4.125),
        ([{"num_bits": 4, "type": "float", "group_size": 16}], 4.5),
        ([{"num_bits": 4, "type": "int"}, {"num_bits": 8, "type": "float"}], 8),
        ([{"num_bits": 4, "type": "int"}, None], 4),
        ([None], 16),
    ],
)
def test_bits_of_groups_are_those_of_the_widest(weights, bits):
    groups = {f"group_{index}": {"weights": each} for index, each in enumerate(weights)}
    assert weight_bits("compressed-tensors", {"config_groups": groups}) == bits


def test_what_is_surely_taken_is_of_the_narrowest_group():
    groups = {"a": {"weights": {"num_bits": 4}}, "b": {"weights": {"num_bits": 8}}}
    model = model_of(quantization="compressed-tensors", hf_config=described(config_groups=groups))
    least, most = device_room.least_weight_bytes(model), device_room.weight_bytes(model)
    assert 2 * (least - EMBEDDINGS) == most - EMBEDDINGS


def test_a_dense_model_of_a_class_with_experts_has_one_mlp():
    """Granite 4's dense ones name the same width twice."""
    sizes = {"shared_intermediate_size": 28672, "intermediate_size": 28672, "num_local_experts": 0}
    model = model_of()
    vars(model.hf_text_config).update(sizes)
    assert device_room.weight_bytes(model) == device_room.weight_bytes(model_of())


def test_embeddings_stay_as_they_are():
    whole = device_room.weight_bytes(model_of())
    awq = model_of(quantization="awq_marlin", hf_config=described(bits=4, group_size=128))
    packed = device_room.weight_bytes(awq)
    assert packed == device_room.least_weight_bytes(awq)
    assert (packed - EMBEDDINGS) * 16 == (whole - EMBEDDINGS) * 4.125


def test_experts_alone_are_packed_where_the_method_does_so():
    def mixture(**given):
        return device_room.weight_bytes(model_of(get_num_experts=lambda: 2, **given))

    experts = 80 * 3 * 8192 * 28672 * 2
    assert mixture() - mixture(quantization="mxfp4") == experts * (2 - 4.25 / 8)


def test_experts_that_all_tokens_share_are_weights():
    def added(**changes):
        model = model_of(get_num_experts=lambda: 2)
        shape = vars(model.hf_text_config) | {"moe_intermediate_size": 1000}
        model.hf_text_config = SimpleNamespace(**shape, **changes)
        return device_room.weight_bytes(model) - 80 * 3 * 8192 * 2000 * 2

    plain = added()
    assert added(shared_expert_intermediate_size=700) - plain == 80 * 3 * 8192 * 700 * 2
    assert added(n_shared_experts=2) - plain == 80 * 3 * 8192 * 2000 * 2


def test_widths_may_differ_by_layer_or_be_missing():
    model = model_of()
    alike = device_room.weight_bytes(model)
    model.hf_text_config.intermediate_size = [28672] * 80
    assert device_room.weight_bytes(model) == alike
    model.hf_text_config.intermediate_size = None
    assert device_room.weight_bytes(model) == alike - 80 * 3 * 8192 * (28672 - 4 * 8192) * 2


class TestFiles:
    @pytest.fixture
    def snapshot(self, cache):
        """Of the branch ``main``: two files of which the first has come."""
        folder = cache / "models--some--model"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("abc")
        snapshot = folder / "snapshots" / "abc"
        snapshot.mkdir(parents=True)
        files = {"one": "1.safetensors", "two": "1.safetensors", "three": "2.safetensors"}
        index = {"metadata": {}, "weight_map": files}
        (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
        (snapshot / "1.safetensors").write_bytes(b"x" * 1000)
        return snapshot

    def test_those_of_the_hub_s_cache_count_once_all_of_them_are_there(self, snapshot):
        model = model_of(quantization="fp8", hf_config=described(**FP8))
        by_shape = device_room.weight_bytes(model)
        assert by_shape > 60 * GIB
        (snapshot / "2.safetensors").write_bytes(b"x" * 500)
        (snapshot / "consolidated.safetensors").write_bytes(b"x" * 1500)
        assert device_room.weight_bytes(model) == 1500
        model.revision = "another"
        assert device_room.weight_bytes(model) == by_shape
        model.revision = "abc"
        assert device_room.weight_bytes(model) == 1500

    def test_those_of_a_folder_as_well(self, snapshot):
        model = model_of(model=str(snapshot))
        assert device_room.weight_bytes(model) > 120 * GIB
        (snapshot / "2.safetensors").write_bytes(b"x" * 500)
        assert device_room.weight_bytes(model) == 1500

    def test_they_do_not_say_what_is_packed_as_it_is_loaded(self, snapshot):
        (snapshot / "2.safetensors").write_bytes(b"x" * 500)
        assert device_room.weight_bytes(model_of(quantization="fp8")) > 60 * GIB


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"XDG_CACHE_HOME": "/xdg"},
        {"XDG_CACHE_HOME": "/xdg", "HF_HOME": "~/hf"},
        {"HF_HOME": "/hf", "HUGGINGFACE_HUB_CACHE": "/old"},
        {"HUGGINGFACE_HUB_CACHE": "/old", "HF_HUB_CACHE": "$HOME/new"},
    ],
)
def test_the_hub_s_cache_is_where_its_own_library_has_it(monkeypatch, environment):
    pytest.importorskip("huggingface_hub")
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    code = "from huggingface_hub.constants import HF_HUB_CACHE; print(HF_HUB_CACHE, end='')"
    told = subprocess.check_output([sys.executable, "-c", code], env=os.environ, text=True)
    assert str(hub_cache()) == told
