# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Counters by which the last program to be done knows that it is: zero between launches.

Who finds itself last sets its counter back, so that no launch has to. That takes that launches of
one kernel do not run beside each other on a device.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from torch import Tensor

# Pairs of a row and a KV head in a launch at most.
MOST_PAIRS = 1 << 18


class Counters(NamedTuple):
    """Counters of a device.

    Attributes:
        lookups: Programs that have looked up their pieces, int32 ``[1]``.
        shares: Shares of each row and KV head that are attended to, int32 ``[pairs]``.
    """

    lookups: Tensor
    shares: Tensor


@cache
def counters(device: torch.device) -> Counters:
    """The counters of a device.

    Args:
        device: As tensors name it.
    """
    return Counters(*(torch.zeros(n, dtype=torch.int32, device=device) for n in (1, MOST_PAIRS)))


def prepare(device: torch.device) -> None:
    """Makes a device's counters; call it before a graph is captured, which would not set them."""
    counters(torch.empty(0, device=device).device)
