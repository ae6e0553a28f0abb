# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""SPARDA's settings and sizes: what is refused at start-up, and that the message helps."""

from __future__ import annotations

import copy
import math
import re
from types import SimpleNamespace
from typing import TYPE_CHECKING

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from vllm_sparse import startup
from vllm_sparse.config import SpardaSettings, load_settings
from vllm_sparse.errors import ConfigError, UnsupportedError
from vllm_sparse.kv.host.geometry import (
    GIB,
    Geometry,
    block_bytes,
    blocks_per_row,
    host_blocks,
    plan_frames,
)
from vllm_sparse.kv.host.memory import available_bytes

if TYPE_CHECKING:
    from pathlib import Path


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
        assert load(sparse_prefill=True).chosen_selector == "lookahead-query"
        assert load(forecast="weights.safetensors").chosen_selector == "forecast"
        assert load(selector="previous").chosen_selector == "previous"

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


def small(**changes) -> SpardaSettings:
    return SpardaSettings(
        **{
            "selector": "query",
            "block_size": 16,
            "kernel_stride": 4,
            "local_blocks": 2,
            "top_k": 6,
            "dense_len": 64,
            **changes,
        }
    )


PLAN = {
    "num_layers": 4,
    "num_pieces": 2000,
    "num_kv_heads": 2,
    "piece_bytes": 1 << 20,
    "max_num_seqs": 8,
    "max_model_len": 1024,
}


class TestHostBlocks:
    def test_as_many_as_fit(self):
        each = block_bytes(num_layers=4, num_kv_heads=2, block_size=16, head_dim=8, itemsize=2)
        assert each == 4 * 2 * 16 * (8 + 8) * 2
        assert host_blocks(small(host_gib=100.9 * each / GIB), each, 16 * 16) == 100
        assert host_blocks(small(host_gib=100 * each / GIB), each, 99 * 16) == 100

    def test_too_few_for_one_request(self):
        """99 blocks of tokens and vLLM's null block."""
        with pytest.raises(ConfigError) as error:
            host_blocks(small(host_gib=100 / 1024), 1 << 20, 99 * 16 + 1)
        for part in ("vllm_sparse.host_gib", "hold 100 blocks", "16 tokens", "1024 KiB", "1585",
                     "needs 101", "--max-model-len"):  # fmt: skip
            assert part in str(error.value), part

    @given(st.integers(1, 1 << 26), st.integers(1, 200_000))
    @hypothesis_settings(max_examples=200, deadline=None)
    def test_the_advice_helps(self, bytes_per_block, max_model_len):
        with pytest.raises(ConfigError) as error:
            host_blocks(small(host_gib=1e-9), bytes_per_block, max_model_len)
        advised = float(re.search(r"at least ([\d.]+)", str(error.value))[1])
        host_blocks(small(host_gib=advised), bytes_per_block, max_model_len)


