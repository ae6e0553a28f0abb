# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""SPARDA's GPU path in whole engines on a CPU; interpreted kernels, late copies.

Copies run as late as they may, over memory full of NaN. The runs that they are compared with are
compared with Hugging Face in ``test_sparda``.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from reference import lora, random_models
from support.engine import DENSE, SPARDA_SETTINGS, run_engine
from support.masked_sparda import assert_tokens_of_hugging_face
from vllm_sparse.kernels.types import Rotary

from vllm_sparse.errors import ConfigError
from vllm_sparse.kv.host.geometry import GIB, Geometry
from vllm_sparse.policies.selectors import ForecastSelector
from vllm_sparse.policies.sparda import SpardaSettings

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

NEW_TOKENS = 8
SHARED = {"backend": "sparda", "max_num_seqs": 6, "new_tokens": NEW_TOKENS}


def run_gpu_path(model, prompts, changes, *, v2=True, further=(), **options):
    return run_engine(
        model,
        prompts,
        settings={**SPARDA_SETTINGS, **changes, "kernels": "triton"},
        stand_ins=("flash_attention", *further),
        env={"VLLM_USE_V2_MODEL_RUNNER": "1"} if v2 else {},
        timeout=900,
        **SHARED,
        **options,
    )


@pytest.fixture(scope="module")
def pair(prompts) -> list[list[int]]:
    """316 and 295 tokens, of which the first 100 are the same: programs are interpreted."""
    return [prompts[0][284:], prompts[1][284:579]]


@pytest.fixture(scope="module")
def looks_ahead(llama, pair):
    """The pair on the CPU's path, with the selector of ``SPARDA_SETTINGS``."""
    return run_engine(llama, pair, settings=SPARDA_SETTINGS, **SHARED)


@pytest.mark.parametrize(
    "changes",
    [{"prefetch": False}, {"resident": True, "slab_gib": None}],
    ids=lambda c: next(iter(c)),
)
def test_how_blocks_come_changes_nothing(llama, pair, looks_ahead, changes):
    """With the look-ahead, of which the tests below have the usual way."""
    run = run_gpu_path(llama, pair, changes)
    assert run["tokens"] == looks_ahead["tokens"]
    for moved in ("frame_misses", "device_to_host_bytes"):
        assert (run["counters"][moved] > 0) == ("prefetch" in changes)
    assert (" host pool 0.00 GiB for " in run["log"]) == ("resident" in changes)


