# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""A layer's batch of single tokens does nothing that a captured graph cannot."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from support import adversary
from support.capture import CaptureError, Operations, capturing
from support.fp8 import nearest
from support.kernels import DEVICE
from support.pages import row_pack
from support.policies import make_policy, tensors
from vllm_sparse.kernels import dispatch
from vllm_sparse.kernels.dispatch import FusedStep, policy_triton
from vllm_sparse.kernels.fp8 import FP8, UNSCALED, Scales
from vllm_sparse.kernels.layout import PageLayout
from vllm_sparse.kernels.triton import decode, launch
from vllm_sparse.kernels.types import Rows

from vllm_sparse.kv.tail.codec import PageCodec, PlainReader
from vllm_sparse.policies.attention import attend
from vllm_sparse.policies.protocol import Policy, PolicySettings, Retention
from vllm_sparse.policies.quest import Quest
from vllm_sparse.policies.rocketkv import RocketKV
from vllm_sparse.policies.snapkv import SnapKV
from vllm_sparse.policies.streamingllm import StreamingLLM
from vllm_sparse.steps import parked as parked_prompts
from vllm_sparse.steps import split
from vllm_sparse.steps.layer import SparseLayer
from vllm_sparse.steps.parked import _joined
from vllm_sparse.steps.prompts import PromptEnd
from vllm_sparse.steps.select import select_tokens
from vllm_sparse.steps.split import SparseRows

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="a stand-in for captures on GPUs")

DIM, KV_HEADS, GROUP, WIDTH = 16, 2, 2, 8


def layer_of(kind, size, monkeypatch, **further) -> SparseLayer:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(adversary, "_THOROUGH", 0)
    policy = make_policy(kind, token_budget=48, block_size=size)
    layouts = {
        pages: PageLayout(size, DIM, pages, policy.index_width) for pages in policy.page_sizes
    }
    reader = PlainReader(layouts[policy.page_sizes[0]])
    kernels = policy_triton(torch.device("cpu"))
    return SparseLayer(policy, layouts, reader, kernels, reads_all=False, **further)


