# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Policies of small shapes, and random tensors."""

from __future__ import annotations

from typing import Any

import torch

from vllm_sparse.policies.protocol import Policy, Shape
from vllm_sparse.policies.rocketkv import RocketKV


def make_policy(kind: type[Policy] = RocketKV, **changes: Any) -> Policy:
    """A policy with small defaults; changes are settings or parts of the shape."""
    shape: dict[str, Any] = {"head_dim": 16, "group_size": 2, "block_size": 16}
    shape |= {"max_model_len": 2048, "scale": None, "query_slots": 1, "learned_sinks": None}
    settings: dict[str, Any] = {"token_budget": 64, "min_context": 64}
    if kind is RocketKV:
        settings |= {"window": 8, "page_sizes": (4,), "generation_reserve": 32}
    for name, value in changes.items():
        (shape if name in shape else settings)[name] = value
    return kind(kind.Settings(**settings), Shape(**shape))


def tensors(seed: int, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    """Normal random numbers in these shapes."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]
