# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Batches and prompts on caches with a page index, in scattered blocks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from vllm_sparse.kernels.fp8 import FP8, Scales, encode, readable
from vllm_sparse.kernels.layout import PageLayout

from support.kernels import DEVICE, with_gaps
from vllm_sparse.policies.rocketkv import page_extrema

# Of fp8 caches; powers of two would hide a product that is missing only on one side.
SCALES = Scales(0.37, 1.7, truncates=True)


class Batch(NamedTuple):
    layout: PageLayout
    cache: torch.Tensor
    table: torch.Tensor
    lengths: torch.Tensor
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    top_r: torch.Tensor
    history: list[torch.Tensor]  # [G, n - 1, 2D] of each row


def make_batch(rows=5, kv_heads=2, group=3, dim=64, block_size=32, page_size=4, longest=300,
               dtype=torch.float32, seed=0, fp8=False) -> Batch:  # fmt: skip
    """Rows of unlike lengths in scattered blocks; whatever a row does not own is NaN.

    Of a cache of fp8, ``dtype`` is what comes from the model.
    """
    cached = FP8 if fp8 else dtype
    generator = torch.Generator().manual_seed(seed)
    layout = PageLayout(block_size, dim, page_size)
    width = -(-longest // block_size) + 1
    blocks = rows * width + 1
    cache = torch.full((blocks, kv_heads, block_size, 2 * dim + 2 * dim // page_size), torch.nan)
    cache = cache.to(cached)
    table = (torch.randperm(blocks - 1, generator=generator) + 1).view(rows, width).int()
    lengths = torch.randint(longest // 2, longest + 1, (rows,), generator=generator).int()
    lengths[0] = longest
    history = []
    for row in range(rows):
        past = torch.randn(kv_heads, int(lengths[row]) - 1, 2 * dim, generator=generator)
        past = encode(past, cached, 1.0, True)
        history.append(past)
        slot = torch.arange(past.shape[1])
        block = table[row].long()[slot // block_size]
        layout.tokens(cache)[block, :, slot % block_size] = past.transpose(0, 1)
        bounds = torch.cat(page_extrema(readable(past[..., :dim]), page_size), -1)
        bounds = bounds.transpose(0, 1).to(cached)
        page = torch.arange(len(bounds))
        block = table[row].long()[page // layout.pages_per_block]
        layout.index(cache)[block, :, :, page % layout.pages_per_block] = bounds

    def noise(heads: int) -> torch.Tensor:
        return (torch.randn(rows, heads, dim, generator=generator) * 1.5).to(dtype)

    top_r = torch.randint(1, dim + 1, (rows,), generator=generator).int()
    return Batch(layout, cache, table, lengths, noise(kv_heads * group), noise(kv_heads),
                 noise(kv_heads), top_r, history)  # fmt: skip


def batch_on_device(**shape):
    batch = make_batch(**shape)
    cache = with_gaps(batch.cache.to(DEVICE), 2)
    # vLLM hands over slices of one fused QKV row.
    dim, kv_heads = batch.layout.head_dim, cache.shape[1]
    fused = torch.cat((batch.query, batch.key, batch.value), 1).flatten(1).to(DEVICE)
    heads = batch.query.shape[1]
    query, key, value = (
        part.unflatten(1, (-1, dim))
        for part in fused.split([heads * dim, kv_heads * dim, kv_heads * dim], 1)
    )
    return batch._replace(
        cache=cache, query=query, key=key, value=value, table=batch.table.to(DEVICE),
        lengths=batch.lengths.to(DEVICE), top_r=batch.top_r.to(DEVICE),
    )  # fmt: skip


def parked_rows(batch, per_block):
    """Three of four rows wait in the first blocks of row 1, ``per_block`` in each.

    Returns those blocks, the rows' places, -1 for none, and channels: rows whose queries wait read
    everything and leave the extrema alone.
    """
    tail = batch.table[1, :2].clone()
    place = torch.tensor([-1, 0, per_block - 1, per_block], device=DEVICE)
    parked = tail.long()[place // per_block] * per_block + place % per_block
    parked = torch.where(place < 0, -1, parked).int()
    return tail, parked, torch.where(parked >= 0, 0, batch.top_r)


def decode(kernel, batch, top_k, *, final=None, cache=None, **options):
    cache = with_gaps(batch.cache, 2) if cache is None else cache
    output = with_gaps(torch.empty_like(batch.query.contiguous()), 2)
    final = batch.lengths if final is None else final
    kernel(cache, batch.query, batch.key, batch.value, output, batch.table, batch.lengths,
           final, batch.top_r, layout=batch.layout, top_k=top_k, scale=0.11, **options)  # fmt: skip
    return cache, output


PROMPTS = [
    {"dim": 40, "group": 3, "dtype": torch.float32, "page_size": 4, "block_size": 16},
    {"dim": 80, "group": 1, "dtype": torch.float16, "page_size": 2, "block_size": 32},
    {"dim": 128, "group": 16, "dtype": torch.bfloat16, "page_size": 1, "block_size": 64},
    {"dim": 256, "group": 7, "dtype": torch.float32, "page_size": 4, "block_size": 128},
]


def make_prompts(lengths, *, dim, group, dtype, page_size, block_size, window=8, kv_heads=2):
    """Prompts in scattered blocks, packed as a GPU kernel would: keys, then values."""
    generator = torch.Generator().manual_seed(dim)
    width = max(-(-max(lengths) // block_size), 1) + 1
    table = torch.randperm(len(lengths) * width, generator=generator).view(-1, width).int()
    cache = torch.full(
        (len(lengths) * width, kv_heads, block_size, 2 * dim + 2 * dim // page_size), torch.nan
    )
    cache = with_gaps(cache.to(dtype), 2)
    halves = PageLayout(block_size, dim, page_size).tokens(cache).flatten(2)
    halves = halves.unflatten(2, (2, block_size, dim))
    for row, length in enumerate(lengths):
        slot = torch.arange(length)
        block = table[row].long()[slot // block_size]
        tokens = torch.randn(length, kv_heads, 2, dim, generator=generator)
        halves[block, :, :, slot % block_size] = tokens.to(dtype)
    query = torch.randn(len(lengths), window, kv_heads * group, dim, generator=generator)
    query = query.to(DEVICE, dtype).transpose(1, 2)
    lens = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    return cache.to(DEVICE), table.to(DEVICE), lens, query


def packed_views(cache, layout):
    """Keys and values of stock pages, ``[blocks, G, block_size, D]`` each, as views."""
    halves = layout.tokens(cache).flatten(2).unflatten(2, (2, layout.block_size, layout.head_dim))
    return halves[:, :, 0], halves[:, :, 1]


def row_pack(key, value, pages):
    """A plain layout, as GPU kernels have it."""
    key_pages, value_pages = pages.chunk(2, 2)
    key_pages[0], value_pages[0] = key.transpose(0, 1), value.transpose(0, 1)
