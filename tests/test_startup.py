# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What SPARDA refuses at start-up, and what it makes of vLLM's cache."""

from __future__ import annotations

import copy
from functools import partial
from types import SimpleNamespace

import pytest
from support.configuration import BLOCK_BYTES, configuration, drafter, llama

from vllm_sparse import device_room, startup
from vllm_sparse.errors import ConfigError, UnsupportedError
from vllm_sparse.kv.host.geometry import (
    GIB,
)

config = partial(configuration, "SPARDA")


def test_layers_that_draft_are_served_by_the_models_backend():
    ours = configuration("ROCKETKV", speculative_config=drafter("eagle3"))
    for _ in range(2):
        startup.check_config(ours)
        assert ours.speculative_config.attention_backend is ours.attention_config.backend
    ours.speculative_config.attention_backend = SimpleNamespace(name="CPU_ATTN")
    with pytest.raises(ConfigError, match="attention_backend CPU_ATTN beside ROCKETKV"):
        startup.check_config(ours)
    tokens = configuration("ROCKETKV", speculative_config=SimpleNamespace(method="ngram"))
    startup.check_config(tokens)
    assert not hasattr(tokens.speculative_config, "attention_backend")


# Of four layers, just enough for a step of four requests.
FEW_FRAMES = 128 * 1024 / GIB


def test_weights_are_known_from_files_or_from_the_shape(tmp_path):
    model = llama({}).model_config
    assert device_room.weight_bytes(model) / 2 == pytest.approx(8.03e9, rel=0.001)  # Llama 3.1 8B
    given = SimpleNamespace(
        model_config=model,
        parallel_config=SimpleNamespace(tensor_parallel_size=2, pipeline_parallel_size=1),
        cache_config=SimpleNamespace(gpu_memory_utilization=0.5),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=1000),
    )
    left = device_room.left_bytes(given, 80 << 30)
    working = (4 << 30) + 2000 * (6 * 4096 + 3 * 14336)
    assert left == (40 << 30) - device_room.weight_bytes(model) // 2 - working
    (tmp_path / "model.safetensors").write_bytes(b"x" * 1000)
    (tmp_path / "consolidated.safetensors").write_bytes(b"x" * 1000)  # the same once more
    model.model = str(tmp_path)
    assert device_room.weight_bytes(model) == device_room.least_weight_bytes(model) == 1000


def test_quantised_weights_are_not_taken_for_more_than_they_may_be(tmp_path):
    model = configuration("SPARDA").model_config
    whole = device_room.weight_bytes(model)
    assert device_room.least_weight_bytes(model) == whole
    model.quantization = "quark"  # of any number of bits
    assert device_room.least_weight_bytes(model) == whole // 4
    assert device_room.weight_bytes(model) == whole, "a slab is what surely stays"


