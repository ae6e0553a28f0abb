# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What ``vllm-sparse plan`` says, held to what an engine does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from reference.random_models import save_random_model
from support.engine import BLOCK_SIZE, SETTINGS, run_engine
from support.planner import plan

from vllm_sparse.backends.policy_gpu import _PREFERRED_BLOCK_SIZE
from vllm_sparse.cli import main
from vllm_sparse.planner.devices import DEVICES


def test_a_llama_on_a_gpu(config, capsys):
    status, arms = plan(capsys, config())
    assert status == 0
    assert arms["dense"]["block_bytes"] == 16 * 128 * 1024
    assert arms["ROCKETKV"]["block_bytes"] == 64 * 160 * 1024  # extrema of pages of four
    assert DEVICES["h100"].policy_block_size == _PREFERRED_BLOCK_SIZE
    assert arms["ROCKETKV"]["fits"] > 2 * arms["dense"]["fits"]
    assert arms["SPARDA"]["request_bytes"] < arms["dense"]["request_bytes"]
    assert "--attention-backend SPARDA" in arms["SPARDA"]["serve"]


@pytest.mark.parametrize("key", DEVICES)
def test_a_server_batches_as_many_tokens(monkeypatch, key):
    """By vLLM's own rule, of the device's name and memory."""
    vllm_arguments = pytest.importorskip("vllm.engine.arg_utils")
    from vllm.usage.usage_lib import UsageContext

    device = DEVICES[key]
    platform = SimpleNamespace(
        get_device_total_memory=lambda: int(device.memory_gib * 2**30),
        get_device_name=lambda: f"NVIDIA {device.name}",
        is_tpu=lambda: False, is_cpu=lambda: key == "cpu",
    )  # fmt: skip
    monkeypatch.setattr(vllm_arguments, "current_platform", platform)
    found, _ = vllm_arguments.EngineArgs.get_batch_defaults(1)
    assert device.batched_tokens == found[UsageContext.OPENAI_API_SERVER]


def test_many_query_heads_fit_the_blocks_that_a_gpu_is_given(config, capsys):
    """405 billion parameters' shape: 16 query heads a KV head, too many for blocks of 16."""
    big = {"num_attention_heads": 128, "hidden_size": 16384}
    options = ("--backend", "ROCKETKV", "--tensor-parallel-size", "8", "--kv-memory", "20")
    _, arms = plan(capsys, config(**big), *options)
    assert arms["ROCKETKV"]["refused"] == []
    _, arms = plan(capsys, config(**big), *options, "--block-size", "16")
    assert "--block-size 16 is too small" in arms["ROCKETKV"]["refused"][0]


def test_copies_of_kv_heads_are_planned_as_heads_of_their_own(config, capsys):
    """Whatever a rank holds, weights included, is that of a model with a KV head for each rank."""
    options, settings = ("--tensor-parallel-size", "4"), json.dumps({"selector": "query"})
    for backend in ("ROCKETKV", "SPARDA"):
        given = ("--backend", backend, *(("--settings", settings) if backend == "SPARDA" else ()))
        copied, own = (
            plan(capsys, config(num_key_value_heads=heads), *options, *given)[1] for heads in (2, 4)
        )
        for name in ("dense", backend):
            assert copied[name]["refused"] == []
            for arm in (copied, own):
                del arm[name]["serve"]  # which names the file
            assert copied[name] == own[name]
    status, arms = plan(capsys, config(), "--tensor-parallel-size", "3")
    assert status == 3
    for arm in arms.values():
        assert "8 KV heads cannot be divided among 3 ranks" in arm["refused"][-1]


def test_a_cpu_serves_the_requests_whose_frames_fit_beside_the_pool(config, capsys):
    """Of 512 GiB, pool, compressed keys and weights leave 12; the frames of a request take two."""
    settings = json.dumps({"selector": "query", "host_gib": 470})
    options = ("--context", "32768", "--concurrency", "16", "--settings", settings)
    where = ("--backend", "SPARDA", "--device", "cpu")
    _, arms = plan(capsys, config(), *where, *options)
    assert arms["SPARDA"]["refused"] == []
    assert arms["SPARDA"]["fits"] in (5, 6)


def test_what_is_refused_has_its_own_exit_status(config, capsys):
    status, arms = plan(capsys, config(kv_lora_rank=512))
    assert status == 3
    assert "MLA" in arms["ROCKETKV"]["refused"][0]
    status, arms = plan(capsys, config(), "--backend", "ROCKETKV", "--kv-memory", "1")
    assert status == 4


def test_a_prompt_beyond_the_model_says_what_to_do_which_helps(config, capsys):
    status, arms = plan(capsys, config(max_position_embeddings=40960), "--context", "65536")
    assert status == 3
    for arm in arms.values():
        assert "65536 + 256 tokens are more than the 40960" in arm["refused"][0]
        for word in ("lower --context", "rope_parameters", "max_position_embeddings"):
            assert word in arm["refused"][0]
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    longer = config(max_position_embeddings=131072, rope_parameters=yarn)
    assert plan(capsys, longer, "--context", "65536")[0] == 0
    assert plan(capsys, config(max_position_embeddings=40960), "--context", "40000")[0] == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--settings", "[1]", "--backend", "ROCKETKV"), "expected a mapping of settings, got [1]"),
        (("--settings", "null"), "expected a mapping of settings, got None"),
        (("--block-size", "-16"), "--block-size must be at least 1"),
        (("--context", "0"), "--context must be at least 1"),
    ],
)
def test_wrong_options_are_named(config, capsys, options, said):
    assert main(["plan", config(text_config=None), *options]) == 1
    assert said in capsys.readouterr().err


