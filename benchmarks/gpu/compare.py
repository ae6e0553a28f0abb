# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""How far a kernel is from its reference, as a number next to the largest one allowed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Largest ||ours - reference|| / ||reference|| of one kernel.
COMPUTED = {torch.float32: 1e-3, torch.float16: 5e-3, torch.bfloat16: 1e-2}
WRONG = 1e9  # NaN, or not the same where it must be


def error(actual: Tensor, expected: Tensor) -> float:
    """Relative error; `WRONG` if it is not a number."""
    actual, expected = actual.double(), expected.double()
    found = float((actual - expected).norm() / expected.norm())
    return found if math.isfinite(found) else WRONG


def same(a: Tensor, b: Tensor) -> bool:
    """Bit by bit, NaN included."""
    kind = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return torch.equal(a.view(kind), b.view(kind))


def unless(equal: bool) -> float:
    """0 if all is equal, else `WRONG`."""
    return 0.0 if equal else WRONG
