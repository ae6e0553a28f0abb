# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""A tiny model's Forecast under official names, and what no file of one should hold."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from pathlib import Path

LAYERS, HEADS, DIM, HIDDEN = 4, 2, 8, 24
MODEL = (LAYERS, HEADS, DIM, HIDDEN)


def tensors(prefix: str = "model.", layers: int = LAYERS) -> dict[str, torch.Tensor]:
    """Distinct weights under official names, including the last layer's unused one."""
    generator = torch.Generator().manual_seed(0)
    names = [f"layers.{layer}.self_attn.q_future_proj.weight" for layer in range(layers)]
    names.append("layers.0.self_attn.q_curr_proj.weight")
    return {
        prefix + name: torch.randn(HEADS * DIM, HIDDEN, generator=generator).bfloat16()
        for name in names
    }


class Malicious:
    """Writes a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return exec, (f"open({str(self.path)!r}, 'w').close()",)
