# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Tile sizes, warps and grid sizes. A fixed table: no tuning runs at start-up or mid-request."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton


class Launch(NamedTuple):
    """How a kernel is launched.

    Attributes:
        block: Elements of the tiled axis (tokens, pages or candidates) per iteration.
        num_warps: Warps per program.
        num_stages: Software pipeline depth.
    """

    block: int
    num_warps: int
    num_stages: int


# By kernel: head sizes up to 128, and larger ones. Bounded by shared memory (163 KiB on sm_80,
# 227 KiB on sm_90) and registers; not tuned on hardware yet, see docs/kernels.md.
_SM80 = {
    "prompt": (Launch(64, 8, 2), Launch(32, 8, 2)),
    "pool": (Launch(512, 4, 1), Launch(512, 4, 1)),
    "top_indices": (Launch(2048, 8, 1), Launch(2048, 8, 1)),
    "compact": (Launch(16, 4, 1), Launch(16, 8, 1)),
    "score_pages": (Launch(64, 4, 2), Launch(32, 4, 2)),
    "select_slots": (Launch(1024, 4, 1), Launch(1024, 4, 1)),
    "attend": (Launch(64, 4, 2), Launch(32, 4, 2)),
    "score_blocks": (Launch(64, 4, 2), Launch(32, 4, 2)),
    "choose_blocks": (Launch(1024, 4, 1), Launch(1024, 4, 1)),
    "wanted": (Launch(256, 4, 1), Launch(256, 4, 1)),
    "replace": (Launch(2048, 8, 1), Launch(2048, 8, 1)),
    "copy_pieces": (Launch(4096, 8, 1), Launch(4096, 8, 1)),
    "attend_part": (Launch(64, 8, 2), Launch(32, 8, 2)),
    "list_blocks": (Launch(64, 4, 1), Launch(64, 4, 1)),
}
_SM90 = {
    **_SM80,
    "prompt": (Launch(128, 8, 2), Launch(64, 8, 2)),
    "attend": (Launch(64, 4, 3), Launch(64, 4, 2)),
}


@cache
def launch(kernel: str, device: torch.device, head_dim: int = 0) -> Launch:
    """The launch of a kernel on a device; unknown ones use the nearest older architecture.

    Args:
        kernel: A key of the table above.
        device: CPUs (Triton's interpreter) use the sm_80 entry.
        head_dim: D.
    """
    on_gpu = device.type == "cuda"
    table = _SM90 if on_gpu and torch.cuda.get_device_capability(device) >= (9, 0) else _SM80
    return table[kernel][head_dim > 128]


@cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; a few for the interpreter, so that it splits work as well."""
    if device.type != "cuda":
        return 8
    return torch.cuda.get_device_properties(device).multi_processor_count


def splits(programs: int, tiles: int, device: torch.device, most: int = 64) -> int:
    """Into how many programs to split each row's work so that the GPU is full.

    Args:
        programs: Programs without splitting.
        tiles: Tiles that the longest row may have.
        device: Where the kernel runs.
        most: Upper limit.

    Returns:
        A power of two; it depends on shapes only, as a captured graph needs.
    """
    wanted = -(-2 * multiprocessors(device) // max(programs, 1))
    return triton.next_power_of_2(max(1, min(wanted, tiles, most)))


def row_block(rows: int) -> int:
    """Rows of a matrix product's tile: a power of two, at least the 16 that tensor cores need."""
    return max(16, triton.next_power_of_2(rows))


def dim_block(dim: int) -> int:
    """Channels of a tile: the head size rounded up to a power of two."""
    return max(16, triton.next_power_of_2(dim))