@pytest.mark.parametrize("drafts", [False, True], ids=["single", "drafts"])
@pytest.mark.parametrize("kind", [RocketKV, Quest, SnapKV, StreamingLLM])
def test_a_graph_can_capture_rows(kind, drafts, monkeypatch):
    """A long one, one of one token, a prompt's token whose query waits, and padding.

    With drafts also several of one request; then in blocks of a size that is no power of two.
    Where it is known what a row reads, its output is the attention over that; pages that end with
    a token have its index.
    """
    size, longest = (48, 96) if drafts else (16, 100)
    layer = layer_of(kind, size, monkeypatch, most_rows=4)
    asked, planes = [], decode._planes
    monkeypatch.setattr(decode, "_planes", lambda *a: asked.append(a[0]) or planes(*a))
    layout = layer.stock_layout
    content = 2 * DIM + layout.channels // layout.page_size
    cache = torch.randn(1 + 4 * WIDTH, KV_HEADS, size, content)
    table = torch.arange(1, 1 + 4 * WIDTH, dtype=torch.int32).view(4, WIDTH)
    lengths, top_r = torch.tensor([longest, 1, 90, 0]).int(), torch.tensor([4, 0, 0, 0]).int()
    parked = torch.tensor([-1, -1, 20, -1]).int()
    rows = Rows(table, lengths, top_r, parked)
    if drafts:
        rows = rows._replace(final_lengths=torch.tensor([longest + 3, 1, 90, 0]).int())
    query, key, value = (torch.randn(4, n * KV_HEADS, DIM) for n in (GROUP, 1, 1))
    output, before = torch.empty_like(query), layout.tokens(cache).clone()
    with capturing():
        layer.decode_rows(cache, query, key, value, rows, output)
    if kind is RocketKV:  # else a graph would score few rows at a time
        assert asked == [4 if drafts else 1]
    assert bool(output[:3].isfinite().all())
    for row, length in enumerate(lengths[:3].tolist()):
        held = before[table[row].long()].transpose(0, 1).flatten(1, 2)[:, :length].clone()
        held[:, -1] = torch.cat((key[row], value[row]), -1)
        keys, values = held.split(DIM, -1)
        read = torch.arange(length)
        if top_r[row] and kind is StreamingLLM:  # four sinks, and the newest up to the budget
            read = torch.cat((read[:4], read[4 - 48 :]))
        if not top_r[row] or kind in (SnapKV, StreamingLLM):
            expected = attend(query[row], keys, values, read.expand(KV_HEADS, -1))
            torch.testing.assert_close(output[row], expected)
        if layer.policy.index_width and (top_r[row] or not layer.policy.moves):
            block, place = table[row, (length - 1) // size], (length - 1) % size
            page = keys[:, (length - 1) // layout.page_size * layout.page_size :]
            stored = layout.index(cache)[block, :, :, place // layout.page_size]
            assert stored.equal(torch.cat((page.amin(1), page.amax(1)), -1))


def test_the_end_of_a_prompt_takes_eleven_launches(monkeypatch):
    """Queries that waited in two, then normalisers in two, scores, pool, places in three, rows."""
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 64)
    for name in ("empty", "empty_like"):  # unpoisoned: that is no launch of ours
        monkeypatch.setattr(torch, name, getattr(torch._C._VariableFunctions, name))
    layer = layer_of(RocketKV, 16, monkeypatch)
    content = 2 * DIM + layer.stock_layout.channels // layer.stock_layout.page_size
    cache = torch.randn(65, KV_HEADS, 16, content)
    end = PromptEnd(
        torch.arange(1, 65).int(), 1020, 50, 50, layer.policy.page_sizes[0], 0, 0,
        layer.policy.window, True, torch.tensor([1020, 50]).int(),
    )  # fmt: skip
    parked = _joined([end], -(-layer.policy.window // layer.parking.per_block), 16)
    before = Counter(adversary.LAUNCHES)
    with Operations() as operations:
        layer.compact_together(cache, parked)
    launches = adversary.LAUNCHES - before
    assert launches["_merge_kernel"] == 1, "nothing was split"
    assert launches.total() == 7
    assert operations.found.total() == 4, operations.found


@pytest.mark.parametrize("chains", [1, 2])
def test_prompts_that_end_together_take_one_chain_of_launches(chains, monkeypatch):
    """And each keeps what it keeps alone, whatever the others' lengths and blocks."""
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 1)
    layers = [layer_of(RocketKV, 16, monkeypatch) for _ in range(2)]
    policy, layout = layers[0].policy, layers[0].stock_layout
    if chains == 2:  # room for the two shorter ones
        room = parked_prompts.compacted_bytes(2, 528, 513 - 320, policy, KV_HEADS, 4)
        monkeypatch.setattr(parked_prompts, "MOST_COMPACTED_BYTES", room)
    blocks = torch.randperm(160, generator=torch.Generator().manual_seed(1)).int()
    ends = []
    for length, dropped, shared in ((1020, 50, 40), (300, 9, 9), (513, 20, 0)):
        own, blocks = blocks.split([-(-length // 16), len(blocks) - -(-length // 16)])
        sizes = torch.tensor([length, dropped]).int()
        ends.append(PromptEnd(own, length, dropped, shared, policy.page_sizes[0], 0, 0,
                              policy.window, True, sizes))  # fmt: skip
    content = 2 * DIM + layout.channels // layout.page_size
    caches = [torch.randn(160, KV_HEADS, 16, content) for _ in layers]
    expected = [cache.clone() for cache in caches]
    for layer, cache in zip(layers, expected, strict=True):
        for end in ends:
            layer.compact_parked(cache, end)
    before = Counter(adversary.LAUNCHES)
    parked_prompts.compact_parked(list(zip(layers, caches, strict=True)), ends)
    launches = adversary.LAUNCHES - before
    assert launches["_score_kernel"] == chains * len(layers)
    for cache, alone in zip(caches, expected, strict=True):
        assert cache.equal(alone)


@pytest.mark.parametrize("kind", [Quest, SnapKV, StreamingLLM])
def test_rows_of_an_fp8_cache_are_what_its_numbers_stand_for(kind, monkeypatch):
    """Against the same layer over those numbers themselves; what is new is rounded first."""
    size, key_scale, value_scale = 16, 0.2, 1.6
    scales = Scales(key_scale, value_scale)
    layer = layer_of(kind, size, monkeypatch, scales=scales, query_dtype=torch.float32)
    plain = layer_of(kind, size, monkeypatch)
    layout = layer.stock_layout
    content = 2 * DIM + layout.channels // layout.page_size
    cache = torch.randn(1 + 4 * WIDTH, KV_HEADS, size, content).to(FP8)
    numbers = cache.float()
    layout.tokens(numbers)[..., :DIM] *= key_scale
    layout.tokens(numbers)[..., DIM:] *= value_scale
    if layout.channels:
        layout.index(numbers).mul_(key_scale)
    table = torch.arange(1, 1 + 4 * WIDTH, dtype=torch.int32).view(4, WIDTH)
    lengths, top_r = torch.tensor([100, 97, 90, 0]).int(), torch.tensor([4, 4, 0, 0]).int()
    rows = Rows(table, lengths, top_r, torch.full((4,), -1).int())
    query, key, value = (torch.randn(4, n * KV_HEADS, DIM) for n in (GROUP, 1, 1))
    found, expected = torch.empty_like(query), torch.empty_like(query)
    layer.decode_rows(cache, query, key, value, rows, found)
    new = nearest(key, key_scale), nearest(value, value_scale)
    plain.decode_rows(numbers, query, *new, rows, expected)
    torch.testing.assert_close(found[:3], expected[:3], rtol=1e-4, atol=1e-4)
    kept = layout.tokens(cache).float()
    kept[..., :DIM] *= key_scale
    kept[..., DIM:] *= value_scale
    torch.testing.assert_close(kept, layout.tokens(numbers))
    if kind is Quest:  # else the output would be right whatever scale pages are chosen with
        options = {"policy": layer.policy, "reader": layer._reader, "layout": layout}
        chosen, unscaled = (
            select_tokens(cache, query, table.long(), lengths, scales=used, **options)
            for used in (scales, UNSCALED)
        )
        assert not chosen[:2].equal(unscaled[:2])


class Registered(SnapKV):
    """Brings a fused step of its own, and takes a setting into it."""

    kernel = "mine"
    top_k = 8


def test_a_registered_step_runs_in_place_of_the_policy_s_functions(monkeypatch):
    called = []

    def decode(cache, query, key, value, output, table, *_, top_k, read_all, **further):
        called.append(("decode", top_k, read_all, table.shape))
        output.fill_(1.0)

    def compact(cache, *_, window, **further):
        called.append(("compact", window))

    folders = []

    def mine(folder):
        folders.append(folder)
        return FusedStep(decode, compact, ("window",))

    monkeypatch.setitem(dispatch.FUSED, "mine", mine)
    layer = layer_of(Registered, 16, monkeypatch)
    pages = layer.stock_layout.page_size
    content = 2 * DIM + layer.stock_layout.channels // pages
    cache = torch.randn(1 + WIDTH, KV_HEADS, 16, content)
    table = torch.arange(1, 1 + WIDTH, dtype=torch.int32)
    window = layer.policy.window
    end = PromptEnd(
        table, 100, 2, 2, pages, 0, 0, window, True, torch.tensor([100, 2]).int()
    )  # fmt: skip
    layer.compact_parked(cache, end)
    query, key, value = (torch.randn(1, n * KV_HEADS, DIM) for n in (GROUP, 1, 1))
    output, one = torch.empty_like(query), torch.ones(1).int()
    held = table[None], 68 * one, 68 * one, one
    layer.decode(cache, query, key, value, SparseRows(None, *held, pages), output)
    assert bool(output.eq(1.0).all())
    layer.decode_rows(cache, query, key, value, Rows(table[None], 68 * one, one, -one), output)
    assert called == [("compact", window), *2 * [("decode", 8, False, (1, WIDTH))]]
    assert folders == ["triton"], "looked up once, when the layer is made"


class DropsFirst(Policy):
    """Gives the first blocks up, and reads all of the rest where it lies."""

    Settings = PolicySettings

    def retention(self, prompt_len):
        return Retention(True, 1)


def test_all_that_is_left_in_place_is_read_where_the_stock_kernel_packs_pages():
    """Two rows of 20 and 9 tokens of a cache whose keys and values lie in separate halves."""
    size, lengths = 16, [20, 9]
    policy = make_policy(DropsFirst, block_size=size)
    codec = PageCodec(row_pack, size, DIM, torch.float32, torch.device("cpu"))
    layer = SparseLayer(policy, {1: PageLayout(size, DIM, 1, 0)}, codec, None, reads_all=False)
    cache = torch.full((5, KV_HEADS, size, 2 * DIM), torch.nan)
    table = torch.tensor([[1, 2], [3, 4]]).int()
    query, *stored = tensors(1, (2, GROUP * KV_HEADS, DIM), *2 * [(4, size, KV_HEADS, DIM)])
    for block, key, value in zip(cache[1:, None], *stored, strict=True):
        row_pack(key, value, block.view(1, KV_HEADS, 2 * size, DIM))
    held = torch.tensor(lengths).int()
    rows = SparseRows(None, table, held, held, torch.ones(2).int(), 1)
    output = torch.empty_like(query)
    layer.decode(cache, query, stored[0][:2, 0], stored[1][:2, 0], rows, output)
    for row, length in enumerate(lengths):
        keys, values = (
            part[2 * row : 2 * row + 2].flatten(0, 1)[:length].transpose(0, 1) for part in stored
        )
        all_of_it = torch.arange(length).expand(KV_HEADS, -1)
        expected = attend(query[row], keys, values, all_of_it)
        torch.testing.assert_close(output[row], expected)


def hand_over(lengths):
    split.upload(lengths, torch.device("cpu"))


@pytest.mark.parametrize(
    "step",
    [
        lambda x: int(x.max()),
        lambda x: bool((x > 2).any()),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x[x > 2],
        lambda x: x.nonzero(),
        lambda x: x.masked_fill_(x > 2, 0).equal(x),
        lambda x: x.add_(torch.tensor([1, 2, 3])),
        lambda x: x.index_put_((x > 2,), x[:1]),
        lambda x: torch.repeat_interleave(x),
        hand_over,
    ],
)
def test_what_a_graph_cannot_capture_is_refused(step):
    lengths = torch.tensor([3, 2, 1])
    with capturing(), pytest.raises(CaptureError, match="which no captured graph can"):
        step(lengths)
    step(lengths)
