# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Where the parts of a planned step are."""

from __future__ import annotations

import torch

from vllm_sparse.policies.selectors import Tokens
from vllm_sparse.steps.host_step import DecodeRows, SpardaStep, WindowRows

META = torch.device("meta")


def numbers(device: str) -> torch.Tensor:
    return torch.zeros(3, dtype=torch.int64, device=device)


def test_a_step_of_which_a_part_is_on_the_device_arrives_there_as_a_whole(monkeypatch):
    """Slots follow from the block table, which is there; the rest may have been planned here."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)  # needs a GPU
    tokens = Tokens(numbers("cpu"), numbers("meta"), numbers("cpu"), numbers("meta"))
    decode = DecodeRows(tokens, numbers("cpu"), numbers("meta"), None, True, False)
    windows = WindowRows(numbers("meta"), numbers("cpu"))
    step = SpardaStep(3, numbers("meta"), numbers("cpu"), windows, decode).to(META)
    assert step.decode is not None
    parts = [
        part
        for item in (step, step.windows, step.decode, step.decode.tokens)
        for part in vars(item).values()
        if isinstance(part, torch.Tensor)
    ]
    assert len(parts) == 10
    assert {part.device for part in parts} == {META}
    assert step.to(torch.device("cpu")) is step
