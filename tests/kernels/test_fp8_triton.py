# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Triton's kernels on caches of fp8, against the reference, which is held to brute force."""

from __future__ import annotations

import sys

import pytest
import torch

pytest.importorskip("triton")

from support.ahead_of_time import compile_only, compiled
from support.kernels import DEVICE, close, same, with_gaps
from support.pages import (
    PROMPTS,
    SCALES,
    batch_on_device,
    decode,
    make_prompts,
    packed_views,
    parked_rows,
)
from vllm_sparse.kernels.fp8 import FP8, encode
from vllm_sparse.kernels.layout import PageLayout
from vllm_sparse.kernels.reference import append as ref_append
from vllm_sparse.kernels.reference import compaction as ref_compaction
from vllm_sparse.kernels.reference import decode as reference
from vllm_sparse.kernels.triton import (
    append,
    compaction,
    sparda_attention,
    sparda_prefill,
    sparda_tokens,
)
from vllm_sparse.kernels.triton import decode as decode_kernel
from vllm_sparse.kernels.types import NewWindows, Unframed

from vllm_sparse.kv.tail.compaction import QueryParking

NEAREST = SCALES._replace(truncates=False)
SHAPES = [
    {"rows": 2, "kv_heads": 3, "group": 3, "block_size": 128, "longest": 400},
    {"rows": 3, "group": 7, "page_size": 2, "dtype": torch.bfloat16},
    {"rows": 2, "group": 1, "dim": 80, "page_size": 1, "longest": 150, "dtype": torch.float16},
]


@pytest.mark.usefixtures("_splitting_rows")
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(f"{k}{v}" for k, v in s.items()))
@pytest.mark.parametrize(("top_k", "read_all"), [(37, False), (5000, False), (8, True)])
def test_decode_step_equals_reference(shape, top_k, read_all):
    batch = batch_on_device(**shape, fp8=True)
    options = {"read_all": read_all, "scales": NEAREST}
    expected_cache, expected = decode(reference.decode_attention, batch, top_k, **options)
    cache, output = decode(
        decode_kernel.decode_attention, batch, top_k, replays=top_k == 37, **options
    )
    close(output, expected, batch.query.dtype)
    assert same(cache, expected_cache)


