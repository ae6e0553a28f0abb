# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What a step stores: every implementation against the reference."""

from __future__ import annotations

import pytest
import torch
from support.kernels import (
    FAR,
    FLOATS,
    REFERENCE,
    close,
    device_of,
    noise,
    same,
    scattered_table,
    sparda,
    with_gaps,
)
from vllm_sparse.kernels.reference.sparda_tokens import mean_of_windows
from vllm_sparse.kernels.types import NewQueries, NewWindows


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("block_size", "dim"), [(16, 64), (64, 80), (128, 128), (32, 256)])
def test_written_tokens_equal_reference(ours, dtype, block_size, dim):
    device = device_of(ours)
    generator = torch.Generator().manual_seed(dim)
    kv_heads, blocks, frames = 3, 5, 6
    rows = noise(6, kv_heads, 2 * dim, generator=generator, device=device, dtype=dtype)
    fused = torch.cat((rows, rows), 1)  # vLLM hands over slices of one fused row
    key, value = fused[:, :kv_heads, :dim], fused[:, kv_heads:, dim:]
    slots = torch.tensor([0, 5 * block_size - 1, -1, 2 * block_size + 7, -1, 3 * block_size])
    frame_of = torch.full((blocks * kv_heads,), -1, dtype=torch.int32)
    frame_of[[0, 2, 7, 13]] = torch.tensor([3, 0, 5, 1], dtype=torch.int32)
    frame_of[9] = -(2**31) + 3  # a claim that the page table holds while it looks up
    results = []
    for kernels in (ours, REFERENCE):
        host, slab = (
            torch.full(shape, torch.nan, dtype=dtype, device=device)
            for shape in (
                (blocks, kv_heads, block_size, 2 * dim), (frames, block_size, 2 * dim)
            )
        )  # fmt: skip
        kernels.write_tokens(
            host, slab, frame_of.to(device), slots.to(device), key.to(dtype), value.to(dtype)
        )
        results.append((host, slab))
    for mine, theirs in zip(*results, strict=True):
        assert same(mine, theirs)
    assert (~results[0][0].isnan()).sum() == 4 * kv_heads * 2 * dim
    assert (~results[0][1].isnan()).sum() == 4 * 2 * dim
    ours.write_tokens(host, slab, frame_of.to(device), slots[:0].to(device), key[:0], value[:0])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("block_size", "dim", "stride"), [(16, 64, 8), (64, 80, 16), (128, 128, 16), (32, 256, 16)]
)
def test_windows_equal_reference(ours, dtype, block_size, dim, stride):
    """Half of the pieces have a frame, and may not be read from the host; nor may the new token."""
    device = device_of(ours)
    generator = torch.Generator().manual_seed(dim)
    kv_heads, width = 2, 4
    positions = torch.tensor([
        -1, stride - 1, 2 * stride - 1, 2 * stride, block_size - 1,
        block_size + stride - 1, 2 * block_size + 2 * stride - 1, 4 * block_size - 1, 31, 32,
    ])  # fmt: skip
    rows = len(positions)
    table = scattered_table(rows, width, generator, device)
    source = noise(
        rows * width, kv_heads, block_size, 2 * dim, generator=generator, device=device, dtype=dtype
    )
    slots = torch.full((rows,), -1)
    for row, position in enumerate(positions.tolist()):
        table[row, max(position // block_size + 1, 0) :] = FAR
        if position >= 0:
            newest = int(table[row, position // block_size])
            source[newest, :, position % block_size :] = torch.nan
            slots[row] = newest * block_size + position % block_size
    pieces = source.flatten(0, 1)
    held = torch.randperm(len(pieces), generator=generator)[: len(pieces) // 2]
    frame_of = torch.randint(-(2**31), 0, (len(pieces),), generator=generator).int()
    frame_of[held] = torch.arange(len(held)).int()
    slab = pieces[held.to(device)]
    pieces[held.to(device)] = torch.nan
    key, value = (
        noise(rows, kv_heads, dim, generator=generator, device=device, dtype=dtype) for _ in "kv"
    )
    results = []
    for kernels in (ours, REFERENCE):
        compressed = torch.full(
            (rows * width, kv_heads, block_size // stride, dim), torch.nan, dtype=dtype,
            device=device,
        )  # fmt: skip
        compressed = with_gaps(compressed, 3)
        written = source.clone(), slab.clone(), frame_of.to(device)
        windows = NewWindows(compressed, positions.to(device), table, stride)
        kernels.write_tokens(*written, slots.to(device), key, value, windows)
        results.append((compressed, *written[:2]))
    (mine, *ours_written), (theirs, *expected) = results
    assert mine.isnan().equal(theirs.isnan())
    complete = (positions + 1 >= 2 * stride) & ((positions + 1) % stride == 0)
    assert (~mine.isnan()).sum() == int(complete.sum()) * kv_heads * dim
    close(mine.nan_to_num(7), theirs.nan_to_num(7), dtype)
    assert all(same(*pair) for pair in zip(ours_written, expected, strict=True))
    none = (x[:0].to(device) for x in (slots, key, value, positions, table))
    slots, key, value, *rest = none
    ours.write_tokens(*written, slots, key, value, NewWindows(compressed, *rest, stride))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("heads", "dim"), [(3, 64), (12, 80), (8, 256)])
def test_recorded_queries_equal_reference(ours, dtype, heads, dim):
    device = device_of(ours)
    generator = torch.Generator().manual_seed(dim)
    fused = noise(7, 2 * heads, dim, generator=generator, device=device, dtype=dtype)
    query = fused[:, heads - 1 : -1]  # vLLM hands over slices of one fused row
    slots = torch.tensor([5 * 32 + 31, 2 * 32, -1, 3 * 32 + 8, 3 * 32 + 9, -1, 0], device=device)
    last = torch.tensor([4, 6, 2, 0, 5], device=device)  # neither 3 nor 1
    results = []
    for kernels in (ours, REFERENCE):
        kept = torch.full((6, heads, dim), torch.nan, dtype=dtype, device=device)
        kernels.record_queries(kept, query, slots, last, 32)
        kernels.record_queries(kept, query, slots, last[:0], 32)
        results.append(kept)
    assert same(*results)
    assert (~results[0].isnan()).any((1, 2)).tolist() == [True, False, False, True, False, True]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("group", "dim"), [(1, 64), (7, 80), (4, 256)])
def test_queries_are_kept_with_the_tokens(every, dtype, group, dim):
    """Under each token's block and, where asked, by row; nothing else changes."""
    device, kv_heads, size = device_of(every), 2, 32
    heads = kv_heads * group
    generator = torch.Generator().manual_seed(dim)
    fused = noise(
        4, heads + 2 * kv_heads, dim, generator=generator, device=device, dtype=dtype
    )  # vLLM hands over slices of one fused row
    query, key, value = fused.split([heads, kv_heads, kv_heads], 1)
    slots = torch.tensor([5 * size + 31, -1, 3 * size + 8, 0], device=device)
    frame_of = torch.full((6 * kv_heads,), -1, dtype=torch.int32, device=device)
    frame_of[3 * kv_heads] = 1
    blank = torch.full((6, kv_heads, size, 2 * dim), torch.nan, dtype=dtype, device=device)
    frames = blank.flatten(0, 1)[:2]
    plain = blank.clone(), frames.clone()
    every.write_tokens(*plain, frame_of, slots, key, value)
    for keeps_twice in (False, True):
        kept = torch.full((6, heads, dim), torch.nan, dtype=dtype, device=device)
        recent = torch.full((7, heads, dim), torch.nan, dtype=dtype, device=device)
        expected, rows = kept.clone(), recent.clone()
        expected[[5, 3, 0]] = query[[0, 2, 3]]
        rows[[0, 2, 3]] = query[[0, 2, 3]]
        written = blank.clone(), frames.clone()
        queries = NewQueries(kept, query, recent if keeps_twice else None)
        every.write_tokens(*written, frame_of, slots, key, value, queries=queries)
        assert same(kept, expected)
        assert same(recent, rows) if keeps_twice else bool(recent.isnan().all())
        assert all(same(*pair) for pair in zip(written, plain, strict=True))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("heads", "dim"), [(3, 64), (12, 80), (8, 256)])
def test_recalled_queries_equal_reference(every, dtype, heads, dim):
    """Neither those that are recent are read from the host, nor the others from what is recent."""
    device = device_of(every)
    generator = torch.Generator().manual_seed(dim)
    kept, recent = (
        noise(2, n, heads, dim, generator=generator, device=device, dtype=dtype) for n in (6, 7)
    )
    places = torch.tensor([2, -1, 0, -1, 3], device=device)
    blocks = torch.tensor([5, 4, 3, 0, 1], device=device)
    expected = torch.full_like(recent, torch.nan)
    expected[:, [0, 2, 4]], expected[:, [1, 3]] = recent[:, [2, 0, 3]], kept[:, [4, 0]]
    kept[:, [5, 3, 1, 2]] = torch.nan
    recent[:, [1, 4, 5, 6]] = torch.nan
    found = torch.full_like(recent, torch.nan)
    every.recall_queries(kept, recent, places, blocks, found)
    assert same(found, expected)
    every.recall_queries(kept, recent, places[:0], blocks[:0], found)
    assert same(found, expected)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("block_size", "stride"), [(64, 16), (16, 2), (64, 32), (48, 12)])
def test_windows_in_c_are_those_of_prompts_to_the_last_bit(dtype, block_size, stride):
    """Prompts add up in PyTorch; a replayed request must find the windows that it had."""
    generator, dim = torch.Generator().manual_seed(stride), 40
    source = torch.randn(3, 2, block_size, 2 * dim, generator=generator).to(dtype)
    table = torch.tensor([[2, 0]], dtype=torch.int32)
    compressed = torch.zeros(3, 2, block_size // stride, dim, dtype=dtype)
    no_frames = torch.full((6,), -1, dtype=torch.int32)
    rows = source[[2, 0], :, :, :dim].transpose(1, 2).flatten(0, 1)  # [token, head, dim]
    for end in range(2 * stride, 2 * block_size + 1, stride):
        last = end - 1
        block, slot = (2, 0)[last // block_size], torch.tensor([last % block_size])
        newest = source[block, :, last % block_size].split(dim, -1)
        sparda("cpu").write_tokens(
            source, source[:0, 0], no_frames, block * block_size + slot,
            *(part[None].contiguous() for part in newest),
            NewWindows(compressed, torch.tensor([last]), table, stride),
        )  # fmt: skip
        window = rows[end - 2 * stride : end][None]
        expected = mean_of_windows(window).to(dtype)[0]
        torch.testing.assert_close(
            expected.float(), window.float().mean(1)[0], atol=1e-2, rtol=1e-2
        )
        block, slot = (2, 0)[(end - 1) // block_size], (end - 1) % block_size // stride
        assert compressed[block, :, slot].equal(expected)
