# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What ``vllm-sparse plan`` reads of a ``config.json``."""

from __future__ import annotations

from support.planner import plan

from vllm_sparse.cli import main
from vllm_sparse.planner.commands import REFUSED


def test_without_a_context_the_prompt_is_what_the_model_takes(config, capsys):
    short = {"max_position_embeddings": 32768}
    status, arms = plan(capsys, config(**short))
    assert status == 0
    assert not any(arm["refused"] for arm in arms.values())
    assert "--max-model-len 32768 " in arms["dense"]["serve"]
    assert "--max-model-len 33024 " in plan(capsys, config())[1]["dense"]["serve"]
    _, arms = plan(capsys, config(max_position_embeddings=0), "--backend", "ROCKETKV")
    assert "--max-model-len 33024 " in arms["dense"]["serve"]  # it does not say
    status, arms = plan(capsys, config(**short), "--context", "32768")
    assert status == REFUSED
    for arm in arms.values():
        assert "32768 + 256 tokens are more than the 32768" in arm["refused"][0]


def test_a_name_that_is_not_downloaded(capsys):
    assert main(["plan", "some/model"]) == 1
    assert "`hf download some/model config.json`" in capsys.readouterr().err


def test_layers_that_keep_a_window_or_a_state_hold_no_tokens(config, capsys):
    """Of 32 layers, 8 keep everything; under Model Runner V2, a GPU's default, too."""
    _, whole = plan(capsys, config())
    kinds = [*["sliding_attention"] * 3, "full_attention"] * 8
    _, windowed = plan(capsys, config(layer_types=kinds, sliding_window=1000))
    for name in ("dense", "ROCKETKV"):
        assert whole[name]["block_bytes"] == 4 * windowed[name]["block_bytes"]
        blocks = 3 * (-(-1000 // (16 if name == "dense" else 64)) + 1)
        assert f"windows of 24 of 32 layers take {blocks} blocks" in windowed[name]["kept"]
        assert windowed[name]["request_blocks"] == whole[name]["request_blocks"] + blocks
        assert windowed[name]["step_ms"] < whole[name]["step_ms"]
    kinds = [*["linear_attention"] * 3, "full_attention"] * 8
    _, states = plan(capsys, config(layer_types=kinds), "--device", "cpu")
    assert states["ROCKETKV"]["block_bytes"] == 128 * 160 * 1024 // 4
    status, states = plan(capsys, config(layer_types=kinds), "--backend", "ROCKETKV")
    assert status == 0
    assert states["ROCKETKV"]["block_bytes"] == 64 * 160 * 1024 // 4


GPT_OSS = {
    "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "hidden_size": 2880,
    "intermediate_size": 2880, "num_hidden_layers": 36, "num_attention_heads": 64,
    "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 201088, "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention"] * 18, "num_local_experts": 128,
    "num_experts_per_tok": 4, "quantization_config": {"quant_method": "mxfp4"},
}  # fmt: skip


def test_gpt_oss_s_sinks_windows_and_packed_experts(config, capsys):
    """120 billion parameters in 61 GiB, beside which an H100 has room."""
    _, arms = plan(capsys, config(**GPT_OSS), "--context", "65536")
    assert arms["ROCKETKV"]["refused"] == []
    assert arms["ROCKETKV"]["block_bytes"] == 18 * 8 * 64 * (2 * 64 + 2 * 64 // 4) * 2
    assert "windows of 18 of 36 layers take 3 blocks" in arms["ROCKETKV"]["kept"]
    assert arms["ROCKETKV"]["fits"] > 2 * arms["dense"]["fits"] > 0
    assert any("sliding-window layers" in why for why in arms["SPARDA"]["refused"])
    _, arms = plan(capsys, config(**GPT_OSS), "--device", "a100", "--backend", "ROCKETKV")
    assert "FlashAttention" in arms["ROCKETKV"]["refused"][0]