class TestPlanFrames:
    def test_unset_is_twice_the_working_set(self):
        """8 rows, 2 heads, 6 blocks."""
        assert plan_frames(small(), **PLAN) == (192,) * 4

    def test_never_more_than_all(self):
        assert plan_frames(small(), **{**PLAN, "num_pieces": 150}) == (150,) * 4
        assert plan_frames(small(slab_gib=64), **PLAN) == (2000,) * 4

    def test_dense_rows_read_more_than_selected_ones(self):
        assert blocks_per_row(small(), 1024) == 6
        assert blocks_per_row(small(dense_len=97), 1024) == 7
        assert blocks_per_row(small(dense_len=8192), 1024) == 64
        assert blocks_per_row(small(top_k=80), 1000) == 63
        assert plan_frames(small(dense_len=97), **PLAN) == (2 * 8 * 2 * 7,) * 4

    def test_resident(self):
        assert plan_frames(small(resident=True), **PLAN) == (2000,) * 4
        first = plan_frames(small(resident_first_layer=True), **PLAN)
        assert first == (2000, 192, 192, 192)
        geometry = Geometry(4, 1000, 2, 16, 8, 2, first)
        assert [geometry.is_resident(layer) for layer in range(4)] == [True, False, False, False]
        assert geometry.piece_bytes == 16 * 16 * 2
        assert geometry.host_bytes == 4 * 1000 * 2 * geometry.piece_bytes
        assert geometry.slab_bytes == (2000 + 3 * 192) * geometry.piece_bytes

    def test_a_given_slab_is_divided_among_the_layers(self):
        assert plan_frames(small(slab_gib=0.5), **PLAN) == (128,) * 4
        settings = small(slab_gib=(2000 + 3 * 100) / 1024, resident_first_layer=True)
        assert plan_frames(settings, **PLAN) == (2000, 100, 100, 100)

    @pytest.mark.parametrize(
        ("changes", "least_mib", "parts"),
        [
            ({}, 4 * 96, ["96 frames in each of 4 layers,"]),
            ({"resident_first_layer": True}, 2000 + 3 * 96, ["3 layers + 2000 of the resident"]),
        ],
    )
    def test_a_slab_too_small_for_a_step(self, changes, least_mib, parts):
        least = least_mib / 1024
        plan_frames(small(slab_gib=least, **changes), **PLAN)
        with pytest.raises(ConfigError) as error:
            plan_frames(small(slab_gib=least - 1 / 2048, **changes), **PLAN)
        for part in (
            "vllm_sparse.slab_gib",
            "--max-num-seqs 8 x 2 KV heads x 6 blocks = 96 frames",
            "1024 KiB",
            f"{math.ceil(1000 * least) / 1000:.3f} GiB",
            "dense_len",
            *parts,
        ):
            assert part in str(error.value), part

    @given(st.integers(1, 64), st.integers(1, 40), st.booleans(), st.integers(1, 1 << 22))
    @hypothesis_settings(max_examples=200, deadline=None)
    def test_the_advice_helps(self, max_num_seqs, layers, first, piece_bytes):
        where = {**PLAN, "max_num_seqs": max_num_seqs, "piece_bytes": piece_bytes}
        where["num_layers"] = layers + first
        with pytest.raises(ConfigError) as error:
            plan_frames(small(slab_gib=1e-12, resident_first_layer=first), **where)
        advised = float(re.search(r"are ([\d.]+) GiB", str(error.value))[1])
        frames = plan_frames(small(slab_gib=advised, resident_first_layer=first), **where)
        assert frames[-1] >= min(max_num_seqs * 2 * 6, 2000)


class TestAvailableBytes:
    @pytest.fixture(autouse=True)
    def _machine(self, monkeypatch):
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))

    @staticmethod
    def cgroup(folder: Path, limit: str, used: str = "500\n", stat: str | None = None) -> Path:
        (folder / "memory.max").write_text(limit)
        (folder / "memory.current").write_text(used)
        stat = "anon 300\ninactive_file 150\nactive_file 50\n" if stat is None else stat
        (folder / "memory.stat").write_text(stat)
        return folder

    def test_the_containers_limit_counts_without_its_page_cache(self, tmp_path):
        assert available_bytes(self.cgroup(tmp_path, "800\n")) == 800 - 500 + 150

    def test_the_machine_counts_where_it_has_less(self, tmp_path):
        assert available_bytes(self.cgroup(tmp_path, "9000\n")) == 1000

    @pytest.mark.parametrize(
        ("limit", "used"), [("max\n", "500\n"), ("nonsense", "500\n"), ("800\n", "")]
    )
    def test_no_limit_or_none_that_can_be_read(self, tmp_path, limit, used):
        if limit == "nonsense":
            (tmp_path / "memory.max").write_text("800\n")  # the other files are missing
        else:
            self.cgroup(tmp_path, limit, used)
        assert available_bytes(tmp_path) == 1000

    def test_no_control_group(self, tmp_path):
        assert available_bytes(tmp_path / "none") == 1000

    def test_old_statistics(self, tmp_path):
        assert available_bytes(self.cgroup(tmp_path, "800\n", stat="anon 300\n")) == 300


