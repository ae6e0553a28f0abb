# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""SparDA's kernels on caches of fp8: each of them against plain numbers that such a cache holds."""

from __future__ import annotations

import pytest
import torch
from support.fp8 import nearest, truncated
from support.kernels import REFERENCE, close, device_of, noise, scattered_table
from vllm_sparse.kernels.fp8 import FP8, Scales
from vllm_sparse.kernels.types import NewWindows, Unframed

# Of no short binary number a multiple, so that no number is just between two.
KEY, VALUE = 0.37, 1.37
SHAPES = [
    # dtype of the model, D, heads per KV head
    (torch.float32, 64, 3),
    (torch.bfloat16, 128, 8),
    (torch.float16, 80, 5),
]


def scales_of(kernels) -> Scales:
    """C++ cuts numbers off, Triton rounds them; the reference does either."""
    return Scales(KEY, VALUE, kernels.name == "cpu")


def rows_of_fp8(*shape, generator, device):
    """Stored rows of keys and values, and the numbers that they stand for."""
    stored = noise(*shape, generator=generator, device=device).to(FP8)
    keys, values = stored.float().chunk(2, -1)
    return stored, torch.cat((keys * KEY, values * VALUE), -1)


@pytest.mark.usefixtures("_splitting")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_over_frames(every, shape):
    (dtype, dim, group), device = shape, device_of(every)
    generator = torch.Generator().manual_seed(dim)
    rows, kv_heads, count, size = 3, 2, 4, 32
    slab, plain = rows_of_fp8(30, size, 2 * dim, generator=generator, device=device)
    host, seen = rows_of_fp8(20, kv_heads, size, 2 * dim, generator=generator, device=device)
    table = scattered_table(rows, 6, generator, device)
    frames = torch.randperm(30, generator=generator)[: rows * kv_heads * count]
    frames = frames.view(rows, kv_heads, count).int().to(device)
    query = noise(
        rows, kv_heads * group, dim, generator=generator, device=device, dtype=dtype
    )  # fmt: skip
    lengths, whole = (
        torch.tensor(part, dtype=torch.int32, device=device)
        for part in ([count * size, 0, size + 3], [0, 5 * size + 1, 0])
    )
    output, expected = torch.empty_like(query), torch.empty_like(query, dtype=torch.float32)
    arguments = frames, lengths, 0.125
    every.attend_frames(
        slab, query, output, *arguments, Unframed(host, table, whole), scales_of(every)
    )
    REFERENCE.attend_frames(
        plain, query.float(), expected, *arguments, Unframed(seen, table, whole)
    )
    close(output, expected.to(dtype), dtype)


@pytest.mark.parametrize("picked", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parts_of_prompts(every, shape, picked):
    """Both scales are the caller's: they are the same for all parts."""
    (dtype, dim, group), device = shape, device_of(every)
    generator = torch.Generator().manual_seed(dim)
    kv_heads, tokens, num_keys, size = 2, 21, 150, 32
    stored, plain = rows_of_fp8(kv_heads, num_keys, 2 * dim, generator=generator, device=device)
    query = noise(
        kv_heads, group, tokens, dim, generator=generator, device=device, dtype=dtype
    )  # fmt: skip
    chosen = None
    if picked:
        chosen = (torch.rand(kv_heads, tokens, 7, generator=generator) < 0.5).to(device)
    options = {"first_position": 40, "block_size": size, "past_from": 160}
    output, lse = every.attend_part(
        query, *stored.split(dim, -1), chosen, 0.11 * KEY, **options
    )  # fmt: skip
    expected, expected_lse = REFERENCE.attend_part(
        query.float(), *plain.split(dim, -1), chosen, 0.11, **options
    )
    close(output * VALUE, expected, dtype)
    close(lse, expected_lse, dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tokens_are_rounded_and_windows_are_means_of_what_is_stored(every, shape):
    (dtype, dim, _), device, scales = shape, device_of(every), scales_of(every)
    generator = torch.Generator().manual_seed(dim)
    kv_heads, size, stride, width = 2, 32, 8, 3
    positions = torch.tensor([2 * stride - 1, size - 1, size + stride - 1, 5, -1])
    rows = len(positions)
    table = scattered_table(rows, width, generator, torch.device("cpu"))
    host, _ = rows_of_fp8(rows * width, kv_heads, size, 2 * dim, generator=generator, device=device)
    slots = torch.full((rows,), -1)
    for row, position in enumerate(positions.tolist()):
        if position >= 0:
            slots[row] = int(table[row, position // size]) * size + position % size
    frame_of = torch.full((rows * width * kv_heads,), -1, dtype=torch.int32)
    newest = int(slots[1]) // size * kv_heads
    frame_of[newest : newest + kv_heads] = torch.arange(kv_heads).int()
    slab = host.flatten(0, 1)[newest : newest + kv_heads].clone()
    key, value = (
        noise(rows, kv_heads, dim, generator=generator, device=device, dtype=dtype) * 90
        for _ in "kv"
    )
    compressed = torch.full(
        (rows * width, kv_heads, size // stride, dim), torch.nan, dtype=dtype, device=device
    )
    windows = NewWindows(compressed, positions.to(device), table.to(device), stride)
    every.write_tokens(
        host, slab, frame_of.to(device), slots.to(device), key, value, windows, scales
    )
    rounded = truncated if scales.truncates else nearest
    for row, position in enumerate(positions.tolist()):
        if position < 0:
            continue
        block, offset = int(slots[row]) // size, int(slots[row]) % size
        for part, scale, half in zip(
            (key, value), scales[:2], host[block, :, offset].split(dim, -1), strict=True
        ):
            expected = rounded(part[row].float(), scale)
            torch.testing.assert_close(half.float() * scale, expected, rtol=1e-6, atol=0)
        if row == 1:
            assert slab[:, offset].view(torch.uint8).equal(host[block, :, offset].view(torch.uint8))
        end = position + 1
        if end % stride or end < 2 * stride:
            continue
        where = torch.arange(end - 2 * stride, end)
        held = host[table[row, where // size].long(), :, where % size, :dim].float() * KEY
        close(compressed[block, :, offset // stride], held.mean(0).to(dtype), dtype)
    done = (~compressed.isnan()).all(-1).sum()
    assert int(done) == 3 * kv_heads
    assert key.abs().max() > 448 * KEY, "some saturate"
