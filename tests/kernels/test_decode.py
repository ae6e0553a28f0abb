# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The fused CPU kernel against the reference, and the reference against the policy functions."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from reference import rocketkv_bruteforce as brute
from support.kernels import FAR
from support.pages import SCALES, Batch, make_batch
from vllm_sparse.kernels.cpu import attention, build, sparda_attention, sparda_tokens
from vllm_sparse.kernels.cpu import decode as fused
from vllm_sparse.kernels.fp8 import UNSCALED, readable
from vllm_sparse.kernels.reference import attention as ref_attention
from vllm_sparse.kernels.reference import decode as reference


def run(kernel, batch: Batch, top_k: int, read_all: bool = False):
    cache, output = batch.cache.clone(), torch.empty_like(batch.query)
    kernel(cache, batch.query, batch.key, batch.value, output, batch.table, batch.lengths,
           batch.lengths, batch.top_r, layout=batch.layout, top_k=top_k, scale=0.4,
           read_all=read_all)  # fmt: skip
    return cache, output


@pytest.mark.parametrize("kernel", [reference.decode_attention, fused.decode_attention])
@pytest.mark.parametrize("page_size", [1, 2, 4])
def test_decode_step_equals_brute_force(kernel, page_size):
    batch = make_batch(page_size=page_size, longest=120)
    _, output = run(kernel, batch, top_k=32)
    dim, kv_heads = batch.layout.head_dim, batch.cache.shape[1]
    for row, past in enumerate(batch.history):
        newest = torch.cat((batch.key[row], batch.value[row]), -1).unsqueeze(1)
        held = torch.cat((past, newest), 1)
        low, high = brute.page_extrema(held[..., :dim], page_size)
        chosen = brute.select_decode_tokens(
            batch.query[row], low, high, held.shape[1], page_size, int(batch.top_r[row]), 32,
            scale=0.4,
        )  # fmt: skip
        expected = brute.attend(
            batch.query[row], held[..., :dim], held[..., dim:], torch.tensor(chosen), 0.4
        )
        torch.testing.assert_close(output[row], expected, rtol=1e-4, atol=1e-5)
        assert len(chosen) == kv_heads


SHAPES = [
    {"kv_heads": 3, "group": 3, "block_size": 128, "longest": 700},
    {"group": 7, "page_size": 2, "dtype": torch.bfloat16},
    {"group": 1, "dim": 80, "page_size": 1},
    {"kv_heads": 1, "group": 16, "dim": 128, "block_size": 64, "dtype": torch.bfloat16},
    {"group": 4, "dim": 40, "block_size": 16, "longest": 90},
    {"group": 5, "dim": 96, "dtype": torch.float16},
    {"group": 12, "dim": 256, "block_size": 128},
    {"group": 6, "block_size": 128, "page_size": 2, "dtype": torch.bfloat16},
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(f"{k}{v}" for k, v in s.items()))
@pytest.mark.parametrize(
    ("top_k", "read_all"), [(37, False), (64, False), (5000, False), (8, True)]
)
def test_fused_kernel_equals_reference(shape, top_k, read_all):
    batch = make_batch(**shape)
    expected_cache, expected = run(reference.decode_attention, batch, top_k, read_all)
    cache, output = run(fused.decode_attention, batch, top_k, read_all)
    tolerance = 2e-5 if batch.cache.dtype == torch.float32 else 4e-3
    torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(cache.nan_to_num(7), expected_cache.nan_to_num(7))


