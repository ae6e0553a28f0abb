# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Caches of fp8: conversion against vLLM's, kernels against brute force on what they stand for."""

from __future__ import annotations

import pytest
import torch
from reference import rocketkv_bruteforce as brute
from support.fp8 import needs_stock_fp8
from support.kernels import same
from support.pages import SCALES, make_batch
from vllm_sparse.kernels.cpu import attention as cpu_attention
from vllm_sparse.kernels.cpu import decode as fused
from vllm_sparse.kernels.fp8 import FP8, as_numbers, as_slots, encode, readable
from vllm_sparse.kernels.reference import attention, decode

SHAPES = [
    {"kv_heads": 3, "group": 3, "block_size": 128, "longest": 700},
    {"group": 7, "page_size": 2, "dtype": torch.bfloat16},
    {"group": 1, "dim": 80, "page_size": 1},
    {"kv_heads": 1, "group": 16, "dim": 128, "block_size": 64, "dtype": torch.float16},
    {"group": 4, "dim": 40, "block_size": 16, "longest": 90},
]
EVERY = torch.arange(256, dtype=torch.uint8).view(FP8)


def many(dtype=torch.float32) -> torch.Tensor:
    """Numbers of all sizes, those that saturate and those that are lost included."""
    generator = torch.Generator().manual_seed(0)
    shape = (32 * 32 * 64,)
    power = torch.randint(-12, 11, shape, generator=generator).float().exp2()
    numbers = torch.randn(shape, generator=generator) * power
    numbers[:6] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, -1e-9])
    # Just below a subnormal number, where vLLM's kernel rounds before it cuts.
    edge = torch.arange(1, 9).float() * 2.0**-9
    numbers[6:46] = torch.cat([(edge.view(torch.int32) - k).view(torch.float32) for k in range(5)])
    return numbers.to(dtype)


