# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Settings of SPARDA."""

from __future__ import annotations

import pytest

from vllm_sparse.config import load_settings
from vllm_sparse.errors import ConfigError
from vllm_sparse.policies.sparda import SpardaSettings


def load(**section) -> SpardaSettings:
    return load_settings({"vllm_sparse": section}, "sparda")


class TestSettings:
    def test_defaults_are_minicpms(self):
        settings = load()
        assert settings == SpardaSettings()
        assert (settings.block_size, settings.kernel_stride) == (64, 16)
        assert (settings.init_blocks, settings.local_blocks, settings.blocks_read) == (1, 32, 96)
        assert settings.dense_len == 8192

    def test_both_meanings_of_topk(self):
        assert load(top_k=96).blocks_read == load(top_k_extra=64).blocks_read == 96
        assert load(top_k=40, local_blocks=4).blocks_read == 40
        assert load(top_k_extra=40, local_blocks=4).blocks_read == 44

    def test_the_selector_follows_the_forecast_file(self):
        assert load().chosen_selector == "previous"
        assert load(sparse_prefill=True).chosen_selector == "query"
        assert load(forecast="weights.safetensors").chosen_selector == "forecast"
        assert load(selector="previous").chosen_selector == "previous"

    def test_prompts_may_read_another_number_of_blocks(self):
        outputs = {"local_blocks": 2, "top_k": 8, "selector": "query"}
        for prefill, read, alike in (
            (False, 8, False),
            (True, 8, True),
            (8, 8, True),
            (20, 20, False),
        ):
            settings = load(sparse_prefill=prefill, **outputs)
            assert settings.sparse_prefill == prefill
            assert (settings.prompt_blocks_read, settings.prompts_like_outputs) == (read, alike)

    def test_prompts_may_choose_otherwise_than_outputs(self):
        prompts = {"sparse_prefill": True, "prompt_selector": "query"}
        for selector, alike in (("query", True), ("previous", False), (None, True)):
            settings = load(selector=selector, **prompts)
            assert settings.chosen_prompt_selector == "query"
            assert settings.prompts_like_outputs == alike
        assert load(forecast="f").chosen_prompt_selector == "forecast"
        settings = load(forecast="f", **prompts)
        assert (settings.chosen_selector, settings.chosen_prompt_selector) == ("forecast", "query")
        assert not settings.prompts_like_outputs

    def test_the_smallest_choice_is_allowed(self):
        assert load(init_blocks=2, local_blocks=3, top_k=6).blocks_read == 6

    @pytest.mark.parametrize(
        ("section", "names"),
        [
            ({"top_k": 96, "top_k_extra": 64}, ["top_k", "top_k_extra", "one of them"]),
            ({"top_k": 33}, ["top_k=33", "34", "init_blocks=1", "local_blocks=32"]),
            ({"top_k_extra": 1}, ["top_k=33", "34", "local_blocks"]),
            ({"block_size": 48}, ["block_size=48", "kernel_stride=16"]),
            ({"block_size": 64, "kernel_stride": 64}, ["block_size=64", "kernel_stride=64"]),
            ({"selector": "forecast"}, ["selector=forecast", "safetensors", "lookahead-query"]),
            ({"selector": "query", "forecast": "f.safetensors"}, ["forecast", "selector=query"]),
            ({"selector": "previous", "sparse_prefill": True}, ["sparse_prefill", "previous"]),
            ({"prompt_selector": "query"}, ["prompt_selector=query", "sparse_prefill is off"]),
            ({"sparse_prefill": True, "prompt_selector": "previous"}, ["prompt_selector"]),
            ({"sparse_prefill": 33}, ["sparse_prefill=33", "34", "local_blocks=32"]),
            ({"sparse_prefill": 40, "selector": "previous"}, ["sparse_prefill", "previous"]),
            ({"sparse_prefill": -3}, ["vllm_sparse.sparse_prefill"]),
            ({"resident": True, "slab_gib": 1.0}, ["resident", "slab_gib"]),
            ({"resident": True, "resident_first_layer": True}, ["resident_first_layer"]),
            ({"selector": "random"}, ["vllm_sparse.selector", "lookahead-query"]),
            ({"topk": 3}, ["vllm_sparse.topk", "unknown setting", "top_k_extra"]),
            ({"token_budget": 3}, ["vllm_sparse.token_budget", "unknown setting"]),
            ({"algorithm": "rocketkv"}, ["vllm_sparse.algorithm", "rocketkv", "sparda"]),
            *(
                ({name: 0}, [f"vllm_sparse.{name}"])
                for name in (
                    *("block_size", "kernel_stride", "init_blocks", "local_blocks", "top_k"),
                    *("top_k_extra", "host_gib", "slab_gib", "staging_blocks", "link_gb_per_s"),
                )
            ),
            ({"dense_len": -1}, ["vllm_sparse.dense_len"]),
        ],
    )
    def test_errors_name_the_key(self, section, names):
        with pytest.raises(ConfigError) as error:
            load(**section)
        for name in names:
            assert name in str(error.value)


def test_settings_are_still_found_where_they_were():
    from vllm_sparse import config

    assert config.SpardaSettings is SpardaSettings
    with pytest.raises(AttributeError, match="NoSuchSettings"):
        _ = config.NoSuchSettings
