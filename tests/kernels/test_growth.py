# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Token after token over borders of pages, windows and blocks: what kernels derive from keys.

Whatever they have written by then must be what all keys give at once, to the last bit.
"""

from __future__ import annotations

import pytest
import torch
from support.kernels import DEVICE, device_of, noise, scattered_table
from vllm_sparse.kernels.dispatch import implementation
from vllm_sparse.kernels.layout import PageLayout
from vllm_sparse.kernels.reference.sparda_tokens import mean_of_windows
from vllm_sparse.kernels.types import NewWindows

from vllm_sparse.policies.pages import page_extrema

BEGIN, KV_HEADS, DIM = (0, 29), 2, 64


def rows_of(table, block_size, kept, length):
    """Tokens of a row from its blocks, ``[length, G, ...]``."""
    slot = torch.arange(length, device=kept.device)
    return kept[table.long()[slot // block_size], :, slot % block_size]


@pytest.mark.parametrize("folder", ["cpu", "triton"])
def test_extrema_of_appended_tokens_equal_a_rebuild(folder):
    """From an empty row, and from one whose last page is begun."""
    if folder == "triton":
        pytest.importorskip("triton")
    device = DEVICE if folder == "triton" else torch.device("cpu")
    generator, layout, steps = torch.Generator().manual_seed(3), PageLayout(16, DIM, 4), 37
    width = (max(BEGIN) + steps) // 16 + 1
    table = scattered_table(len(BEGIN), width, generator, device)
    shape = len(BEGIN) * width, KV_HEADS, 16, 2 * DIM + 2 * DIM // 4
    cache = torch.full(shape, torch.nan, dtype=torch.bfloat16, device=device)
    old = noise(BEGIN[1], KV_HEADS, 2 * DIM, generator=generator, device=device, dtype=cache.dtype)
    slot = torch.arange(BEGIN[1], device=device)
    layout.tokens(cache)[table[1].long()[slot // 16], :, slot % 16] = old
    bounds = torch.cat(page_extrema(old[..., :DIM].transpose(0, 1), 4), -1).transpose(0, 1)
    page = torch.arange(len(bounds), device=device)
    layout.index(cache)[table[1].long()[page // 4], :, :, page % 4] = bounds
    top_r = torch.full((len(BEGIN),), DIM, dtype=torch.int32, device=device)
    for step in range(1, steps + 1):
        query, key, value = (
            noise(len(BEGIN), heads, DIM, generator=generator, device=device, dtype=cache.dtype)
            for heads in (3 * KV_HEADS, KV_HEADS, KV_HEADS)
        )
        lengths = torch.tensor([begin + step for begin in BEGIN], dtype=torch.int32, device=device)
        rows = table, lengths, lengths, top_r
        if folder == "triton":
            implementation(folder, "append_tokens")(cache, key, value, *rows, layout, replays=False)
        else:  # its decode step appends
            implementation(folder, "decode_attention")(
                cache, query, key, value, torch.empty_like(query), *rows, layout=layout, top_k=32,
                scale=0.3,
            )  # fmt: skip
        if step not in (5, 23, steps):
            continue
        for own, length in zip(table, lengths.tolist(), strict=True):
            keys = rows_of(own, 16, layout.tokens(cache), length)[..., :DIM].transpose(0, 1)
            expected = torch.cat(page_extrema(keys, 4), -1)
            index = layout.index(cache).transpose(2, 3)
            found = rows_of(own, 4, index, expected.shape[1]).transpose(0, 1)
            assert found.equal(expected), f"{length} tokens"


def test_windows_of_written_tokens_equal_a_rebuild(ours):
    """Blocks of two windows, some of which have frames; sums of whole numbers have no order."""
    device, size, stride, steps = device_of(ours), 32, 16, 52
    generator = torch.Generator().manual_seed(5)
    width = (max(BEGIN) + steps) // size + 1
    table = scattered_table(len(BEGIN), width, generator, device)
    blocks = len(BEGIN) * width
    options = {"generator": generator, "device": device, "dtype": torch.bfloat16, "whole": True}
    host = noise(blocks, KV_HEADS, size, 2 * DIM, **options)
    frame_of = torch.full((blocks * KV_HEADS,), -1, dtype=torch.int32, device=device)
    frame_of[::3] = torch.arange(len(frame_of[::3]), dtype=torch.int32, device=device)
    slab = host.flatten(0, 1)[::3].clone()
    compressed = torch.full(
        (blocks, KV_HEADS, size // stride, DIM), torch.nan, dtype=host.dtype, device=device
    )
    for step in range(steps):
        key, value = (noise(len(BEGIN), KV_HEADS, DIM, **options) for _ in "kv")
        positions = torch.tensor([begin + step for begin in BEGIN], device=device)
        block = table.gather(1, (positions // size)[:, None])[:, 0].long()
        ours.write_tokens(
            host, slab, frame_of, block * size + positions % size, key, value,
            NewWindows(compressed, positions, table, stride),
        )  # fmt: skip
    assert slab.equal(host.flatten(0, 1)[::3])
    for begin, own in zip(BEGIN, table, strict=True):
        length = begin + steps
        keys = rows_of(own, size, host, length)[..., :DIM]
        expected = mean_of_windows(keys.unfold(0, 2 * stride, stride).permute(0, 3, 1, 2))
        stored = rows_of(own, size // stride, compressed, length // stride)
        first = max(1, -((stride - 1 - begin) // stride))  # before, nobody wrote any
        found, expected = stored[first:], expected[first - 1 :].to(host.dtype)
        assert len(found) == len(expected) > 1
        assert found.equal(expected)
