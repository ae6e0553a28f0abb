# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Caches of 8-bit floats (e4m3): what their numbers stand for, and how numbers become such.

An e4m3 number is exact in bfloat16, float16 and float32, so that reading loses nothing; and a
page's extrema are numbers of the cache, so that storing them loses nothing either.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
"""The dtype in question; vLLM allocates such caches as bytes."""

# Largest e4m3 number, and the smallest one with a full mantissa.
_LARGEST = 448.0
_NORMAL = 2.0**-6
# Of a float32's bits, sign, exponent and three digits.
_KEPT = -1 << 20


class Scales(NamedTuple):
    """What the numbers of an fp8 cache are multiplied with; 1 in other caches.

    Attributes:
        key: For keys.
        value: For values.
        truncates: New numbers are cut off towards zero, as vLLM does on CPUs; else they are rounded
            to the nearest, as it does on GPUs. Both saturate.
    """

    key: float = 1.0
    value: float = 1.0
    truncates: bool = False


UNSCALED = Scales()


def as_numbers(cache: Tensor) -> Tensor:
    """A view of a cache that vLLM allocated as bytes; others as they are."""
    return cache.view(FP8) if cache.dtype == torch.uint8 else cache


def readable(stored: Tensor) -> Tensor:
    """The same numbers in a dtype that PyTorch computes with."""
    return stored.to(torch.bfloat16) if stored.dtype == FP8 else stored


def encode(numbers: Tensor, dtype: torch.dtype, scale: float, truncates: bool) -> Tensor:
    """Numbers as a cache of ``dtype`` stores them.

    Args:
        numbers: Of any shape.
        dtype: Of the cache.
        scale: What stored numbers are multiplied with.
        truncates: See :class:`Scales`.

    Returns:
        The same shape in ``dtype``.
    """
    if dtype != FP8:
        return numbers.to(dtype)
    if not truncates:
        return (numbers.float() / scale).clamp(-_LARGEST, _LARGEST).to(dtype)
    number = numbers.float() * torch.tensor(scale).reciprocal().to(numbers.device)
    # NaN becomes the largest number, as in vLLM's kernels.
    size = number.abs().nan_to_num_(_LARGEST).clamp_(max=_LARGEST)
    # A sum with the smallest normal number puts the digits of a subnormal one in their place; it is
    # rounded as theirs is.
    shift = (size < _NORMAL).float().mul_(_NORMAL)
    size.add_(shift).view(torch.int32).bitwise_and_(_KEPT)
    size.sub_(shift)
    return torch.where(number < 0, -size, size).to(dtype)


def as_slots(queries: Tensor, dtype: torch.dtype) -> Tensor:
    """Queries as they wait in a cache: rounded to its dtype, or spread over slots of fp8.

    Args:
        queries: ``[..., D]``.
        dtype: Of the cache.

    Returns:
        ``[..., D * slots of a number]`` in ``dtype``.
    """
    return queries.contiguous().view(dtype) if dtype == FP8 else queries.to(dtype)
