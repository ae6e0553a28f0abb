# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""A random LoRA adapter, and the checkpoint that has it merged into its weights."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from pathlib import Path

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


def save_adapter(model: Path, folder: Path, rank: int = 4, std: float = 0.1) -> tuple[Path, Path]:
    """Write an adapter of a Llama's attention; returns its folder and the merged checkpoint's."""
    adapter, merged = folder / "adapter", folder / "merged"
    adapter.mkdir()
    shutil.copytree(model, merged)
    weights = load_file(model / "model.safetensors")
    generator = torch.Generator().manual_seed(5)
    parts = {}
    for name, weight in weights.items():
        if not name.endswith(tuple(f"self_attn.{target}.weight" for target in TARGETS)):
            continue
        rows, columns = weight.shape
        down = torch.randn(rank, columns, generator=generator) * std
        up = torch.randn(rows, rank, generator=generator) * std
        module = f"base_model.model.{name.removesuffix('.weight')}"
        parts |= {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
        weights[name] = weight + 2 * up @ down
    assert parts
    save_file(parts, adapter / "adapter_model.safetensors")
    save_file(weights, merged / "model.safetensors", metadata={"format": "pt"})
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank,
        "target_modules": list(TARGETS), "bias": "none", "lora_dropout": 0.0,
    }  # fmt: skip
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    return adapter, merged