def stock_conversion(numbers: torch.Tensor, scale: float) -> torch.Tensor:
    """What vLLM's CPU kernel makes of them."""
    ops = pytest.importorskip("vllm._custom_ops")
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    tokens = numbers.view(-1, 1, 32)
    pages = torch.zeros(len(tokens) // 32, 1, 64, 32, dtype=torch.uint8)
    keys, values = pages.chunk(2, 2)
    slots = torch.arange(len(tokens))
    ops.cpu_attn_reshape_and_cache(
        tokens, tokens, keys, values, slots, "vec", scale, scale, kv_cache_dtype="fp8"
    )
    return values.reshape(-1)


@needs_stock_fp8
@pytest.mark.vllm
@pytest.mark.parametrize("scale", [1.0, 0.37, 1.7, 2.9, 0.013])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_conversion_is_that_of_vllm_on_a_cpu(dtype, scale):
    numbers = many(dtype)
    expected = stock_conversion(numbers, scale)
    assert torch.equal(encode(numbers, FP8, scale, True).view(torch.uint8), expected)


def test_the_fused_kernel_converts_in_the_same_way():
    """A new token of 64 channels at a time, by the fused step's append."""
    batch = make_batch(rows=1, kv_heads=1, group=1, dim=64, longest=9, fp8=True)
    for part in many().view(-1, 64)[:300]:
        cache = batch.cache.clone()
        key = part.view(1, 1, 64)
        fused.decode_attention(
            cache, batch.query, key, key, torch.empty_like(batch.query), batch.table,
            batch.lengths, batch.lengths, batch.top_r, layout=batch.layout, top_k=8, scale=0.1,
            scales=SCALES,
        )  # fmt: skip
        row = batch.layout.tokens(cache)[batch.table[0, 0], 0, 8]
        for stored, scale in zip(row.split(64), SCALES[:2], strict=True):
            assert same(stored, encode(part, FP8, scale, True))


def test_on_gpus_numbers_are_rounded_to_the_nearest():
    every = EVERY[:127].float()
    numbers = torch.cat((many().nan_to_num(1.0), (every[1:] + every[:-1]) / 2))  # ties too
    size = numbers.abs().clamp(max=448.0)
    above = torch.searchsorted(every, size).clamp(max=126)
    below = (above - 1).clamp(min=0)
    up, down = every[above] - size, size - every[below]
    even = torch.where(above % 2 == 0, above, below)
    nearest = torch.where(up < down, above, torch.where(up > down, below, even))
    assert torch.equal(encode(numbers, FP8, 1.0, False).float().abs(), every[nearest])
    assert torch.equal(encode(3 * many().nan_to_num(1.0), FP8, 3.0, False).float(),
                       encode(many().nan_to_num(1.0), FP8, 1.0, False).float())  # fmt: skip


@pytest.mark.parametrize("truncates", [True, False])
def test_numbers_of_the_cache_come_back_as_they_were(truncates):
    """So extrema are exact, whoever stores them, and compaction loses nothing."""
    finite = EVERY[~EVERY.float().isnan()]
    assert same(encode(readable(finite), FP8, 1.0, truncates), finite)
    assert torch.equal(readable(finite).float(), finite.float())
    assert as_numbers(finite.view(torch.uint8)).dtype == FP8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_queries_that_wait_are_not_rounded(dtype):
    query = torch.randn(3, 2, 16).to(dtype)
    slots = as_slots(query, FP8)
    assert slots.shape[-1] == 16 * dtype.itemsize
    assert torch.equal(slots.view(dtype), query)


def run(kernel, batch, top_k, read_all=False):
    cache, output = batch.cache.clone(), torch.empty_like(batch.query)
    kernel(cache, batch.query, batch.key, batch.value, output, batch.table, batch.lengths,
           batch.lengths, batch.top_r, layout=batch.layout, top_k=top_k, scale=0.11,
           read_all=read_all, scales=SCALES)  # fmt: skip
    return cache, output


@pytest.mark.parametrize("kernel", [decode.decode_attention, fused.decode_attention])
@pytest.mark.parametrize("page_size", [1, 4])
def test_a_step_equals_brute_force_on_what_the_numbers_stand_for(kernel, page_size):
    batch = make_batch(page_size=page_size, longest=120, fp8=True)
    _, output = run(kernel, batch, top_k=32)
    for row, past in enumerate(batch.history):
        newest = [
            encode(part[row], FP8, scale, True)
            for part, scale in ((batch.key, SCALES.key), (batch.value, SCALES.value))
        ]
        held = torch.cat((past, torch.cat(newest, -1).unsqueeze(1)), 1).float()
        keys, values = held.chunk(2, -1)
        keys, values = keys * SCALES.key, values * SCALES.value
        low, high = brute.page_extrema(keys, page_size)
        chosen = brute.select_decode_tokens(
            batch.query[row],
            low,
            high,
            held.shape[1],
            page_size,
            int(batch.top_r[row]),
            32,
            scale=0.11,
        )
        expected = brute.attend(batch.query[row], keys, values, torch.tensor(chosen), 0.11)
        torch.testing.assert_close(output[row], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(f"{k}{v}" for k, v in s.items()))
@pytest.mark.parametrize(("top_k", "read_all"), [(37, False), (5000, False), (8, True)])
def test_fused_kernel_equals_reference(shape, top_k, read_all):
    batch = make_batch(**shape, fp8=True)
    expected_cache, expected = run(decode.decode_attention, batch, top_k, read_all)
    cache, output = run(fused.decode_attention, batch, top_k, read_all)
    tolerance = 2e-5 if batch.query.dtype == torch.float32 else 4e-3
    torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance)
    assert same(cache, expected_cache)


@pytest.mark.parametrize("shape", SHAPES[:2])
@pytest.mark.parametrize("every_token", [False, True])
def test_fused_attention_over_slots_equals_reference(shape, every_token):
    batch = make_batch(**shape, fp8=True)
    cache, _ = run(decode.decode_attention, batch, 37)
    first = batch.table[:, :1, None] * batch.layout.block_size
    slots = (first + torch.arange(16)).expand(-1, cache.shape[1], -1).int().contiguous()
    outputs = []
    for kernel in (attention.attend_slots, cpu_attention.attend_slots):
        outputs.append(torch.empty_like(batch.query))
        kernel(cache, batch.query, outputs[-1], None if every_token else slots, batch.table,
               batch.lengths, batch.top_r, layout=batch.layout, top_k=16, scale=0.11,
               scales=SCALES)  # fmt: skip
    tolerance = 2e-5 if batch.query.dtype == torch.float32 else 4e-3
    torch.testing.assert_close(outputs[1], outputs[0], rtol=tolerance, atol=tolerance)