class TestGuard:
    @pytest.fixture(autouse=True)
    def _machine(self, monkeypatch):
        monkeypatch.setattr(startup, "available_bytes", lambda: 300 * BLOCK_BYTES)

    @pytest.fixture
    def _small(self, monkeypatch):
        monkeypatch.setattr(startup, "available_bytes", lambda: 100 * BLOCK_BYTES)

    def test_vllm_gets_the_host_pools_size(self):
        accepted = config()
        startup.check_config(accepted)
        assert accepted.cache_config.block_size == 32
        assert accepted.cache_config.user_specified_block_size, "or vLLM would choose again"
        assert accepted.cache_config.num_gpu_blocks_override == 40
        assert accepted.model_config.architecture == "LlamaForCausalLM"

    def test_twice_is_like_once(self):
        accepted = config()
        startup.check_config(accepted)
        once = copy.deepcopy(vars(accepted.cache_config))
        startup.check_config(accepted)
        assert vars(accepted.cache_config) == once

    @pytest.mark.parametrize("device", [None, lambda: GIB])
    def test_memory_that_the_server_has_taken_is_not_missed(self, monkeypatch, device):
        """An engine completes its configuration again when it has started."""
        started = config({"staging_blocks": 16})
        pool, weights = 40 * BLOCK_BYTES, device_room.weight_bytes(started.model_config)
        total = pool + pool // 16 + 2 * 16 * 2 * 1024 + weights + (3 << 16)  # of three requests
        monkeypatch.setattr(startup, "left_bytes", lambda config, total: total)
        monkeypatch.setattr(startup, "available_bytes", lambda: total)
        startup.check_config(started, device)
        seqs = 3 if device is None else 4
        assert started.scheduler_config.max_num_seqs == seqs
        settings, cache = copy.deepcopy((started.additional_config, vars(started.cache_config)))
        for left in (total - pool, 0):
            monkeypatch.setattr(startup, "available_bytes", lambda left=left: left)
            startup.check_config(started, device)
            assert started.scheduler_config.max_num_seqs == seqs
            assert (started.additional_config, vars(started.cache_config)) == (settings, cache)
        started.model_config.use_mla = True
        with pytest.raises(UnsupportedError, match="MLA"):
            startup.check_config(started, device)

    def test_no_more_requests_may_begin_than_run(self, monkeypatch):
        """As many as --max-num-active-seqs begin, and the scheduler ends if they are more."""
        weights = device_room.weight_bytes(config().model_config)
        taken = 40 * BLOCK_BYTES // 16 + 2 * 16 * 2 * 1024  # compressed keys, staging
        # Three requests: on a CPU, each has twice the frames.
        host, device = 40 * BLOCK_BYTES + taken + weights + (3 << 16), taken + (3 << 15)
        monkeypatch.setattr(startup, "available_bytes", lambda: host)
        monkeypatch.setattr(startup, "left_bytes", lambda config, total: total)
        for asked, told in ((None, None), (8, 3), (3, 3), (2, 2)):
            for device_bytes in (None, lambda: device):
                options = {"max_num_seqs": 8, "max_num_active_seqs": asked}
                changes = {f"scheduler_config__{key}": value for key, value in options.items()}
                started = config({"staging_blocks": 16}, **changes)
                startup.check_config(started, device_bytes)
                assert started.scheduler_config.max_num_seqs == 3
                assert started.scheduler_config.max_num_active_seqs == told

    def test_what_others_have_sized_is_sized_again(self):
        """A part of an earlier configuration may be given to another server."""
        first = config()
        startup.check_config(first)
        second = config({"host_gib": 36 * BLOCK_BYTES / GIB})
        second.compilation_config = first.compilation_config
        startup.check_config(second)
        assert second.cache_config.num_gpu_blocks_override == 36

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

    def test_a_name_for_one_kind_of_layers_only_is_refused(self):
        kinds = {"full_attention": SimpleNamespace(name="SPARDA")}
        given = config(attention_config__backend_per_kind=kinds)
        given.attention_config.backend = None
        with pytest.raises(UnsupportedError, match="--attention-backend names it"):
            startup.check_config(given)

    def test_what_is_refused_changes_nothing(self):
        refused = config(model_config__use_mla=True)
        before = copy.deepcopy(vars(refused.cache_config))
        with pytest.raises(UnsupportedError, match="MLA"):
            startup.check_config(refused)
        assert vars(refused.cache_config) == before

    def test_every_reason_is_listed(self):
        with pytest.raises(UnsupportedError, match=r"SPARDA .*speculative.*pipeline.*LoRA"):
            startup.check_config(
                config(
                    {"selector": "lookahead-query"},
                    speculative_config=SimpleNamespace(method="ngram"),
                    lora_config=object(),
                    parallel_config__pipeline_parallel_size=2,
                )
            )

    @pytest.mark.parametrize("selector", ["previous", "query"])
    def test_lora_is_served_where_nothing_sits_beside_its_projections(self, selector):
        startup.check_config(config({"selector": selector}, lora_config=object()))

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

    def test_fp8_halves_the_bytes_of_blocks_but_not_those_of_compressed_keys(self, monkeypatch):
        accepted = config(cache_config__cache_dtype="fp8")
        startup.check_config(accepted)
        assert accepted.cache_config.num_gpu_blocks_override == 80
        monkeypatch.setattr(startup, "left_bytes", lambda config, total: total)
        taken = 80 * (BLOCK_BYTES // 2) // 8 + 2 * 16 * 2 * 512  # compressed keys, staging
        started = config({"staging_blocks": 16}, cache_config__cache_dtype="fp8")
        startup.check_config(started, lambda: taken + 3 * 4 * 4096)
        assert started.scheduler_config.max_num_seqs == 3
        started = config({"staging_blocks": 16}, cache_config__cache_dtype="fp8")
        startup.check_config(started, lambda: taken + 3 * 4 * 4096 - 1)
        assert started.scheduler_config.max_num_seqs == 2

    def test_the_longest_stage_of_a_pipeline_bounds_the_blocks(self, monkeypatch):
        """Three of four layers; but all stages are in the memory of one machine."""
        accepted = config(parallel_config__pipeline_parallel_size=2)
        startup.check_config(accepted)
        assert accepted.cache_config.num_gpu_blocks_override == 40 * 4 // 3
        slab = {"slab_gib": FEW_FRAMES}
        monkeypatch.setattr(startup, "available_bytes", lambda: 53 * BLOCK_BYTES)
        startup.check_config(config(slab, parallel_config__pipeline_parallel_size=2), lambda: GIB)
        monkeypatch.setattr(startup, "available_bytes", lambda: 53 * BLOCK_BYTES - 1)
        with pytest.raises(ConfigError, match="on all ranks"):
            startup.check_config(
                config(slab, parallel_config__pipeline_parallel_size=2), lambda: GIB
            )

    @pytest.mark.parametrize("device", [None, lambda: GIB])
    @pytest.mark.parametrize(
        ("options", "needed"),
        [
            ({"tensor_parallel_size": 2}, 80),
            ({"tensor_parallel_size": 2, "data_parallel_size_local": 2}, 160),
            ({"tensor_parallel_size": 2, "nnodes": 2, "local_world_size": 1}, 40),
            ({"pipeline_parallel_size": 2, "nnodes": 2, "local_world_size": 1}, 53 / 4),
            ({"pipeline_parallel_size": 2, "nnodes": 2, "local_world_size": 1,
              "node_rank_within_dp": 1}, 53 * 3 / 4),
            ({"data_parallel_size_local": 0}, 0),
            ({"data_parallel_size_local": 0, "nnodes": 2}, 0),
            ({"distributed_executor_backend": "ray"}, 0),
            ({"data_parallel_backend": "ray"}, 0),
        ],
    )  # fmt: skip
    def test_what_is_on_other_hosts_is_theirs(self, monkeypatch, options, needed, device):
        """Pools of forty blocks' bytes, 53 blocks of three layers of four; on a CPU, more."""
        settings = {"slab_gib": FEW_FRAMES, "host_gib": 40 * BLOCK_BYTES / GIB}
        options = {"node_rank_within_dp": 0, **options}
        changes = {f"parallel_config__{key}": value for key, value in options.items()}

        def start(available):
            monkeypatch.setattr(startup, "available_bytes", lambda: available)
            startup.check_config(config(settings, **changes), device)

        if not needed:
            start(0)
            return
        with pytest.raises(ConfigError, match=r"together .* but this machine has"):
            start(int(needed * BLOCK_BYTES) - 1)
        start(int(needed * BLOCK_BYTES) if device else 100 * needed * BLOCK_BYTES)

    def test_checkpoints_may_choose_fp8(self):
        """Of compressed-tensors; the layers do so after start-up."""
        quantised = SimpleNamespace(kv_cache_scheme={"num_bits": 8, "type": "float"})
        for kind, blocks in (("auto", 80), ("bfloat16", 40), ("fp8", 80)):
            accepted = config(cache_config__cache_dtype=kind, quant_config=quantised)
            startup.check_config(accepted)
            assert accepted.cache_config.num_gpu_blocks_override == blocks
        weights_only = config(quant_config=SimpleNamespace(kv_cache_scheme=None))
        startup.check_config(weights_only)
        assert weights_only.cache_config.num_gpu_blocks_override == 40

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

    @pytest.mark.parametrize("ranks", [1, 2])
    @pytest.mark.parametrize(
        ("settings", "frames"), [({}, 16), ({"slab_gib": 40 * 4096 / GIB}, 40), ({"dense_len": 32},
         16), ({"resident": True}, 80), ({"resident_first_layer": True}, 16 + 64 / 4)],
    )  # fmt: skip
    @pytest.mark.parametrize("selector", ["query", "previous"])
    def test_a_cpu_s_memory_holds_everything(self, monkeypatch, settings, frames, ranks, selector):
        """One request; frames in blocks of a KV head; the pool alone would fit three times."""
        piece, model = 512 * 2, config().model_config
        given = {
            **{"selector": selector, "staging_blocks": 16, "host_gib": 40 * BLOCK_BYTES / GIB},
            **settings,
        }
        if ranks == 2:
            given["host_gib"] /= 2
            given |= {"slab_gib": given["slab_gib"] / 2} if "slab_gib" in given else {}
        pool = 40 * BLOCK_BYTES
        keys, queries = pool // 16, 40 * 256 * (selector == "previous")
        taken = pool + int(frames * 4 * piece) + keys + queries
        taken += 2 * 16 * 2 * piece + device_room.weight_bytes(model)

        def start(available):
            monkeypatch.setattr(startup, "available_bytes", lambda: available)
            parallel = {"parallel_config__tensor_parallel_size": ranks}
            startup.check_config(config(given, scheduler_config__max_num_seqs=1, **parallel))

        start(taken)
        lower = " or slab_gib or --max" if "slab_gib" in settings else " or top_k, or set slab_gib"
        lower = " or set resident to false" if "resident" in settings else lower
        message = rf"vllm_sparse\.host_gib: .*weights.*frames.*Lower host_gib{lower}"
        with pytest.raises(ConfigError, match=message) as error:
            start(taken - 1)
        assert ("another selector" in str(error.value)) == (selector == "previous")
        assert ("on all ranks" in str(error.value)) == (ranks == 2)

    def test_a_cpu_admits_what_its_memory_holds(self, caplog, monkeypatch):
        """A request takes 64 KiB of frames: twice 4 blocks, of 2 KV heads and 4 layers."""
        started = config({"staging_blocks": 16}, scheduler_config__max_num_seqs=256)
        pool, weights = 40 * BLOCK_BYTES, device_room.weight_bytes(started.model_config)
        taken = pool + pool // 16 + 2 * 16 * 2 * 1024 + weights
        monkeypatch.setattr(startup, "available_bytes", lambda: taken + (4 << 16) - 1)
        with caplog.at_level("INFO", "vllm.sparse.sparda"):
            for _ in range(2):
                startup.check_config(started)
        assert started.scheduler_config.max_num_seqs == 3
        (line,) = (record.getMessage() for record in caplog.records)
        assert "frames for 3 requests at once beside the host pool (--max-num-seqs was 256)" in line
        monkeypatch.setattr(startup, "available_bytes", lambda: taken + (1 << 16) - 1)
        few = config({"staging_blocks": 16}, scheduler_config__max_num_seqs=256)
        with pytest.raises(ConfigError, match=r"frames and compressed keys 0\.00 GiB"):
            startup.check_config(few)

    @pytest.mark.usefixtures("_small")
    def test_a_pool_larger_than_a_gpu_s_host_memory(self):
        def start(blocks, **settings):
            given = {"slab_gib": FEW_FRAMES, **settings, "host_gib": blocks * BLOCK_BYTES / GIB}
            startup.check_config(config(given), lambda: GIB)

        start(100)
        with pytest.raises(ConfigError, match=r"vllm_sparse\.host_gib.*available.*Lower host_gib$"):
            start(101)
        start(101, slab_gib=1.0)  # all have frames, and a GPU's layers then no host blocks

    def test_only_the_first_of_several_api_servers_compares(self, monkeypatch):
        """The others complete the configuration beside engines that hold the memory already."""
        monkeypatch.setattr(startup, "available_bytes", lambda: 0)
        for count, rank, compared in ((1, 0, True), (2, -1, True), (2, 0, False), (2, 1, False)):
            for device_bytes in (None, lambda: GIB):
                parallel = {
                    "parallel_config___api_process_count": count,
                    "parallel_config___api_process_rank": rank,
                }
                given = config({"slab_gib": FEW_FRAMES}, **parallel)
                if compared:
                    with pytest.raises(ConfigError, match=r"0\.00 GiB available"):
                        startup.check_config(given, device_bytes)
                else:
                    startup.check_config(given, device_bytes)
                    assert given.cache_config.num_gpu_blocks_override == 40

    @pytest.mark.usefixtures("_small")
    @pytest.mark.parametrize(("dtype", "query", "fits"), [("auto", 256, 96), ("fp8", 256, 188)])
    def test_queries_that_are_kept_count_where_they_are_pinned(self, dtype, query, fits):
        """One of 4 heads, 4 layers and 8 bfloat16 numbers beside each block, all ranks together."""
        block = BLOCK_BYTES if dtype == "auto" else BLOCK_BYTES // 2
        assert fits * (block + query) <= 100 * BLOCK_BYTES < (fits + 1) * (block + query)
        for ranks in (1, 2):

            def given(blocks, selector="previous", ranks=ranks):
                options = {
                    "selector": selector,
                    "slab_gib": FEW_FRAMES,
                    "host_gib": blocks * block / GIB,
                }
                return config(
                    {**options, "host_gib": options["host_gib"] / ranks},
                    cache_config__cache_dtype=dtype, parallel_config__tensor_parallel_size=ranks,
                )  # fmt: skip

            startup.check_config(given(fits), lambda: GIB)
            message = r"queries that selector=previous keeps .*Lower host_gib or choose another"
            with pytest.raises(ConfigError, match=message):
                startup.check_config(given(fits + 1), lambda: GIB)
            startup.check_config(given(fits + 1, "query"), lambda: GIB)

    def test_staging_larger_than_memory(self):
        with pytest.raises(ConfigError, match=r"staging 8192\.00 GiB.*Lower .*staging_blocks"):
            startup.check_config(config({"staging_blocks": 2**31 - 1}))

    @pytest.mark.usefixtures("_small")
    def test_all_ranks_pools_together_must_fit(self):
        halves = config(
            {"host_gib": 51 * BLOCK_BYTES / GIB, "slab_gib": FEW_FRAMES},
            parallel_config__tensor_parallel_size=2,
        )
        with pytest.raises(ConfigError, match="on all ranks"):
            startup.check_config(halves, lambda: GIB)

    def test_a_slab_too_small_stops_the_start(self):
        """4 rows, 2 heads, 4 blocks, 4 layers of 1 KiB pieces."""
        startup.check_config(config({"slab_gib": 128 * 1024 / GIB}))
        with pytest.raises(ConfigError, match=r"slab_gib.*--max-num-seqs 4 x 2 KV heads x 4 blo"):
            startup.check_config(config({"slab_gib": 127 * 1024 / GIB}))

    def test_on_a_device_the_slab_is_what_the_model_leaves(self, caplog, monkeypatch):
        """Most requests at once follow from it, once; 8 KiB of frames for a request and layer."""
        monkeypatch.setattr(startup, "left_bytes", lambda config, total: total)
        taken = 40 * BLOCK_BYTES // 16 + 2 * 16 * 2 * 1024  # compressed keys, staging
        started = config({"staging_blocks": 16}, scheduler_config__max_num_seqs=256)
        with caplog.at_level("INFO", "vllm.sparse.sparda"):
            for _ in range(2):
                startup.check_config(started, lambda: taken + 3 * 4 * 8192 + 5000)
        assert started.scheduler_config.max_num_seqs == 3
        slab = started.additional_config["vllm_sparse"]["slab_gib"] * GIB
        assert 3 * 4 * 8192 <= slab <= 3 * 4 * 8192 + 5000
        (line,) = (record.getMessage() for record in caplog.records)
        assert line.endswith("serve 3 requests at once (--max-num-seqs was 256)")
        graphs = {"compilation_config__cudagraph_capture_sizes": [1, 2, 4, 8]}
        captured = config({"staging_blocks": 16}, scheduler_config__max_num_seqs=256, **graphs)
        startup.check_config(captured, lambda: taken + 3 * 4 * 8192)
        assert captured.scheduler_config.max_num_seqs == 2  # three would be padded to four
        for settings, seqs in (({"slab_gib": 128 * 1024 / GIB}, 4), ({"resident": True}, 256)):
            given = config(settings, scheduler_config__max_num_seqs=seqs)
            before = copy.deepcopy(given.additional_config)
            startup.check_config(given, lambda: taken)
            assert given.additional_config == before
            assert given.scheduler_config.max_num_seqs == seqs

    def test_a_device_without_room_for_a_request_stops_the_start(self, monkeypatch):
        monkeypatch.setattr(startup, "left_bytes", lambda config, total: -5)
        with pytest.raises(ConfigError, match=r"0\.00 GiB will be left on .* set slab_gib"):
            startup.check_config(config(), lambda: 1)

    def test_wrong_settings_stop_the_start(self):
        with pytest.raises(ConfigError, match="top_k=2"):
            startup.check_config(config({"top_k": 2}))
