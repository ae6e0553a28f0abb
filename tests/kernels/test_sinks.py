# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Learned attention sinks in every kernel that makes a softmax."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from reference import rocketkv_bruteforce as brute
from support.kernels import DEVICE, close, same, with_gaps
from support.pages import (
    PROMPTS,
    SCALES,
    batch_on_device,
    decode,
    make_prompts,
    packed_views,
)
from vllm_sparse.kernels.dispatch import implementation
from vllm_sparse.kernels.layout import PageLayout

FOLDERS = ["reference", "cpu", "triton"]
# A group of more than four heads, a head size of its own, and gpt-oss's.
SHAPES = [
    {"rows": 3, "group": 7, "dim": 80, "page_size": 2, "longest": 150},
    {"rows": 2, "group": 8, "dim": 64, "dtype": torch.bfloat16, "longest": 200},
]


def make_sinks(heads: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Some that take nearly all of a head's weight, some next to nothing."""
    return torch.linspace(-6, 14, heads)[torch.randperm(heads)].to(DEVICE, dtype)


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_step_equals_brute_force(folder, monkeypatch):
    """What is selected, and what it gives; without sinks, both would be something else."""
    if folder == "triton":
        launch = pytest.importorskip("vllm_sparse.kernels.triton.launch")
        monkeypatch.setattr(launch, "multiprocessors", lambda device: 64)
    torch.manual_seed(0)
    batch = batch_on_device(rows=4, group=3, page_size=4, longest=120)
    sinks, dim = make_sinks(batch.query.shape[1]), batch.layout.head_dim
    kernel = implementation(folder, "decode_attention")
    _, output = decode(kernel, batch, 32, sinks=sinks)
    others = 0
    for row, past in enumerate(batch.history):
        newest = torch.cat((batch.key[row], batch.value[row]), -1).unsqueeze(1).cpu()
        held = torch.cat((past, newest), 1)
        query, keys = batch.query[row].cpu(), held[..., :dim]
        of_step = query, *brute.page_extrema(keys, 4), held.shape[1], 4, int(batch.top_r[row]), 32
        chosen, without = (
            torch.tensor(brute.select_decode_tokens(*of_step, scale=0.11, sinks=some))
            for some in (sinks.cpu(), None)
        )
        expected = brute.attend(query, keys, held[..., dim:], chosen, 0.11, sinks.cpu())
        torch.testing.assert_close(output[row].cpu(), expected, rtol=1e-4, atol=1e-5)
        others += int((chosen != without).sum())
        unlike = brute.attend(query, keys, held[..., dim:], chosen, 0.11)
        assert (unlike - expected).abs().max() > 0.1
    assert others > 10, "sinks change what is selected"


@pytest.mark.parametrize("fp8", [False, True], ids=["plain", "fp8"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s['dim']}-{s['group']}")
@pytest.mark.parametrize(("top_k", "read_all"), [(37, False), (8, True)])
@pytest.mark.usefixtures("_splitting_rows")
def test_steps_equal_the_reference(shape, top_k, read_all, fp8):
    batch = batch_on_device(**shape, fp8=fp8)
    sinks = make_sinks(batch.query.shape[1], batch.query.dtype)
    options = {"read_all": read_all, "sinks": sinks}
    for folder in ("cpu", "triton"):
        if fp8:
            options["scales"] = SCALES._replace(truncates=folder == "cpu")
        expected, output = (
            decode(implementation(some, "decode_attention"), batch, top_k, **options)[1]
            for some in ("reference", folder)
        )
        close(output, expected, batch.query.dtype)


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("listed", [True, False])
def test_attention_over_slots_equals_vllm_s_op(folder, listed):
    """The op has the keys that are read side by side; so ours must read them and no others."""
    batch = batch_on_device(rows=3, group=8, longest=120)
    lengths, top_k, size = batch.lengths - 1, 40, batch.layout.block_size
    generator = torch.Generator().manual_seed(0)
    sinks, slots = make_sinks(batch.query.shape[1]), torch.zeros(3, 2, top_k, dtype=torch.int32)
    expected = []
    for row, length in enumerate(lengths.tolist()):
        chosen = []
        for head in range(2):
            token = torch.arange(length)
            if listed:
                token = torch.randperm(length, generator=generator)[:top_k].sort().values
                block = batch.table[row].cpu().long()[token // size]
                slots[row, head] = (block * size + token % size).int()
            chosen.append(batch.history[row][head, token])
        expected.append(of_vllm(batch.query[row], torch.stack(chosen), 0.11, sinks))
    output = torch.empty_like(batch.query.contiguous())
    implementation(folder, "attend_slots")(
        batch.cache, batch.query, output, slots.to(DEVICE) if listed else None, batch.table,
        lengths, batch.top_r, layout=batch.layout, top_k=top_k, scale=0.11, sinks=sinks,
    )  # fmt: skip
    torch.testing.assert_close(output.cpu(), torch.stack(expected), rtol=1e-4, atol=1e-5)


def of_vllm(query, held, scale, sinks):
    """What vLLM's CPU attention makes of one token ``[H, D]`` and all of ``held [G, n, 2D]``."""
    pytest.importorskip("vllm")
    from vllm import _custom_ops as ops

    (heads, dim), (kv_heads, count) = query.shape, held.shape[:2]
    size = 32 * -(-count // 32)
    pages = torch.zeros(1, kv_heads, size, 2 * dim)
    key_pages, value_pages = pages.flatten(2).view(1, kv_heads, 2 * size, dim).chunk(2, 2)
    key, value = held.transpose(0, 1).split(dim, -1)
    isa, start = "vec16", torch.tensor([0, 1], dtype=torch.int32)
    ops.cpu_attn_reshape_and_cache(
        key.contiguous(), value.contiguous(), key_pages, value_pages, torch.arange(count), isa
    )
    length = torch.tensor([count], dtype=torch.int32)
    plan = ops.cpu_attn_get_scheduler_metadata(
        1, heads, kv_heads, dim, length, torch.float32, start, True, -1, isa, False
    )
    output = torch.empty(1, heads, dim)
    ops.cpu_attention_with_kv_cache(
        query.cpu()[None].contiguous(), key_pages, value_pages, output, start, length, scale, True,
        None, -1, torch.zeros(1, 1, dtype=torch.int32), 0.0, plan, sinks.cpu(),
    )  # fmt: skip
    return output[0]


@pytest.mark.usefixtures("_splitting_rows")
def test_votes_equal_brute_force():
    shape = PROMPTS[0]
    cache, table, lens, query = make_prompts([75, 0, 130, 9], **shape)
    layout = PageLayout(shape["block_size"], shape["dim"], shape["page_size"])
    keys, _ = packed_views(cache, layout)
    sinks = make_sinks(query.shape[1])
    found = {
        folder: implementation(folder, "score_prompt")(
            query, keys, table, lens, pool_kernel=5, scale=0.3, sinks=sinks
        )
        for folder in ("reference", "triton")
    }
    for row in (0, 3):
        length = int(lens[row])
        held = keys[table[row].long()].transpose(0, 1).flatten(1, 2)[:, :length].cpu()
        expected = brute.prompt_scores(query[row].cpu(), held, 5, scale=0.3, sinks=sinks.cpu())
        for score in found.values():
            before = score[row, :, : length - query.shape[2]].cpu()
            torch.testing.assert_close(before, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found["triton"][2], found["reference"][2], rtol=1e-4, atol=1e-6)


def test_stage_1_keeps_what_the_reference_keeps():
    """All of it in one: what it keeps without sinks is something else."""
    shape = PROMPTS[0]
    cache, table, lens, query = make_prompts([67, 48], **shape)
    layout = PageLayout(shape["block_size"], shape["dim"], shape["page_size"])
    dropped = torch.tensor([2, 1], dtype=torch.int32, device=DEVICE)
    given = make_sinks(query.shape[1])
    kept = []
    for folder, sinks in (("reference", given), ("triton", given), ("triton", None)):
        kept.append(with_gaps(cache, 2))
        implementation(folder, "compact_prompts")(
            kept[-1], *packed_views(kept[-1], layout), query, table, lens, dropped, layout=layout,
            pool_kernel=1, scale=0.3, max_kept=40, sinks=sinks,
        )  # fmt: skip
    assert same(kept[0], kept[1])
    assert not same(kept[1], kept[2])


@pytest.mark.parametrize("folder", ["cpu", "triton"])
def test_sinks_that_lie_apart_are_refused(folder):
    """A kernel would read what lies between them."""
    batch = batch_on_device(rows=2, group=3, longest=40)
    apart = torch.zeros(batch.query.shape[1], 2, device=DEVICE)[:, 0]
    with pytest.raises(AssertionError):
        decode(implementation(folder, "decode_attention"), batch, 24, sinks=apart)
    with pytest.raises(AssertionError):
        implementation(folder, "attend_slots")(
            batch.cache, batch.query, torch.empty_like(batch.query), None, batch.table,
            batch.lengths, batch.top_r, layout=batch.layout, top_k=24, scale=0.1, sinks=apart,
        )  # fmt: skip


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_sink_that_nobody_reads_changes_nothing(folder):
    batch = batch_on_device(rows=2, group=5, longest=100)
    kernel, heads = implementation(folder, "decode_attention"), batch.query.shape[1]
    never = torch.full((heads,), -1e4, device=DEVICE)
    _, without = decode(kernel, batch, 24)
    _, output = decode(kernel, batch, 24, sinks=never)
    torch.testing.assert_close(output, without, rtol=1e-6, atol=1e-6)
    always = torch.full((heads,), 1e4, device=DEVICE)  # nor does it overflow
    _, output = decode(kernel, batch, 24, sinks=always)
    assert not output.any()
