# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What a cache of fp8 makes of numbers, found by looking it up."""

from __future__ import annotations

import pytest
import torch

from support.stand_ins import KEY_SCALE, VALUE_SCALE

# Elsewhere policies refuse it, which tests/test_features.py sees on any machine.
needs_stock_fp8 = pytest.mark.skipif(
    not torch.cpu._is_avx512_supported(), reason="stock vLLM reads fp8 on CPUs with AVX-512 only"
)

EVERY = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


def truncated(numbers: torch.Tensor, scale: float) -> torch.Tensor:
    """The next number towards zero that a cache with such a scale has, as on CPUs."""
    size = numbers.abs() / scale
    place = torch.searchsorted(EVERY, size.contiguous(), right=True) - 1
    return EVERY[place] * numbers.sign() * scale


def nearest(numbers: torch.Tensor, scale: float) -> torch.Tensor:
    """The nearest number of a cache with such a scale, as on GPUs."""
    between = (EVERY[1:] + EVERY[:-1]) / 2
    place = torch.bucketize((numbers.abs() / scale).contiguous(), between)
    return EVERY[place] * numbers.sign() * scale


def stored_on_cpus(key, value):
    """Keys and values with the scales of :func:`.stand_ins.kv_scales`."""
    return truncated(key, KEY_SCALE), truncated(value, VALUE_SCALE)


def stored_on_gpus(key, value):
    """The same as a GPU rounds them."""
    return nearest(key, KEY_SCALE), nearest(value, VALUE_SCALE)
