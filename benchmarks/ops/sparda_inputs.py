# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Random inputs of the SPARDA kernels: host pools, compressed keys, page tables. Never zeros."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from vllm_sparse.kernels.types import Blocks, PageTable

from vllm_sparse.kv.host.memory import page_aligned

# Pinned memory must outlive its registration, and that is for good.
_PINNED: list[Tensor] = []


@dataclass(frozen=True)
class PagedCase:
    """Sizes of a batch.

    Query heads, KV heads and head size; requests and tokens of the longest one; which blocks are
    read; tokens of a chunk of a prompt; dtype of the cache.
    """

    name: str
    heads: int
    kv_heads: int
    dim: int
    rows: int
    longest: int
    blocks: Blocks
    tokens: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def width(self) -> int:
        """Blocks of the longest request."""
        return -(-self.longest // self.blocks.block_size)

    @property
    def num_blocks(self) -> int:
        """Blocks of the pool, vLLM's null block included."""
        return self.rows * self.width + 1

    @property
    def wanted(self) -> int:
        """Most pieces that a step reads."""
        return self.rows * self.kv_heads * min(self.blocks.top_k, self.width)


class Pool(NamedTuple):
    """Keys and values of one layer.

    Attributes:
        host: Where they are, ``[blocks, G, block_size, 2 * D]``.
        seen: The same memory as the device sees it.
        compressed: Windows, ``[blocks, G, windows per block, D]``.
        table: Physical blocks of each row, int32 ``[R, width]``; the null block beyond its last.
        positions: Of each row's newest token, -1 for padding, int64 ``[R]``.
    """

    host: Tensor
    seen: Tensor
    compressed: Tensor
    table: Tensor
    positions: Tensor

    @property
    def pieces(self) -> Tensor:
        """``[blocks * G, block_size, 2 * D]``, as the device sees them."""
        return self.seen.flatten(0, 1)


def pinned(values: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Moves values to host memory that is pinned, as the engine's is, until the program ends.

    Returns:
        The memory, and the same memory as the device sees it.
    """
    if device.type != "cuda":
        return values, values
    import vllm._custom_ops  # noqa: F401 - loads the operator that is called below
    from vllm.utils.torch_utils import get_accelerator_view_from_cpu_tensor
    from vllm.v1.simple_kv_offload.cuda_mem_ops import pin_tensor

    # As the engine has it: of other memory vLLM may give the device a pinned copy.
    host = page_aligned(tuple(values.shape), values.dtype)
    _PINNED.append(host)
    pin_tensor(host)
    host.copy_(values)
    return host, get_accelerator_view_from_cpu_tensor(host)


def empty_table(pieces: int, frames: int, device: torch.device) -> PageTable:
    """A page table without any piece."""
    return PageTable(
        torch.full((pieces,), -1, dtype=torch.int32, device=device),
        torch.full((frames,), -1, dtype=torch.int64, device=device),
        torch.zeros(frames, dtype=torch.int64, device=device),
        torch.zeros(frames, dtype=torch.bool, device=device),
        torch.zeros(1, dtype=torch.int64, device=device),
    )


def make_pool(case: PagedCase, device: torch.device, generator: torch.Generator) -> Pool:
    """One layer of a batch; whatever a row must not read is NaN, the null block too."""
    size, stride = case.blocks.block_size, case.blocks.kernel_stride
    per_block = size // stride
    positions = torch.randint(
        case.longest // 2, case.longest, (case.rows,), generator=generator, device=device
    )
    positions[1 % case.rows] = size + size // 2
    positions[0], positions[-1] = case.longest - 1, -1
    count = case.num_blocks
    table = torch.randperm(count - 1, generator=generator, device=device) + 1
    table = table.view(case.rows, case.width).int()
    shape = (count, case.kv_heads, size, 2 * case.dim)
    host = torch.randn(shape, generator=generator, device=device).to(case.dtype).cpu()
    compressed = torch.randn(
        (count, case.kv_heads, per_block, case.dim), generator=generator, device=device
    ).to(case.dtype)
    host[0], compressed[0] = torch.nan, torch.nan
    for row, position in enumerate(positions.tolist()):
        used = position // size + 1  # none for padding
        newest = table[row, max(used - 1, 0)]
        host[newest.item(), :, position % size + 1 :] = torch.nan
        slots = torch.arange(case.width * per_block, device=device)
        # Slot n holds the window that ends with token (n + 1) * stride - 1; the first is none.
        incomplete = ((slots + 1) * stride > position + 1) | (slots == 0)
        block = table[row].long()[slots[incomplete] // per_block]
        compressed[block, :, slots[incomplete] % per_block] = torch.nan
        host[table[row, used:].long().cpu()] = torch.nan
        table[row, used:] = 0
    return Pool(*pinned(host, device), compressed, table, positions)


def noise(case: PagedCase, *shape: int, generator: torch.Generator) -> Tensor:
    """Normal values in a case's dtype."""
    values = torch.randn(shape, generator=generator, device=generator.device)
    return values.to(case.dtype)