# vLLM's compiler up to the machine code, without passes that only GPUs have.
COMPILED = {
    "mode": 3, "backend": "eager", "cudagraph_mode": "NONE", "compile_sizes": [],
    "pass_config": {"fuse_norm_quant": False, "fuse_act_quant": False},
}  # fmt: skip
CASES = {
    # Beside 100 tokens of a request that asks to be dense. Of the last prompt 96 tokens are cached,
    # 95 come with the end of the one before and 101 beside two rows that decode: its last one comes
    # alone, which a graph of single tokens would run.
    "lone-prompt-token-in-graphs": (
        {"selector": "previous"},
        {"max_num_batched_tokens": 103, "further": ("captured_graphs", "profiled_graphs")},
    ),
    "query-v1": ({"selector": "query"}, {"v2": False}),
    "previous-chunked-crossing-dense-len": (
        {"selector": "previous", "dense_len": 320, "slab_gib": 0.02},
        {"max_num_batched_tokens": 200},
    ),
    # Compiled, too: the compiler records for a Forecast, and leaves attention out.
    "sparse-prompts-in-graphs": (
        {"sparse_prefill": True},
        {
            "max_num_batched_tokens": 153, "further": ("captured_graphs", "compiled_in_pieces"),
            "enforce_eager": False, "compilation_config": COMPILED,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_gpu_path_gives_the_cpu_path_s_tokens(llama, prompts, pair, case):
    changes, options = CASES[case]
    dense, prompts, asked = prompts[2][:100], pair, None
    if case == "sparse-prompts-in-graphs":  # whose every token chooses
        prompts = pair[:1]
    if case == "lone-prompt-token-in-graphs":
        prompts = [dense, pair[0], pair[1][:293]]
        asked = [DENSE, None, None]
        stock = run_engine(llama, [dense], new_tokens=NEW_TOKENS)
    settings = {**SPARDA_SETTINGS, **changes}
    run = run_gpu_path(llama, prompts, changes, asked=asked, **options)
    reference = run_engine(llama, prompts, settings=settings, asked=asked, **SHARED)
    if asked:
        assert run["tokens"][0][:1] == stock["tokens"][0]
        assert run["counters"]["dense_fallbacks/requested"] == 1
    assert run["tokens"] == reference["tokens"]
    names = ["decode_rows", "visible_blocks", "selected_blocks", "device_to_host_bytes"]
    assert [run["counters"][k] for k in names] == [reference["counters"][k] for k in names]
    assert run["counters"]["frame_misses"] > 0
    layers = 3
    assert run["pieces"] == (2 * layers + 1 if "compilation_config" in options else 0)
    launches = run["launches"]
    attended = launches["_attend_frames_kernel"]
    looked_up = launches["_look_up_kernel"]
    # In vLLM's two profiling runs every block has a frame in all three layers.
    resident = 2 * layers * ("profiled_graphs" in options.get("further", ()))
    assert looked_up == launches["_fill_kernel"] == attended - resident
    scoring = "_softmax_kernel" if "selector" in changes else "_forecast_kernel"
    assert 0 < launches[scoring] <= launches["_choose_kernel"]
    if "sparse_prefill" not in changes:  # else prompts choose too
        assert launches["_choose_kernel"] <= attended


def test_preempted_and_cached_requests(llama, prompts):
    """A pool of three quarters of what two requests hold; the second wave hits what is left."""
    changes = {"selector": "previous"}
    asked = [prompts[0][250:], prompts[2][:350]]
    run = run_gpu_path(
        llama, asked, changes, num_gpu_blocks_override=18, max_num_batched_tokens=200, waves=2,
        scheduler_reserve_full_isl=False, max_model_len=512,
    )  # fmt: skip
    calm = run_engine(llama, asked, settings={**SPARDA_SETTINGS, **changes}, **SHARED)
    assert run["tokens"] == calm["tokens"] * 2
    assert run["preemptions"] > 0
    assert max(run["cached"][1]) > 0
    assert run["free_blocks"][0] == run["free_blocks"][1]


def test_lora_beside_requests_without_it(llama, pair, tmp_path):
    adapter, merged = lora.save_adapter(llama, tmp_path)
    run = run_gpu_path(
        llama, pair, {"selector": "previous"}, v2=False, adapter=adapter, adapted=[True, False],
        max_loras=2,
    )  # fmt: skip
    settings = {**SPARDA_SETTINGS, "selector": "previous"}
    adapted = run_engine(merged, pair[:1], settings=settings, **SHARED)["tokens"][0][0]
    without = run_engine(llama, pair, settings=settings, **SHARED)["tokens"][0]
    assert run["tokens"][0] == [adapted, without[1]]
    assert adapted != without[0]


def test_experts(tmp_path, pair):
    model = random_models.save_random_model(tmp_path / "moe", "qwen3_moe", layers=2)
    run = run_gpu_path(model, pair[:1], {"slab_gib": 0.01})
    assert_tokens_of_hugging_face(model, pair[:1], run["tokens"][0])


def test_tensor_parallelism(llama, pair, looks_ahead):
    """Each rank has one KV head, its own slab and its own copies."""
    run = run_gpu_path(
        llama, pair[:1], {}, v2=False, tensor_parallel_size=2, in_process=False,
        further=("forked_workers",),
    )  # fmt: skip
    assert "kernels: triton" in run["log"]
    assert "SPARDA has been tested on GPUs' code path with interpreted kernels" in run["log"]
    assert run["tokens"][0] == looks_ahead["tokens"][0][:1]


def test_a_slab_that_the_gpu_cannot_hold_is_refused(monkeypatch):
    from vllm_sparse.backends import sparda_gpu

    geometry = Geometry(2, 65, 2, 64, 128, 2, frames=(64, 130))  # 32 KiB a frame: 6.06 MiB
    options = SpardaSettings(selector="query", staging_blocks=16)  # 2 MiB
    working = 3 << 20
    needed = geometry.slab_bytes + 2 * 16 * 2 * geometry.piece_bytes + working
    for free, fits in ((needed, True), (needed - 1, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, GIB))
        if fits:
            sparda_gpu._check_memory(geometry, options, torch.device("cuda"), working)
        else:
            with pytest.raises(ConfigError, match=r"slab_gib: 0\.01 GiB of frames"):
                sparda_gpu._check_memory(geometry, options, torch.device("cuda"), working)


def test_sparse_prompts_in_blocks_that_no_tile_fits_are_refused():
    from vllm_sparse.backends.sparda_gpu import SpardaGpuBuilder

    settings = SpardaSettings(sparse_prefill=True, block_size=8, kernel_stride=4)
    geometry = Geometry(2, 65, 2, 8, 128, 2, frames=(64, 130))
    with pytest.raises(ConfigError, match="block_size: sparse prompts on a GPU take blocks of at"):
        SpardaGpuBuilder.machine(None, settings, geometry, torch.device("cuda"))


def test_the_start_says_if_projections_take_launches_of_their_own():
    from vllm_sparse.backends.sparda_setup import _turning

    for rotary, kernels, said in (
        (None, "triton, launches of sm_80", True),
        (None, "cpu", False),
        (Rotary(torch.zeros(1, 2), halves=True), "triton, launches of sm_80", False),
    ):
        runtime = SimpleNamespace(
            selector=ForecastSelector([], rotary), kernels=SimpleNamespace(name=kernels)
        )
        assert ("do not know this model's rotary embedding" in _turning(runtime)) == said