def test_blocks_that_all_have_frames_take_no_host_memory_of_a_gpu_s(config, capsys):
    for host, pool in ((8, 0), (200, 200 << 30)):
        settings = json.dumps({"host_gib": host})
        _, arms = plan(capsys, config(), "--backend", "SPARDA", "--settings", settings)
        assert arms["SPARDA"]["refused"] == []
        assert arms["SPARDA"]["host_bytes"] == pool
        assert (arms["SPARDA"]["request_host_bytes"] > 0) == bool(pool)


def test_queries_that_a_gpu_pins_are_host_memory(config, capsys):
    """Of 512 GiB, a pool of 500 leaves 12; the queries of its blocks take 15.6."""
    for selector, fits in (("query", True), ("previous", False)):
        settings = json.dumps({"selector": selector, "host_gib": 500})
        _, arms = plan(capsys, config(), "--backend", "SPARDA", "--settings", settings)
        refused = arms["SPARDA"]["refused"]
        assert refused == [] if fits else "selector=previous keeps 15.62 GiB" in refused[0]


def test_what_runs_here_is_said(config, capsys):
    assert main(["plan", config(), "--host-memory", "512"]) == 0
    last = capsys.readouterr().out.split("\n\n")[-1]
    assert "vLLM" in last.splitlines()[0]
    assert any(words in last for words in ("C++", "PyTorch reference", "Triton, launches"))


def test_scripts_are_told_what_runs_here_too(config, capsys):
    assert main(["plan", config(), "--host-memory", "512"]) == 0
    text = capsys.readouterr().out
    assert main(["plan", config(), "--host-memory", "512", "--json"]) == 0
    machine = json.loads(capsys.readouterr().out)["machine"]
    assert f"kernels: {machine['kernels']};" in text
    assert set(machine["versions"]) == {"Python", "vLLM", "torch", "Triton", "transformers"}
    for name, version in machine["versions"].items():
        assert f"{name} {version or 'missing'}" in text
    assert machine["versions"]["torch"] == torch.__version__


def test_it_takes_seconds(config, tmp_path):
    """Of a processor, since others may use it: with vLLM imported five times as many as PyTorch.

    Where others compute on the other half of its core, it is half as fast: each is measured anew.
    """
    script = (
        "import sys; from vllm_sparse.cli import main\n"
        f"status = main(['plan', {config()!r}, '--host-memory', '512'])\n"
        "sys.exit('it imports vLLM' if 'vllm' in sys.modules else status)"
    )

    def seconds_of(code):
        """Its own: those of all children are also those of whoever is waited for meanwhile."""
        with (tmp_path / "out").open("w") as out:
            process = subprocess.Popen([sys.executable, "-c", code], stdout=out, stderr=out)
            _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0, (tmp_path / "out").read_text()
        return used.ru_utime + used.ru_stime

    assert any(3 * seconds_of("import torch") > seconds_of(script) for _ in range(3))
    assert "SPARDA" in (tmp_path / "out").read_text()


@pytest.mark.vllm
def test_blocks_are_those_of_an_engine(tmp_path, capsys):
    pytest.importorskip("vllm")
    folder = save_random_model(tmp_path / "model", head_dim=32)
    prompt = [3 + token % 1000 for token in range(600)]
    ran = run_engine(folder, [prompt], settings=SETTINGS, new_tokens=100, block_size=BLOCK_SIZE)
    # The engine computes in float32, whose blocks take twice as much.
    _, arms = plan(
        capsys, str(folder), "--device", "cpu", "--context", "600", "--output", "424",
        "--kv-memory", str(32 / 1024), "--block-size", str(BLOCK_SIZE), "--backend", "ROCKETKV",
        "--settings", json.dumps(SETTINGS), "--concurrency", "8",
    )  # fmt: skip
    ours = arms["ROCKETKV"]
    assert ours["pool_blocks"] - 1 == pytest.approx(ran["free_blocks"][0], rel=0.02)
    evicted = -(-1024 // BLOCK_SIZE) - ours["request_blocks"]
    assert evicted == ran["counters"]["blocks_evicted"] > 0


def test_nothing_but_windows_is_planned_densely_and_refused_sparsely(config, capsys):
    """Of a request's blocks only those of its window stay; a window may begin within one."""
    status, arms = plan(capsys, config(sliding_window=4096))
    assert status == 3
    assert "every layer has a sliding window of 4096 tokens" in arms["ROCKETKV"]["refused"][0]
    assert any("sliding-window layers" in why for why in arms["SPARDA"]["refused"])
    dense = arms["dense"]
    assert dense["refused"] == []
    assert dense["block_bytes"] == 16 * 128 * 1024
    assert dense["request_blocks"] == dense["prompt_blocks"] == 4096 // 16 + 1
    assert dense["fits"] > 8 * plan(capsys, config())[1]["dense"]["fits"]
    assert "windows of 32 of 32 layers take 257 blocks" in dense["kept"]
    both = ["linear_attention", "sliding_attention"] * 16
    status, arms = plan(capsys, config(layer_types=both, sliding_window=4096))
    assert status == 3
    assert "every layer has a sliding window" in arms["ROCKETKV"]["refused"][0]
    assert arms["dense"]["block_bytes"] == 16 * 64 * 1024


def test_layers_that_keep_nothing_are_no_reason_to_divide_by_zero(config, capsys):
    status, arms = plan(capsys, config(layer_types=["linear_attention"] * 32))
    assert status == 3
    assert all("keeps keys and values" in arm["refused"][-1] for arm in arms.values())
