# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Where the tensors of a plan are, with a device on which nobody can read anything back."""

from __future__ import annotations

import dataclasses
import sys
from typing import TYPE_CHECKING, Any

import torch

from vllm_sparse.upload import upload

if TYPE_CHECKING:
    from collections.abc import Iterator

META = torch.device("meta")


def tensors_of(item: Any, name: str = "step") -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that something consists of, with the names that lead to them."""
    if isinstance(item, torch.Tensor):
        yield name, item
    elif dataclasses.is_dataclass(item):
        for field in dataclasses.fields(item):
            yield from tensors_of(getattr(item, field.name), f"{name}.{field.name}")
    elif isinstance(item, list | tuple):
        names = getattr(item, "_fields", range(len(item)))
        for part, field in zip(item, names, strict=True):
            yield from tensors_of(part, f"{name}.{field}")


def elsewhere(item: Any, device: torch.device = META) -> list[str]:
    """Names of the tensors that are not on a device; ``..._cpu`` are to stay on the host."""
    found = [(name, x.device) for name, x in tensors_of(item) if "_cpu" not in name]
    return [name for name, place in found if place != device]


def upload_to_meta(monkeypatch: Any) -> None:
    """Let the host hand tensors to the device ``meta``, for which no memory is to be pinned."""
    for path, module in list(sys.modules.items()):
        if path.startswith("vllm_sparse.") and vars(module).get("upload") is upload:
            monkeypatch.setattr(module, "upload", _hand_over)


def _hand_over(
    tensor: torch.Tensor, device: torch.device, dtype: torch.dtype | None = None
) -> torch.Tensor:
    return tensor.to(device, dtype)
