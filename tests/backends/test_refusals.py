# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What is refused only beside something else; the table of features is tested as a whole."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from support.configuration import configuration

from vllm_sparse import startup
from vllm_sparse.errors import IntegrityError, UnsupportedError

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm


@pytest.fixture(autouse=True)
def _machine(monkeypatch):
    monkeypatch.setattr(startup, "available_bytes", lambda: 1 << 30)


class Ours(SimpleNamespace):
    """What implements our layers."""


def test_our_own_layers_run_on_any_flash_attention():
    """A drafter's builder sees the model's, which are in another group."""
    from vllm_sparse.backends.refusals import check_stock_layers

    ours = SimpleNamespace(impl=Ours(vllm_flash_attn_version=4))
    check_stock_layers([ours, SimpleNamespace()], Ours)


def test_one_block_table_is_refused_only_beside_other_layers():
    from vllm_sparse.backends.refusals import check_windows

    alone = configuration("ROCKETKV", scheduler_config__disable_hybrid_kv_cache_manager=True)
    startup.check_config(alone)
    with pytest.raises(UnsupportedError, match="--disable-hybrid-kv-cache-manager"):
        check_windows("ROCKETKV", False, alone)


def test_models_that_attend_both_ways_are_refused_though_vllm_does_not_say_so():
    diffusion = configuration("ROCKETKV", model_config__is_diffusion=True)
    with pytest.raises(UnsupportedError, match="non-causal"):
        startup.check_config(diffusion)


def test_a_layer_that_is_read_again_without_keys_says_so():
    from vllm_sparse.backends.policy_step import attend_step

    given = SimpleNamespace(layer_name="layers.3"), torch.zeros(1), None, None
    with pytest.raises(IntegrityError, match=r"layers\.3 reads .*--attention-backend"):
        attend_step(None, None, *given, torch.zeros(1), None, torch.zeros(1))


@pytest.mark.parametrize("kind", ["tensorizer", "ipc_cache"])
def test_weights_that_are_not_processed_are_refused_only_to_who_looks_ahead(kind):
    load = {"load_config": SimpleNamespace(load_format=kind)}
    startup.check_config(configuration("SPARDA", {"selector": "previous"}, **load))
    with pytest.raises(UnsupportedError, match=f"--load-format {kind} brings"):
        startup.check_config(configuration("SPARDA", {"selector": "lookahead-query"}, **load))


def test_a_look_ahead_without_weights_is_refused_whatever_loaded_the_model():
    """A load format of another package may process nothing."""
    from vllm_sparse.backends.sparda_setup import _selector
    from vllm_sparse.config import load_settings
    from vllm_sparse.forecast.tap import ForecastTap

    config = configuration("SPARDA", {"selector": "lookahead-query"})
    settings = load_settings(config.additional_config, "sparda")
    taps = [ForecastTap(None, 16, torch.zeros(8, 1, 2, 8), has_bias=False) for _ in range(2)]
    layers = [SimpleNamespace(impl=None, layer_name=f"layer.{i}") for i in range(3)]
    for layer, tap in zip(layers, (*taps, None), strict=True):
        layer.sparda_tap = tap
    machine = SimpleNamespace(captured=False)
    rest = None, torch.float32, layers, machine, 1, torch.device("cpu")
    taps[0].fill(0, torch.zeros(16, 16))
    with pytest.raises(UnsupportedError, match=r"lookahead-query .* lack: layer\.1\."):
        _selector(settings, *rest)
    taps[1].fill(0, torch.zeros(16, 16))
    assert _selector(settings, *rest).ahead


def test_a_tier_of_somebody_elses_making_is_refused():
    chosen = SimpleNamespace(kv_connector_module_path="vllm_sparse.kv.tier")
    startup.check_config(configuration("ROCKETKV", kv_transfer_config=chosen))
    with pytest.raises(UnsupportedError, match="remove --kv-transfer-config"):
        startup.check_config(configuration("SPARDA", kv_transfer_config=chosen))


@pytest.mark.parametrize(
    "changes",
    [
        {"model_config__is_hybrid": True},
        {"parallel_config__pipeline_parallel_size": 2},
        {"cache_config__enable_prefix_caching": False},
    ],
)
def test_a_tier_that_is_named_by_hand_is_refused_where_the_option_is(changes):
    chosen = SimpleNamespace(kv_connector_module_path="vllm_sparse.kv.tier")
    with pytest.raises(UnsupportedError, match="--kv-transfer-config"):
        startup.check_config(configuration("ROCKETKV", kv_transfer_config=chosen, **changes))


def test_hits_within_blocks_are_refused_beside_windows_alone():
    from vllm_sparse.backends.refusals import check_windows

    finer = configuration("ROCKETKV", cache_config__prefix_match_unit=16)
    startup.check_config(finer)  # vLLM refuses it itself where all layers are ours
    with pytest.raises(UnsupportedError, match="--prefix-match-unit"):
        check_windows("ROCKETKV", False, finer)


def test_what_our_builders_ask_for_is_no_window():
    """An engine completes its configuration again when they have asked."""
    from vllm_sparse.backends.base import ask_for_prompt_lengths

    given = configuration("ROCKETKV", model_config__model_arch_config=SimpleNamespace())
    ask_for_prompt_lengths(given)
    given.model_config.rswa_window = given.model_config.model_arch_config.rswa_window
    startup.check_config(given)
    given.model_config.rswa_window = 128
    with pytest.raises(UnsupportedError, match="the last 128 outputs"):
        startup.check_config(given)


def test_a_model_of_which_nothing_is_ours_is_refused_but_a_stage_may_be_such():
    from vllm.v1.attention.backends.mamba2_attn import Mamba2AttentionBackend

    from vllm_sparse.backends.refusals import check_model

    state = SimpleNamespace(get_attn_backend=lambda: Mamba2AttentionBackend)
    for layers in ({"a": state}, {}):
        knows = SimpleNamespace(static_forward_context=layers)
        model = configuration("ROCKETKV", compilation_config=knows)
        with pytest.raises(UnsupportedError, match="no attention layers that ROCKETKV could serve"):
            check_model(model, False)
        model.parallel_config.pipeline_parallel_size = 2
        check_model(model, False)
