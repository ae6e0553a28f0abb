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
    _, windowed = plan(
        capsys, config(layer_types=[*["sliding_attention"] * 3, "full_attention"] * 8)
    )
    for name in ("dense", "ROCKETKV"):
        assert whole[name]["block_bytes"] == 4 * windowed[name]["block_bytes"]
        assert "24 of 32 layers come on top" in windowed[name]["kept"]
        assert windowed[name]["step_ms"] < whole[name]["step_ms"]
    kinds = [*["linear_attention"] * 3, "full_attention"] * 8
    _, states = plan(capsys, config(layer_types=kinds), "--device", "cpu")
    assert states["ROCKETKV"]["block_bytes"] == 128 * 160 * 1024 // 4
    status, states = plan(capsys, config(layer_types=kinds), "--backend", "ROCKETKV")
    assert status == 0
    assert states["ROCKETKV"]["block_bytes"] == 64 * 160 * 1024 // 4
