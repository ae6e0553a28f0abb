# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""One server is one instance: in all its processes, and in all views of its configuration."""

from __future__ import annotations

import copy
import gc
import pickle
from types import SimpleNamespace

import pytest
import torch
from support.engine import SETTINGS, SPARDA_SETTINGS

from vllm_sparse import startup
from vllm_sparse.instance import instance_of

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

SETTINGS_OF = {"ROCKETKV": SETTINGS, "SPARDA": {**SPARDA_SETTINGS, "selector": "query"}}


@pytest.fixture(params=SETTINGS_OF)
def config(request, llama):
    """vLLM's configuration of a server, as its API server completes it."""
    from vllm.engine.arg_utils import EngineArgs

    backend, settings = request.param, {"vllm_sparse": SETTINGS_OF[request.param]}
    return EngineArgs(
        model=str(llama), attention_backend=backend, additional_config=settings, dtype="float32",
        skip_tokenizer_init=True, max_model_len=1024, max_num_seqs=4, block_size=32,
    ).create_engine_config()  # fmt: skip


def build_layer():
    """Build what implements a layer, under the current configuration; its backend."""
    from vllm.config import get_current_vllm_config

    from vllm_sparse.backends.policy_cpu import PolicyCpuBackend
    from vllm_sparse.backends.sparda_cpu import SpardaCpuBackend

    sparda = get_current_vllm_config().attention_config.backend.name == "SPARDA"
    backend = SpardaCpuBackend if sparda else PolicyCpuBackend
    backend.get_impl_cls()(
        num_heads=8, head_size=32, scale=1.0, num_kv_heads=2, alibi_slopes=None,
        sliding_window=None, kv_cache_dtype="auto",
    )  # fmt: skip
    return backend


def test_layers_under_views_share_a_block_table_and_a_folder(config):
    """A model of several parts builds each under a view of its own, on every rank, and drops it."""
    from vllm.config import set_current_vllm_config
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    specs = []
    for _ in range(2):
        rank = pickle.loads(pickle.dumps(config))
        view = rank.with_hf_config(rank.model_config.hf_config, ["LlamaForCausalLM"])
        assert view.instance_id != rank.instance_id, "or this shows nothing"
        with set_current_vllm_config(view):
            backend = build_layer()
        del view
        gc.collect()
        stock = FullAttentionSpec(block_size=32, num_kv_heads=2, head_size=32, dtype=torch.float32)
        specs.append(backend.customize_spec(stock))
    assert specs[0] == specs[1]
    assert specs[0].instance == specs[1].instance == instance_of(config).name


def test_servers_have_names_of_their_own(config):
    assert instance_of(config).name
    other = SimpleNamespace(compilation_config=SimpleNamespace())
    assert instance_of(other).name != instance_of(config).name


def test_engines_that_ray_starts_are_of_their_server(config):
    from vllm.v1.engine.utils import _apply_dp_identity_suffix

    engine = copy.deepcopy(config)
    _apply_dp_identity_suffix(engine, 1)
    assert engine.instance_id != config.instance_id, "or this shows nothing"
    assert instance_of(engine).name == instance_of(config).name


def test_a_start_costs_no_cache_of_compiled_models(config):
    other = pickle.loads(pickle.dumps(config))
    del other.compilation_config._vllm_sparse
    assert instance_of(other).name != instance_of(config).name
    assert other.compute_hash() == config.compute_hash()


def test_an_engine_that_has_started_is_not_sized_again(config, monkeypatch):
    """It completes its configuration once more, when pools and weights have taken the memory."""
    engine = pickle.loads(pickle.dumps(config))
    before = vars(engine.cache_config).copy(), vars(engine.scheduler_config).copy()
    monkeypatch.setattr(startup, "available_bytes", lambda: 0)
    engine.__post_init__()
    assert (vars(engine.cache_config), vars(engine.scheduler_config)) == before
    assert engine.instance_id != config.instance_id, "or this shows nothing"
    assert instance_of(engine).name == instance_of(config).name