class Model(SimpleNamespace):
    """A model of 4 layers and 2 KV heads of 8 bfloat16 numbers: 8 KiB per block of 32 tokens."""

    use_mla = is_attention_free = is_hybrid = enable_sleep_mode = False
    runner_type = "generate"
    max_model_len = 1024
    dtype = torch.bfloat16
    kv_heads = 2

    @property
    def architecture(self) -> str:
        return self.hf_config.architectures[0]

    def get_num_layers(self, parallel) -> int:
        return 4

    def get_total_num_kv_heads(self) -> int:
        return self.kv_heads

    def get_num_kv_heads(self, parallel) -> int:
        return max(1, self.kv_heads // parallel.tensor_parallel_size)

    def get_head_size(self) -> int:
        return 8


BLOCK_BYTES = 8192


def config(settings=None, **changes) -> SimpleNamespace:
    """The parts of a vLLM config that the guard reads; 40 blocks of host memory."""
    section = {
        **{"selector": "query", "block_size": 32, "kernel_stride": 8, "local_blocks": 1},
        **{"top_k": 4, "dense_len": 0, "host_gib": 40 * BLOCK_BYTES / GIB},
        **(settings or {}),
    }
    values = {
        "attention_config": SimpleNamespace(
            backend=SimpleNamespace(name="SPARDA"), use_non_causal=False
        ),
        "additional_config": {"vllm_sparse": section},
        "model_config": Model(hf_config=SimpleNamespace(architectures=["LlamaForCausalLM"])),
        "cache_config": SimpleNamespace(
            cache_dtype="auto",
            block_size=16,
            user_specified_block_size=False,
            num_gpu_blocks_override=None,
        ),
        "speculative_config": None,
        "kv_transfer_config": None,
        "lora_config": None,
        "scheduler_config": SimpleNamespace(max_num_seqs=4),
        "parallel_config": SimpleNamespace(
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
            pipeline_parallel_size=1,
            tensor_parallel_size=1,
            data_parallel_size_local=1,
            use_ubatching=False,
        ),
    }
    for key, value in changes.items():
        head, _, tail = key.partition("__")
        if tail:
            setattr(values[head], tail, value)
        else:
            values[head] = value
    return SimpleNamespace(**values)


class TestGuard:
    @pytest.fixture(autouse=True)
    def _machine(self, monkeypatch):
        monkeypatch.setattr(startup, "available_bytes", lambda: 100 * BLOCK_BYTES)

    def test_vllm_gets_the_host_pools_size(self):
        accepted = config()
        startup.check_config(accepted)
        assert accepted.cache_config.block_size == 32
        assert accepted.cache_config.num_gpu_blocks_override == 40
        assert accepted.model_config.architecture == "LlamaForCausalLM"

    def test_twice_is_like_once(self):
        accepted = config()
        startup.check_config(accepted)
        once = copy.deepcopy(vars(accepted.cache_config))
        startup.check_config(accepted)
        assert vars(accepted.cache_config) == once

    @pytest.mark.vllm
    def test_twice_is_like_once_for_the_models_class(self):
        pytest.importorskip("vllm")
        accepted = config({"selector": "lookahead-query"})
        for _ in range(2):
            startup.check_config(accepted)
            assert accepted.model_config.hf_config.architectures == ["SpardaLlamaForCausalLM"]

    def test_another_backend_is_left_alone(self):
        other = config(attention_config__backend=SimpleNamespace(name="FLASH_ATTN"))
        other.lora_config = object()
        before = copy.deepcopy(vars(other.cache_config))
        startup.check_config(other)
        assert vars(other.cache_config) == before

    @pytest.mark.parametrize(
        ("changes", "why"),
        [
            ({"lora_config": object()}, "--enable-lora"),
            ({"parallel_config__pipeline_parallel_size": 2}, "pipeline parallelism"),
            ({"parallel_config__tensor_parallel_size": 4}, "--tensor-parallel-size 4.* 2 KV heads"),
            ({"model_config__use_mla": True}, "MLA"),
            ({"model_config__enable_sleep_mode": True}, "--enable-sleep-mode"),
            ({"cache_config__cache_dtype": "fp8"}, "--kv-cache-dtype fp8"),
        ],
    )
    def test_unsupported_combinations_are_refused(self, changes, why):
        refused = config(**changes)
        before = copy.deepcopy(vars(refused.cache_config))
        with pytest.raises(UnsupportedError, match=why):
            startup.check_config(refused)
        assert vars(refused.cache_config) == before

    def test_every_reason_is_listed(self):
        with pytest.raises(UnsupportedError, match=r"SPARDA .*speculative.*pipeline.*LoRA"):
            startup.check_config(
                config(
                    speculative_config=object(),
                    lora_config=object(),
                    parallel_config__pipeline_parallel_size=2,
                )
            )

    def test_these_do_not_concern_the_other_backend(self):
        startup.check_config(
            config(
                attention_config__backend=SimpleNamespace(name="ROCKETKV"),
                additional_config={},
                lora_config=object(),
            )
        )

    def test_one_head_per_rank_is_enough(self):
        accepted = config(parallel_config__tensor_parallel_size=2)
        startup.check_config(accepted)
        assert accepted.cache_config.num_gpu_blocks_override == 80, "half the bytes per rank"

    def test_contradicting_block_sizes(self):
        given = {"cache_config__user_specified_block_size": True, "cache_config__block_size": 64}
        with pytest.raises(ConfigError, match=r"--block-size 64 .*vllm_sparse\.block_size=32"):
            startup.check_config(config(**given))
        startup.check_config(config(**{**given, "cache_config__block_size": 32}))

    def test_an_override_may_lower_but_not_raise(self):
        smaller = config(cache_config__num_gpu_blocks_override=36)
        startup.check_config(smaller)
        assert smaller.cache_config.num_gpu_blocks_override == 36
        startup.check_config(config(cache_config__num_gpu_blocks_override=40))
        with pytest.raises(ConfigError, match=r"--num-gpu-blocks-override 41 .*host_gib.* 40 b"):
            startup.check_config(config(cache_config__num_gpu_blocks_override=41))

    def test_a_pool_for_less_than_one_request(self):
        with pytest.raises(ConfigError, match=r"host_gib.* hold 32 blocks .* needs 33"):
            startup.check_config(config({"host_gib": 32 * BLOCK_BYTES / GIB}))

    def test_a_pool_larger_than_memory(self, monkeypatch):
        startup.check_config(config({"host_gib": 100 * BLOCK_BYTES / GIB}))
        with pytest.raises(ConfigError, match=r"vllm_sparse\.host_gib.*available.*Lower host_gib"):
            startup.check_config(config({"host_gib": 101 * BLOCK_BYTES / GIB}))

    def test_all_ranks_pools_together_must_fit(self):
        halves = config(
            {"host_gib": 51 * BLOCK_BYTES / GIB}, parallel_config__tensor_parallel_size=2
        )
        with pytest.raises(ConfigError, match="on all ranks together"):
            startup.check_config(halves)

    def test_a_slab_too_small_stops_the_start(self):
        """4 rows, 2 heads, 4 blocks, 4 layers of 1 KiB pieces."""
        startup.check_config(config({"slab_gib": 128 * 1024 / GIB}))
        with pytest.raises(ConfigError, match=r"slab_gib.*--max-num-seqs 4 x 2 KV heads x 4 blo"):
            startup.check_config(config({"slab_gib": 127 * 1024 / GIB}))

    def test_wrong_settings_stop_the_start(self):
        with pytest.raises(ConfigError, match="top_k=2"):
            startup.check_config(config({"top_k": 2}))


@pytest.mark.vllm
def test_a_slab_that_the_gpu_cannot_hold_is_refused(monkeypatch):
    pytest.importorskip("vllm")
    from vllm_sparse.backends import sparda_gpu

    geometry = Geometry(2, 65, 2, 64, 128, 2, frames=(64, 130))  # 32 KiB a frame: 6.06 MiB
    options = SpardaSettings(selector="query", staging_blocks=16)  # 2 MiB
    needed = geometry.slab_bytes + 2 * 16 * 2 * geometry.piece_bytes
    for free, fits in ((needed, True), (needed - 1, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, GIB))
        if fits:
            sparda_gpu._check_memory(geometry, options, torch.device("cuda"))
        else:
            with pytest.raises(ConfigError, match=r"slab_gib: 0\.01 GiB of frames"):
                sparda_gpu._check_memory(geometry, options, torch.device("cuda"))