@pytest.mark.parametrize("dim", [40, 64])
@pytest.mark.parametrize("magnitude", [0, 1e-40, 1])
def test_of_equal_channels_the_lower_ones_are_read(dim, magnitude):
    """Of signs only, of nothing, and of numbers that are almost nothing; an odd count, and all."""
    batch = make_batch(rows=6, dim=dim)
    batch.top_r[:] = torch.tensor([1, 2, 7, dim - 1, dim, dim + 9])
    batch = batch._replace(query=magnitude * batch.query.sign())
    _, expected = run(reference.decode_attention, batch, 37)
    _, output = run(fused.decode_attention, batch, 37)
    torch.testing.assert_close(output, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_that_its_group_s_channels_leave_out_does_not_hide_the_others(dtype):
    """It votes evenly; PyTorch's quotient of nothing by nothing is no number."""
    batch = make_batch(rows=6, group=2, dtype=dtype)
    batch.top_r[:] = 8
    heads = batch.query.unflatten(1, (-1, 2))
    heads[:, :, 0, :8] *= 2
    heads[:, :, 1, :8], heads[:, :, 1, 8:] = 0, 0.01
    _, expected = run(reference.decode_attention, batch, 13)
    _, output = run(fused.decode_attention, batch, 13)
    for row, past in enumerate(batch.history):
        held = torch.cat((past, torch.cat((batch.key[row], batch.value[row]), -1).unsqueeze(1)), 1)
        keys, values = held.float().chunk(2, -1)
        bounds = brute.page_extrema(keys.to(dtype), batch.layout.page_size)
        given = held.shape[1], batch.layout.page_size, 8, 13
        chosen = brute.select_decode_tokens(batch.query[row].float(), *bounds, *given, scale=0.4)
        truth = brute.attend(batch.query[row].float(), keys, values, torch.tensor(chosen), 0.4)
        torch.testing.assert_close(output[row].float(), truth.float(), rtol=2e-2, atol=2e-2)
    tolerance = 2e-5 if dtype == torch.float32 else 4e-3
    torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("group", range(1, 17))
def test_odd_shapes_equal_reference(group):
    """Rows of one token, none, all tokens; tables and a pool that end; learned sinks."""
    dtype = (torch.float32, torch.bfloat16, torch.float16)[group % 3]
    dim, page_size = (64, 80, 96, 128, 256)[group % 5], (1, 2, 4, 8, 16)[group // 3 % 5]
    shape = {"group": group, "dim": dim, "block_size": 16, "page_size": page_size}
    longest, fp8 = (15, 17, 64, 130)[group % 4], group % 5 > 2
    batch = make_batch(longest=longest, dtype=dtype, fp8=fp8, **shape)
    batch.lengths[1], batch.lengths[2], batch.top_r[3] = 1, 0, 0
    held = -(-batch.lengths // 16)
    owned = torch.arange(batch.table.shape[1]) < held[:, None]
    cache = batch.cache[: batch.table[owned].max() + 1]
    options = {"layout": batch.layout, "top_k": (1, 5, 16, 50)[group // 4 % 4], "scale": 0.3}
    options["scales"] = SCALES if fp8 else UNSCALED
    options["sinks"] = batch.query[0, :, 0].float().contiguous() if group % 2 else None
    found = []
    for kernel, beyond in ((reference.decode_attention, 0), (fused.decode_attention, FAR)):
        table, output = batch.table.where(owned, beyond), torch.empty_like(batch.query)
        written = cache.clone()
        kernel(written, batch.query, batch.key, batch.value, output, table, batch.lengths,
               batch.lengths, batch.top_r, **options)  # fmt: skip
        found.append((readable(written).nan_to_num(7), output))
    assert torch.equal(found[0][0], found[1][0])
    tolerance = 2e-5 if batch.cache.dtype == torch.float32 else 2e-2 if fp8 else 8e-3
    torch.testing.assert_close(found[1][1], found[0][1], rtol=tolerance, atol=tolerance)
    assert not found[1][1][2].any()
    assert found[1][1][:2].any((1, 2)).all()


@pytest.mark.parametrize("kernel", [reference.decode_attention, fused.decode_attention])
def test_padding_rows_are_zero_and_write_nothing(kernel):
    batch = make_batch()
    whole_cache, whole = run(kernel, batch, top_k=32)
    lengths = batch.lengths.clone()
    lengths[2] = 0
    cache, output = run(kernel, batch._replace(lengths=lengths), top_k=32)
    assert not output[2].any()
    assert torch.equal(output[[0, 1, 3, 4]], whole[[0, 1, 3, 4]])
    untouched = batch.table[2].long()
    assert torch.equal(cache[untouched].nan_to_num(7), batch.cache[untouched].nan_to_num(7))
    assert not torch.equal(whole_cache[untouched].nan_to_num(7), cache[untouched].nan_to_num(7))


@pytest.mark.parametrize("kernel", [reference.decode_attention, fused.decode_attention])
@pytest.mark.parametrize("page_size", [2, 4])
def test_replayed_tokens_give_what_they_gave_one_by_one(kernel, page_size):
    """A resumed request brings several tokens at once; each may see only its own past."""
    steps = 11
    batch = make_batch(rows=steps, page_size=page_size, longest=100)
    table = batch.table[:1].expand(steps, -1).contiguous()
    first = int(batch.lengths[0])
    lengths = torch.arange(first, first + steps, dtype=torch.int32)
    together, one_by_one = batch.cache.clone(), batch.cache.clone()
    output, expected = torch.empty_like(batch.query), torch.empty_like(batch.query)
    options = {"layout": batch.layout, "top_k": 24, "scale": 0.11}
    final = torch.full_like(lengths, first + steps - 1)
    kernel(together, batch.query, batch.key, batch.value, output, table, lengths, final,
           batch.top_r, **options)  # fmt: skip
    for i in range(steps):
        row = slice(i, i + 1)
        kernel(one_by_one, batch.query[row], batch.key[row], batch.value[row], expected[row],
               table[row], lengths[row], lengths[row], batch.top_r[row], **options)  # fmt: skip
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(together.nan_to_num(7), one_by_one.nan_to_num(7))


def test_nan_queries_do_not_crash():
    """A model that overflows gives NaN tokens, as with stock kernels."""
    batch = make_batch()
    for sign in (1, -1):
        query = torch.full_like(batch.query, sign * torch.nan)
        _, output = run(fused.decode_attention, batch._replace(query=query), 37)
        assert output.isnan().all()


def test_strided_projections_are_read_in_place():
    """vLLM hands over slices of one fused QKV row."""
    batch = make_batch()
    _, heads, dim = batch.query.shape
    fused_row = torch.cat((batch.query, batch.key, batch.value), 1).flatten(1)
    query, key, value = (
        part.unflatten(1, (-1, dim)) for part in fused_row.split([heads * dim, 2 * dim, 2 * dim], 1)
    )
    _, expected = run(fused.decode_attention, batch, 32)
    _, output = run(fused.decode_attention, batch._replace(query=query, key=key, value=value), 32)
    assert torch.equal(output, expected)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(f"{k}{v}" for k, v in s.items()))
@pytest.mark.parametrize("every_token", [False, True])
def test_attention_over_slots_equals_reference(shape, every_token):
    """With a padding row, a row that reads everything, and one shorter than the selection."""
    batch = make_batch(**shape)
    size, top_k = batch.layout.block_size, 37
    cache, _ = run(reference.decode_attention, batch, top_k)
    lengths, top_r = batch.lengths.clone(), batch.top_r.clone()
    lengths[1], lengths[3], top_r[2] = 0, 20, 0
    generator = torch.Generator().manual_seed(1)
    slots = torch.full((len(lengths), cache.shape[1], top_k), -1, dtype=torch.int32)
    for row, length in enumerate(lengths.tolist()):
        for head in range(cache.shape[1]):
            token = torch.randperm(length, generator=generator)[:top_k].sort().values
            block = batch.table[row][token // size]
            slots[row, head, : len(token)] = (block * size + token % size).int()
    outputs = []
    for kernel in (ref_attention.attend_slots, attention.attend_slots):
        output = torch.full_like(batch.query, torch.nan)
        kernel(cache, batch.query, output, None if every_token else slots, batch.table, lengths,
               top_r, layout=batch.layout, top_k=top_k, scale=0.11)  # fmt: skip
        outputs.append(output)
    tolerance = 2e-5 if cache.dtype == torch.float32 else 4e-3
    torch.testing.assert_close(outputs[1], outputs[0], rtol=tolerance, atol=tolerance)
    assert not outputs[1][1].any()
    assert outputs[1][0].any()


@pytest.mark.parametrize("every_token", [False, True])
@pytest.mark.parametrize(
    "shape",
    [*SHAPES[:3], {"block_size": 512, "group": 5}],
    ids=lambda s: "-".join(f"{k}{v}" for k, v in s.items()),
)
def test_fused_attention_cuts_what_is_less_than_the_threads(shape, every_token):
    """A long row, padding, one not worth cutting, one between; other sums, so other bits."""
    batch = make_batch(**{**shape, "rows": 4, "kv_heads": 1, "longest": 2000})
    size, top_k = batch.layout.block_size, 1100
    cache, _ = run(reference.decode_attention, batch, top_k)
    lengths = torch.tensor([2000, 0, 200, 800]).int()
    slots = torch.zeros(4, 1, top_k, dtype=torch.int32)
    for row, length in enumerate(lengths.tolist()):
        token = torch.randperm(length)[:top_k].sort().values
        slots[row, 0, : len(token)] = (batch.table[row][token // size] * size + token % size).int()
    given = None if every_token else slots, batch.table, lengths, torch.ones_like(lengths)
    sinks = torch.linspace(-1, 3, batch.query.shape[1])
    options = {"layout": batch.layout, "top_k": top_k, "scale": 0.11, "sinks": sinks}
    outputs, threads = [], torch.get_num_threads()
    try:
        for kernel, count in ((ref_attention, 1), (attention, 1), (attention, 19)):
            torch.set_num_threads(count)
            outputs.append(torch.full_like(batch.query, torch.nan))
            kernel.attend_slots(cache, batch.query, outputs[-1], *given, **options)
    finally:
        torch.set_num_threads(threads)
    tolerance = 2e-5 if cache.dtype == torch.float32 else 4e-3
    for found in outputs[1:]:
        torch.testing.assert_close(found, outputs[0], rtol=tolerance, atol=tolerance)
    whole, shares = outputs[1:]
    assert torch.equal(whole[1:3], shares[1:3])
    assert not shares[1].any()
    if cache.dtype == torch.float32:
        assert not torch.equal(whole[0], shares[0])


@pytest.mark.parametrize(
    "mirror",
    [
        *(fused.DecodeSizes, attention.SlotSizes, sparda_attention.FrameSizes),
        *(sparda_tokens.WriteSizes, sparda_tokens.WindowSizes, sparda_tokens.RecordSizes),
    ],
    ids=lambda mirror: mirror.__name__,
)
def test_sizes_are_what_the_kernels_read(mirror):
    folder = Path(build.__file__).parent
    text = "".join(
        path.read_text() for pattern in ("*.h", "*.cpp") for path in folder.glob(pattern)
    )
    (body,) = re.findall(rf"struct {mirror.__name__} {{(.*?)}};", text, re.DOTALL)
    members = ", ".join(re.findall(r"int64_t (.*?);", body)).split(", ")
    assert members == [name for name, _ in mirror._fields_]
