# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""How large SPARDA's pool is where nobody says."""

from __future__ import annotations

import pytest
from support.configuration import llama

from vllm_sparse import startup
from vllm_sparse.errors import ConfigError
from vllm_sparse.kv.host.geometry import GIB

BLOCK = 8 << 20  # of Llama 3.1 8B


@pytest.mark.parametrize("on_gpu", [False, True])
def test_without_host_gib_one_request_fits_if_half_of_what_is_free_is_enough(
    monkeypatch, caplog, on_gpu
):
    """Llama 3.1 8B's shape: 2,049 blocks of 8 MiB, and its weights on a CPU."""
    needed = 2049 * BLOCK
    for free, told, parallel in (
        (64 * GIB, 16.01, {}),
        (64 * GIB, 8.01, {"tensor_parallel_size": 2}),
        (2 * needed - 1, None, {}),
        (0, 16.01, {"_api_process_count": 2, "_api_process_rank": 0}),
    ):
        changes = {f"parallel_config__{key}": value for key, value in parallel.items()}
        given = llama({}, **changes)
        ranks = parallel.get("tensor_parallel_size", 1)
        # Too small for as many frames.
        device = (lambda small=(24, 16)[ranks - 1] * GIB: small) if on_gpu else None
        monkeypatch.setattr(startup, "available_bytes", lambda free=free: free)
        caplog.clear()
        if told is None:
            message = r"4\.0 GiB hold 512 blocks .* needs 2049.*at least 16\.01"
            with pytest.raises(ConfigError, match=message):
                startup.check_config(given, device)
            continue
        with caplog.at_level("INFO", "vllm.sparse.sparda"):
            for _ in range(2):
                startup.check_config(given, device)
        assert given.cache_config.num_gpu_blocks_override == int(told * GIB) // (BLOCK // ranks)
        assert given.additional_config["vllm_sparse"]["host_gib"] == told
        said = [record.getMessage() for record in caplog.records]
        assert sum(f"{told:.2f} GiB of host memory per rank" in line for line in said) == 1


def test_host_gib_that_is_set_stays(monkeypatch):
    """Four GiB are 32,768 tokens, but not the null block."""
    monkeypatch.setattr(startup, "available_bytes", lambda: 64 * GIB)
    short = llama({"host_gib": 4.0}, model_config__max_model_len=32768)
    with pytest.raises(ConfigError, match=r"4\.0 GiB hold 512 blocks .* needs 513"):
        startup.check_config(short)


def sized(monkeypatch, device_gib, free_gib, settings=None, **changes):
    """Configuration of a server on such a device."""
    monkeypatch.setattr(startup, "available_bytes", lambda: free_gib * GIB)
    given = llama(settings or {}, **changes)
    for _ in range(2):
        startup.check_config(given, lambda: device_gib * GIB)
    return given


def test_a_large_device_is_filled_and_nothing_is_offloaded(monkeypatch, caplog):
    """Of an H200, 131,072 tokens of 16 GiB each leave more than a hundred GiB to others."""
    with caplog.at_level("INFO", "vllm.sparse.sparda"):
        # Less host memory than frames: half of it holds one query of each block only.
        given = sized(monkeypatch, 139, 8)
    blocks = given.cache_config.num_gpu_blocks_override
    settings = given.additional_config["vllm_sparse"]
    assert settings["slab_gib"] * GIB == blocks * BLOCK, "every block has a frame"
    assert given.scheduler_config.max_num_seqs == 128
    # Weights 16.06 GB, 4.26 GiB to compute with; a block's compressed keys are 1/32 of it.
    left = 139 * 0.92 - 8.03e9 * 2 / GIB - 4.26
    assert blocks * BLOCK / GIB == pytest.approx(left / (1 + 1 / 32), rel=2e-3)
    said = [record.getMessage() for record in caplog.records]
    assert sum("this device holds them" in line for line in said) == 1


def test_the_pool_of_a_large_device_is_a_rank_s(monkeypatch):
    given = sized(monkeypatch, 139, 16, parallel_config__tensor_parallel_size=2)
    blocks = given.cache_config.num_gpu_blocks_override
    left = 139 * 0.92 - 8.03e9 / GIB - 4.26
    assert blocks * BLOCK / 2 / GIB == pytest.approx(left / (1 + 1 / 32), rel=2e-3)


def test_keeping_everything_on_the_device_fills_it_too(monkeypatch):
    given, offloaded = (
        sized(monkeypatch, 139, 64, settings) for settings in ({"resident": True}, {})
    )
    blocks = [each.cache_config.num_gpu_blocks_override for each in (given, offloaded)]
    assert blocks[0] == blocks[1] > 12000


def test_a_slab_that_is_set_says_what_the_device_holds(monkeypatch):
    given = sized(monkeypatch, 139, 64, {"slab_gib": 20.0}, model_config__max_model_len=8192)
    assert given.cache_config.num_gpu_blocks_override == 512, "the default of 4 GiB"


@pytest.mark.parametrize(
    ("kv_heads", "free", "blocks"),
    [
        (2, 12, 24576),  # 256 KiB of queries a block, as many as 6 GiB hold
        (8, 2, 4096),
        (8, 0.25, 512),  # the default of 4 GiB, whose queries are 128 MiB
    ],
)
def test_half_of_host_memory_holds_the_queries_of_the_default_selector(
    monkeypatch, caplog, kv_heads, free, blocks
):
    """Blocks that all have frames take no host memory, but a query of each is kept there."""
    monkeypatch.setattr(startup, "available_bytes", lambda: int(free * GIB))
    given = llama({}, model_config__max_model_len=8192)
    given.model_config.kv_heads = kv_heads
    with caplog.at_level("INFO", "vllm.sparse.sparda"):
        startup.check_config(given, lambda: 139 * GIB)
    assert given.cache_config.num_gpu_blocks_override == blocks
    said = [record.getMessage() for record in caplog.records]
    assert sum("half of what is free holds the queries" in line for line in said) == (blocks > 512)


def test_one_request_is_held_though_its_queries_take_more_than_half(monkeypatch):
    given = llama({})
    # Of 2,049 blocks: 512 MiB.
    monkeypatch.setattr(startup, "available_bytes", lambda: 520 << 20)
    startup.check_config(given, lambda: 139 * GIB)
    assert given.cache_config.num_gpu_blocks_override == 2049


def test_other_selectors_and_hosts_that_are_not_told_do_not_bound_the_pool(monkeypatch):
    full = sized(monkeypatch, 139, 64).cache_config.num_gpu_blocks_override
    monkeypatch.setattr(startup, "available_bytes", lambda: GIB)
    others = {"_api_process_count": 2, "_api_process_rank": 0}
    changes = {f"parallel_config__{key}": value for key, value in others.items()}
    for given in (llama({"selector": "query"}), llama({}, **changes)):
        startup.check_config(given, lambda: 139 * GIB)
        assert given.cache_config.num_gpu_blocks_override == full
