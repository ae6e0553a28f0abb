# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""``--kv-offloading-size``: whole engines in which evicted prefixes return."""

from __future__ import annotations

import pytest
from support.configuration import configuration
from support.engine import BLOCK_SIZE, DENSE, SETTINGS, run_engine
from support.policies import make_policy

from vllm_sparse.backends import prefix_tier
from vllm_sparse.errors import ConfigError
from vllm_sparse.kv.host.geometry import GIB


def limits(prompts, **changes) -> list[int]:
    """Tokens of each prompt that may be shared."""
    policy = make_policy(
        **{**SETTINGS, **changes}, head_dim=32, group_size=4, block_size=BLOCK_SIZE,
        max_model_len=1024,
    )  # fmt: skip
    return [policy.publishable_tokens(len(prompt)) for prompt in prompts]


def test_more_than_the_machine_has_is_refused(monkeypatch):
    monkeypatch.setattr(prefix_tier, "available_bytes", lambda: int(0.9 * GIB))
    with pytest.raises(ConfigError, match=r"--kv-offloading-size 1\.0: .* 0\.90 GiB available"):
        prefix_tier.prepare_tier(configuration("ROCKETKV", cache_config__kv_offloading_size=1.0))


def test_data_parallel_engines_take_it_each(monkeypatch):
    monkeypatch.setattr(prefix_tier, "available_bytes", lambda: int(1.9 * GIB))
    asked = {"cache_config__kv_offloading_size": 1.0}
    prefix_tier.prepare_tier(configuration("ROCKETKV", **asked))
    two = configuration("ROCKETKV", **asked, parallel_config__data_parallel_size_local=2)
    with pytest.raises(ConfigError, match=r"--kv-offloading-size 1\.0 for each of 2 engines"):
        prefix_tier.prepare_tier(two)
    monkeypatch.setattr(prefix_tier, "available_bytes", lambda: 0)
    elsewhere = configuration("ROCKETKV", **asked, parallel_config__data_parallel_size_local=0)
    prefix_tier.prepare_tier(elsewhere)


@pytest.mark.vllm
class TestEngines:
    @pytest.fixture(autouse=True)
    def _vllm(self):
        pytest.importorskip("vllm")

    @pytest.mark.parametrize("settings", [{}, {"token_budget": 128}])
    def test_evicted_prefixes_return_and_change_nothing(self, llama, prompts, sparse_run, settings):
        """Six prompts of 19 blocks, three times through a pool of 47."""
        options = {
            "settings": {**SETTINGS, **settings}, "block_size": BLOCK_SIZE,
            "num_gpu_blocks_override": 48, "waves": 3,
        }  # fmt: skip
        without = run_engine(llama, prompts, **options)
        tier = run_engine(llama, prompts, kv_offloading_size=0.05, **options)
        assert tier["tokens"] == without["tokens"]
        if not settings:
            assert tier["tokens"] == sparse_run["tokens"] * 3
        most = limits(prompts, **settings)
        assert tier["cached"][1:] == [most] * 2
        assert sum(without["cached"][2]) < 0.7 * sum(most)
        assert tier["free_blocks"][0] == tier["free_blocks"][1]

    def test_preempted_chunked_and_with_a_tier_that_is_too_small(self, llama, prompts, sparse_run):
        run = run_engine(
            llama, prompts, settings=SETTINGS, block_size=BLOCK_SIZE, num_gpu_blocks_override=35,
            max_num_batched_tokens=65, scheduler_reserve_full_isl=False, waves=2,
            kv_offloading_size=0.004,
        )  # fmt: skip
        assert run["preemptions"] > 0
        assert run["tokens"] == sparse_run["tokens"] * 2
        assert run["free_blocks"][0] == run["free_blocks"][1]

    def test_window_layers_beside_it(self, windowed, prompts):
        options = {
            "settings": SETTINGS, "block_size": BLOCK_SIZE, "num_gpu_blocks_override": 120,
            "waves": 2, "disable_hybrid_kv_cache_manager": False,
        }  # fmt: skip
        without = run_engine(windowed, prompts[:4], **options)
        tier = run_engine(windowed, prompts[:4], kv_offloading_size=0.05, **options)
        assert tier["tokens"] == without["tokens"]
        assert sum(tier["cached"][1]) >= sum(without["cached"][1])

    def test_window_layers_beside_a_longer_hit(self, windowed, prompts):
        """Dense requests store their whole prompts, sparse ones may take a part of them."""
        options = {
            "settings": SETTINGS, "block_size": BLOCK_SIZE, "num_gpu_blocks_override": 90,
            "waves": 2, "asked": [DENSE] * 4 + [None] * 4, "max_model_len": 768,
            "disable_hybrid_kv_cache_manager": False,
        }  # fmt: skip
        without = run_engine(windowed, prompts[:4], **options)
        tier = run_engine(windowed, prompts[:4], kv_offloading_size=0.05, **options)
        assert tier["tokens"] == without["tokens"]
        assert tier["free_blocks"][0] == tier["free_blocks"][1]

    @pytest.mark.slow
    def test_the_gpu_path(self, llama, prompts, sparse_run):
        """Model Runner V2, interpreted kernels, blocks as on a GPU; copies as on a CPU."""
        run = run_engine(
            llama, prompts[::2], settings={**SETTINGS, "kernels": "triton"}, block_size=BLOCK_SIZE,
            max_num_batched_tokens=1024, new_tokens=8, num_gpu_blocks_override=34, waves=2,
            kv_cache_memory_bytes=6 << 20, kv_offloading_size=0.05, timeout=900,
            env={"VLLM_USE_V2_MODEL_RUNNER": "1"},
            stand_ins=("flash_attention", "captured_graphs"),
        )  # fmt: skip
        assert run["tokens"] == [[tokens[:8] for tokens in sparse_run["tokens"][0][::2]]] * 2
        assert run["cached"][1] == limits(prompts[::2])