def test_new_tokens_are_rounded_to_the_nearest_and_saturate():
    batch = batch_on_device(rows=4, dim=64, longest=60, fp8=True)
    generator = torch.Generator().manual_seed(3)
    power = torch.randint(-12, 12, batch.key.shape, generator=generator).float().exp2()
    key = (torch.randn(batch.key.shape, generator=generator) * power).to(DEVICE)
    cache = with_gaps(batch.cache, 2)
    rows = batch.table, batch.lengths, batch.lengths, batch.top_r, batch.layout
    append.append_tokens(cache, key, -key, *rows, replays=False, scales=NEAREST)
    for row, length in enumerate(batch.lengths.tolist()):
        block = batch.table[row, (length - 1) // 32]
        stored = batch.layout.tokens(cache)[block, :, (length - 1) % 32].split(64, -1)
        for half, part, scale in zip(stored, (key, -key), NEAREST[:2], strict=True):
            assert same(half, encode(part[row], FP8, scale, False))
    assert key.abs().max() > 448 * NEAREST.key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parked_queries_are_not_rounded(dtype):
    group = 2
    batch = batch_on_device(rows=4, group=group, longest=120, dtype=dtype, fp8=True)
    layout = batch.layout
    parking = QueryParking(layout, group, dtype)
    per_block = 2 * layout.pages_per_block // (group * dtype.itemsize)
    assert parking.per_block == per_block
    tail, parked, top_r = parked_rows(batch, per_block)
    caches = [with_gaps(batch.cache, 2) for _ in range(2)]
    rows = batch.key, batch.value, batch.table, batch.lengths, batch.lengths, top_r, layout
    reference.append_tokens(caches[0], *rows, scales=NEAREST)
    ref_append.park_queries(caches[0], batch.query, parked, layout, per_block)
    append.append_tokens(caches[1], *rows, replays=False, query=batch.query, parked=parked,
                         per_block=per_block, scales=NEAREST)  # fmt: skip
    assert torch.equal(*(cache.contiguous().view(torch.uint8) for cache in caches))
    loaded = parking.load(caches[1], tail, per_block + 1)
    assert torch.equal(loaded[[0, per_block - 1, per_block]], batch.query[1:])


@pytest.mark.parametrize("shape", PROMPTS[:3])
def test_compacted_prompts_equal_reference(shape):
    lengths = [150, 90, 131]
    cache, table, lens, query = make_prompts(lengths, **shape)
    layout = PageLayout(shape["block_size"], shape["dim"], shape["page_size"])
    cache = with_gaps(encode(cache.float().nan_to_num(7.0), FP8, 1.0, False), 2)
    dropped = torch.ones_like(lens)
    results = []
    for kernel in (ref_compaction, compaction):
        result = with_gaps(cache, 2)
        kernel.compact_prompts(
            result, *packed_views(result, layout), query, table, lens, dropped, layout=layout,
            pool_kernel=7, scale=0.3, max_kept=150 - shape["block_size"], scales=NEAREST,
        )  # fmt: skip
        results.append(result)
    assert same(*results)


@pytest.mark.parametrize("capability", [89, 90])
def test_kernels_compile_for_gpus_that_have_the_conversion(capability, triton_cache):
    lines = compiled(__file__, capability, triton_cache)
    names = {line.split()[0] for line in lines}
    assert {"_append_kernel", "_select_slots_kernel", "_attend_kernel", "_score_kernel"} <= names
    assert {"_gather_kernel", "_write_kernel"} <= names
    assert {"_write_tokens_kernel", "_attend_frames_kernel", "_attend_part_kernel"} <= names


def compile_everything(capability: int) -> None:
    """All that meets fp8, as an engine launches it."""
    compile_only(capability)
    layout = PageLayout(64, 128, 4)
    cache = torch.zeros(9, 2, 64, 2 * 128 + 2 * 32, dtype=torch.uint8).view(FP8)
    query, key = torch.zeros(3, 8, 128).bfloat16(), torch.zeros(3, 2, 128).bfloat16()
    lengths = torch.zeros(3, dtype=torch.int32)
    table = torch.zeros(3, 9, dtype=torch.int32)
    alone = {"replays": False, "parked": lengths, "per_block": 2}
    for options in ({}, alone, {"replays": False, "read_all": True}):
        decode_kernel.decode_attention(
            cache, query, key, key, query, table, lengths, lengths, lengths, layout=layout,
            top_k=128, scale=0.1, scales=NEAREST, **options,
        )  # fmt: skip
    tokens = layout.tokens(cache).contiguous()
    slots, slab = lengths.long(), tokens.flatten(0, 1)
    for given in (None, NewWindows(key[:, :, None].repeat(3, 1, 4, 1), slots, table, 16)):
        sparda_tokens.write_tokens(
            tokens, slab, table.flatten(), slots, key, key, given, NEAREST
        )  # fmt: skip
    frames = table[:, None].repeat(1, 2, 1)
    whole = Unframed(tokens, table, lengths)
    sparda_attention.attend_frames(slab, query, query, frames, lengths, 0.1, whole, NEAREST)
    part = query.view(2, 4, 3, 128), *tokens.flatten(1, 2)[:2].split(128, -1)
    sparda_prefill.attend_part(*part, None, 0.1, past_from=0)
    compaction.compact_prompts(
        cache, *packed_views(cache, layout), torch.zeros(3, 8, 16, 128).bfloat16(), table, lengths,
        lengths, layout=layout, pool_kernel=63, scale=0.1, max_kept=300, scales=NEAREST,
    )  # fmt: skip


if __name__ == "__main__":
    compile_everything(int(sys.argv[1]))
