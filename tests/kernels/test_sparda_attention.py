# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Attention over frames: every implementation against the reference."""

from __future__ import annotations

import importlib

import pytest
import torch
from support.kernels import REFERENCE, close, device_of, noise, scattered_table, with_gaps
from vllm_sparse.kernels.cpu.sparda_attention import attend_frames
from vllm_sparse.kernels.fp8 import FP8, UNSCALED, Scales
from vllm_sparse.kernels.types import Unframed

from vllm_sparse.policies.attention import attend

ATTENTIONS = [
    # dtype, D, heads per KV head, block size
    (torch.float32, 64, 1, 32),
    (torch.bfloat16, 128, 16, 64),
    (torch.float16, 80, 5, 16),
    (torch.bfloat16, 96, 7, 128),
    (torch.float32, 256, 12, 32),
    (torch.float16, 24, 2, 32),
]


@pytest.mark.usefixtures("_splitting")
@pytest.mark.parametrize("shape", ATTENTIONS, ids=lambda s: "-".join(str(v) for v in s))
def test_attention_over_frames_equals_reference(ours, shape):
    device = device_of(ours)
    dtype, dim, group, block_size = shape
    generator = torch.Generator().manual_seed(dim + group)
    tokens, kv_heads, count, num_frames = 4, 2, 5, 50
    slab = noise(num_frames, block_size, 2 * dim, generator=generator, device=device, dtype=dtype)
    frames = torch.randperm(num_frames - 10, generator=generator)[: tokens * kv_heads * count]
    frames = frames.view(tokens, kv_heads, count).int()
    lengths = [count * block_size, 0, 2 * block_size + 3, 1]
    for t, n in enumerate(lengths):  # nothing beyond a row's length may be read
        used = -(-n // block_size)
        if n % block_size:
            slab[frames[t, :, used - 1].long(), n % block_size :] = torch.nan
        slab[frames[t, :, used:].flatten().long()] = torch.nan
        frames[t, :, used:] = -1
    query = with_gaps(
        noise(tokens, kv_heads * group, dim, generator=generator, device=device, dtype=dtype), 2
    )
    lengths = torch.tensor(lengths, dtype=torch.int32, device=device)
    outputs = [with_gaps(torch.full_like(query, torch.nan), 2) for _ in range(2)]
    for kernels, output in zip((REFERENCE, ours), outputs, strict=True):
        kernels.attend_frames(slab, query, output, frames.to(device), lengths, 0.125)
    close(outputs[1], outputs[0], dtype)
    assert not outputs[1][1].any()
    if ours.name.startswith("triton"):  # a launch leaves its counters as the next one needs them
        again = torch.full_like(outputs[1], torch.nan)
        ours.attend_frames(slab, query, again, frames.to(device), lengths, 0.125)
        assert again.equal(outputs[1])
        left = importlib.import_module("vllm_sparse.kernels.triton.counters").counters(device)
        assert not any(count.any() for count in left)
    rows = slab[frames[3, :, :1].long()].float().flatten(1, 2)
    expected = attend(
        query[3].float(), *rows.split(dim, -1), torch.zeros(kv_heads, 1).long(), 0.125
    )
    close(outputs[1][3].float(), expected, dtype)


@pytest.mark.usefixtures("_splitting")
@pytest.mark.parametrize("shape", ATTENTIONS[:3], ids=lambda s: "-".join(str(v) for v in s))
def test_rows_without_frames_read_the_host_pool(ours, shape):
    device = device_of(ours)
    dtype, dim, group, block_size = shape
    generator = torch.Generator().manual_seed(dim)
    rows, kv_heads, count = 4, 2, 3
    slab = noise(30, block_size, 2 * dim, generator=generator, device=device, dtype=dtype)
    host = noise(40, kv_heads, block_size, 2 * dim, generator=generator, device=device, dtype=dtype)
    table = scattered_table(rows, 9, generator, device)
    query = noise(rows, kv_heads * group, dim, generator=generator, device=device, dtype=dtype)
    framed, whole = [2 * block_size + 5, 0, 0, 0], [0, 9 * block_size - 3, 1, 0]
    frames = torch.full((rows, kv_heads, count), -1, dtype=torch.int32)
    frames[0] = torch.randperm(30, generator=generator)[: kv_heads * count].view(kv_heads, count)
    # What nobody may read: the null block, frames and blocks of no row, and beyond a row's length.
    unread = torch.ones(30, dtype=torch.bool)
    unread[frames[0].flatten().long()] = False
    slab[unread] = torch.nan
    host[table[0].long()] = host[table[3].long()] = host[table[2, 1:].long()] = torch.nan
    host[table[1, 8].long(), :, -3:] = host[table[2, 0].long(), :, 1:] = torch.nan
    framed, whole = (
        torch.tensor(part, dtype=torch.int32, device=device) for part in (framed, whole)
    )
    outputs = [torch.full_like(query, torch.nan) for _ in range(2)]
    for kernels, output in zip((REFERENCE, ours), outputs, strict=True):
        kernels.attend_frames(
            slab, query, output, frames.to(device), framed, 0.125,
            Unframed(host, table, whole),
        )  # fmt: skip
    close(outputs[1], outputs[0], dtype)
    assert not outputs[1][3].any()
    assert outputs[1][:3].any((1, 2)).all()


@pytest.mark.parametrize("fp8", [False, True])
def test_fused_attention_over_frames_cuts_what_is_less_than_the_threads(fp8):
    """A row of many frames, one of a few, padding, and one whose blocks are the host's."""
    given = {"generator": torch.Generator().manual_seed(5), "device": torch.device("cpu")}
    dim, group, size, count = 64, 6, 64, 20
    slab = noise(60, size, 2 * dim, **given)
    host = noise(120, 1, size, 2 * dim, **given)
    scales = Scales(0.5, 2.0) if fp8 else UNSCALED
    if fp8:
        slab, host = slab.to(FP8), host.to(FP8)
    frames = torch.randperm(60, generator=given["generator"]).view(3, 1, count).int()
    frames = torch.cat((frames, torch.full((1, 1, count), -1).int()))
    lengths = torch.tensor([count * size - 5, 3 * size, 0, 0]).int()
    whole = torch.tensor([0, 0, 0, 30 * size - 7]).int()
    unframed = Unframed(host, scattered_table(4, 30, **given), whole)
    query = noise(4, group, dim, **given)
    outputs, threads = [], torch.get_num_threads()
    try:
        for kernel, team in ((REFERENCE.attend_frames, 1), (attend_frames, 1), (attend_frames, 19)):
            torch.set_num_threads(team)
            outputs.append(torch.full_like(query, torch.nan))
            kernel(slab, query, outputs[-1], frames, lengths, 0.125, unframed, scales=scales)
    finally:
        torch.set_num_threads(threads)
    for found in outputs[1:]:
        close(found, outputs[0], torch.float32)
    alone, cut = outputs[1:]
    assert not cut[2].any()
    assert [torch.equal(a, b) for a, b in zip(alone, cut, strict=True)] == [
        False,
        True,
        True,
        False,
    ]


@pytest.mark.usefixtures("_splitting")
def test_attention_may_have_no_rows_or_only_padding(every):
    device = device_of(every)
    slab = torch.full((3, 32, 128), torch.nan, device=device)
    for rows in (0, 2):
        query = torch.full((rows, 4, 64), torch.nan, device=device)
        output = torch.full_like(query, torch.nan)
        frames = torch.full((rows, 2, 6), -1, dtype=torch.int32, device=device)
        lengths = torch.zeros(rows, dtype=torch.int32, device=device)
        every.attend_frames(slab, query, output, frames, lengths, 0.125)
        assert output.equal(torch.zeros_like(output))
