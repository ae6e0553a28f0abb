# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What tests of kernels share: devices, implementations, poisoned inputs, tolerances."""

from __future__ import annotations

import torch
from vllm_sparse.kernels.dispatch import SpardaKernels, sparda_kernels
from vllm_sparse.kernels.fp8 import readable

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

FAR = 1 << 30  # outside anything
FLOATS = [torch.float32, torch.float16, torch.bfloat16]

REFERENCE = sparda_kernels(DEVICE, "reference")


def sparda(name: str) -> SpardaKernels:
    """The kernels called ``reference``, ``cpu`` (in C++) or ``triton``."""
    found = sparda_kernels(torch.device("cpu") if name == "cpu" else DEVICE, name)
    assert found.name.startswith(name), "there is a compiler, and a GPU or the interpreter"
    return found


def device_of(kernels: SpardaKernels) -> torch.device:
    """Where to test them."""
    return torch.device("cpu") if kernels.name == "cpu" else DEVICE


def use_tile(monkeypatch, kernel: str, block: int) -> None:
    """Let a kernel work in tiles of so many entries."""
    from vllm_sparse.kernels.triton import launch

    given = tuple(pair._replace(block=block, num_warps=1) for pair in launch._SM80[kernel])
    monkeypatch.setitem(launch._SM80, kernel, given)


def with_gaps(tensor: torch.Tensor, axes: int) -> torch.Tensor:
    """The same values with NaN between the entries of the first axes."""
    shape = [size + 1 if axis < axes else size for axis, size in enumerate(tensor.shape)]
    out = torch.full(shape, torch.nan, dtype=tensor.dtype, device=tensor.device)
    out = out[tuple(slice(0, size) for size in tensor.shape)]
    return out.copy_(tensor)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    a, b = (readable(part).nan_to_num(7) for part in (a, b))
    return torch.equal(a, b)


def close(actual, expected, dtype):
    tolerance = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def scattered_table(
    rows: int, width: int, generator: torch.Generator, device: torch.device
) -> torch.Tensor:
    """Blocks of each row, int32, in rows that are further apart than they are wide."""
    wide = torch.full((rows, width + 3), FAR, dtype=torch.int32)
    wide[:, :width] = torch.randperm(rows * width, generator=generator).view(rows, width)
    return wide.to(device)[:, :width]


def noise(*shape, generator, device, dtype=torch.float32, whole=False):
    """Random values; whole numbers add up to the same in any order."""
    if whole:
        return torch.randint(-2, 3, shape, generator=generator).to(device, dtype)
    return torch.randn(shape, generator=generator).to(device, dtype)
