# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What schemes keep and read, against the policies and against brute force."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from benchmarks.arms import parse_arm
from benchmarks.quality import candidates
from benchmarks.quality.prompts import Heads
from benchmarks.quality.schemes import (
    Held,
    KeepIdeal,
    Layer,
    ReadBlocks,
    ReadPages,
    ReadTokens,
)
from vllm_sparse.policies import windows
from vllm_sparse.policies.pages import page_extrema
from vllm_sparse.policies.protocol import Shape
from vllm_sparse.policies.quest import Quest, QuestSettings
from vllm_sparse.policies.rocketkv import RocketKVSettings, select_decode_tokens
from vllm_sparse.training.geometry import BlockGeometry

G, GROUP, D, N = 2, 3, 16, 403
SMALL = BlockGeometry(block_size=32, kernel_stride=8, init_blocks=1, local_blocks=1, top_k=6)


def _layer(seed: int = 0) -> Layer:
    generator = torch.Generator().manual_seed(seed)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    heads = G * GROUP
    return Layer(
        some(G, N, D), some(G, N, D), some(heads, 256, D), some(heads, 5, D), {}, D**-0.5,
    )  # fmt: skip


def _grown(layer: Layer, reader, steps: int = 9):
    """Yields held tokens, the query and what was read while tokens are generated."""
    generator = torch.Generator().manual_seed(1)
    held = Held(layer, None, steps)
    for _ in range(steps):
        held.append(*torch.randn(2, G, D, generator=generator))
        query = torch.randn(G, GROUP, D, generator=generator)
        yield held, query, reader(query, held)


@pytest.mark.parametrize(("window", "pool", "count"), [(32, 63, 200), (16, 7, 50), (32, 63, 33)])
def test_what_the_answer_reads_stays(window: int, pool: int, count: int) -> None:
    layer = _layer()
    found = KeepIdeal(window, pool)(layer, count)
    for head in range(G):
        queries = layer.ideal[head * GROUP : head * GROUP + GROUP].flatten(0, 1)
        votes = (queries @ layer.keys[head].T / D**0.5).softmax(-1).sum(0)[: N - window]
        reach = pool // 2
        best = [float(votes[max(n - reach, 0) : n + reach + 1].max()) for n in range(N - window)]
        chosen = sorted(range(N - window), key=lambda n: -best[n])[: count - window]
        assert found[head].tolist() == [*sorted(chosen), *range(N - window, N)]


def test_the_oracle_of_votes_keeps_the_default_s_window() -> None:
    """So that nothing but the votes differs from what is served."""
    heads = Heads(G * GROUP, G, D, D**-0.5)
    oracle = candidates.KINDS["idealvotes"](256, 4096, heads)
    assert oracle.keep == KeepIdeal(window=RocketKVSettings().window)


@pytest.mark.parametrize(("page", "top_r"), [(1, 16), (4, 16), (4, 7), (2, 5)])
def test_pages_are_the_policy_s(page: int, top_r: int) -> None:
    for held, query, read in _grown(_layer(), ReadPages(page, top_r, 61)):
        low, high = page_extrema(held.keys[:, : held.count], page)
        wanted = select_decode_tokens(query.flatten(0, 1), low, high, held.count, page, top_r, 61)
        assert torch.equal(read, wanted)


def test_exact_tokens_and_pages_read_the_most_probability() -> None:
    layer = _layer()
    for held, query, read in _grown(layer, ReadTokens(37)):
        chance = (query @ held.keys[:, : held.count].mT / D**0.5).softmax(-1).sum(1)
        assert torch.equal(read.sort().values, chance.topk(37).indices.sort().values)
    for held, query, read in _grown(layer, ReadPages(4, D, 36, "exact")):
        chance = (query @ held.keys[:, : held.count].mT / D**0.5).softmax(-1).sum(1)
        newest = (held.count - 1) // 4
        mass = [chance[:, 4 * page : 4 * page + 4].sum(1) for page in range(newest)]
        for head in range(G):
            pages = {int(slot) // 4 for slot in read[head]}
            assert newest in pages
            order = sorted(range(newest), key=lambda page: -float(mass[page][head]))
            assert set(order[: len(pages) - 1]) == pages - {newest}


def test_moments_score_by_mean_and_deviation() -> None:
    for held, query, read in _grown(_layer(), ReadPages(4, D, 36, "moments", 0.5)):
        newest = (held.count - 1) // 4
        for head in range(G):
            total = torch.zeros(newest + 1)
            for row in query[head]:
                logits = []
                for page in range(newest + 1):
                    keys = held.keys[head, 4 * page : min(4 * page + 4, held.count)]
                    deviation = keys.std(0, correction=0)
                    bound = row @ keys.mean(0) + 0.5 * (row**2 @ deviation**2).sqrt()
                    logits.append(bound / D**0.5)
                weight = torch.stack(logits).exp()
                sizes = torch.tensor([min(4, held.count - 4 * page) for page in range(newest + 1)])
                total += weight / (weight * sizes).sum()
            pages = {int(slot) // 4 for slot in read[head]}
            order = sorted(range(newest), key=lambda page: -float(total[page]))
            assert newest in pages
            assert set(order[: len(pages) - 1]) == pages - {newest}


@pytest.mark.parametrize("how", ["query", "previous", "exact"])
def test_blocks(how: str) -> None:
    block, top_k, layer = 32, 6, _layer()
    before = layer.last[:, -1].view(G, GROUP, D)  # as a server keeps them with the prompt's blocks
    reader = ReadBlocks(top_k, how, sizes=SMALL)
    for held, query, read in _grown(layer, reader):
        used, before = before if how == "previous" else query, query
        keys, own = held.keys[:, : held.count], (held.count - 1) // block
        if how == "exact":
            chance = (query @ keys.mT / D**0.5).softmax(-1).sum(1)
            score = [[float(chance[g, b * block : b * block + block].sum()) for b in range(own)]
                     for g in range(G)]  # fmt: skip
        else:
            # A query knows the windows that were complete at its own token.
            means = windows.compress_keys(keys[:, : held.count - (how == "previous")], 16, 8)
            share = (used @ means.mT / D**0.5).softmax(-1).sum(1)
            score = [[float(share[g, max(4 * b - 1, 0) : 4 * b + 4].max()) for b in range(own)]
                     for g in range(G)]  # fmt: skip
        for head in range(G):
            free = sorted(range(1, own - 1), key=lambda b: -score[head][b])[: top_k - 3]
            blocks = {int(slot) // block for slot in read[head] if slot >= 0}
            assert blocks == {0, own - 1, own, *free}
            wanted = [slot for slot in range(held.count) if slot // block in blocks]
            assert [int(slot) for slot in read[head] if slot >= 0] == wanted


def test_the_query_before_is_known_from_steps_that_read_everything() -> None:
    blocks, before = N // 32 + 1, None  # 416 tokens; the prompt has 403
    for held, query, read in _grown(_layer(), ReadBlocks(blocks, "previous", sizes=SMALL), 14):
        if read is not None:
            held.last = before
            fresh = ReadBlocks(blocks, "previous", sizes=SMALL)
            assert torch.equal(read, fresh(torch.zeros_like(query), held))
        before = query
    assert read is not None


def test_union_adds_the_step_before() -> None:
    plain, both = ReadBlocks(6, sizes=SMALL), ReadBlocks(6, union=True, sizes=SMALL)
    layer, before = _layer(), None
    for (_, _, read), (_, _, more) in zip(_grown(layer, plain), _grown(layer, both), strict=True):
        now = [{int(slot) for slot in head if slot >= 0} for head in read]
        expected = now if before is None else [a | b for a, b in zip(now, before, strict=True)]
        assert [{int(slot) for slot in head if slot >= 0} for head in more] == expected
        before = now


@pytest.mark.parametrize("name", ["quest-96", "snapkv-96", "streamingllm-96", "rocketkv-256"])
def test_served_policies_by_name(name: str) -> None:
    layer, prompt = _layer(), 1500
    keys = torch.randn(G, prompt, D, generator=torch.Generator().manual_seed(5))
    layer = layer._replace(keys=keys, values=keys)
    network = SimpleNamespace(heads=Heads(G * GROUP, G, D, D**-0.5))
    scheme = candidates.schemes([name], 2048, network)[name]
    count = scheme.count(prompt)
    held = Held(layer, None if count is None else scheme.keep(layer, count), 4)
    read = scheme.read(prompt)
    held.append(*torch.randn(2, G, D))
    slots = read(torch.randn(G, GROUP, D), held)
    if name == "snapkv-96":
        assert count == 128 + prompt % 128
        assert slots is None
    elif name == "streamingllm-96":
        assert count is None
        assert slots.tolist() == [[0, 1, 2, 3, *range(prompt + 1 - 92, prompt + 1)]] * G
    elif name == "rocketkv-256":
        assert count < prompt
        assert slots.shape == (G, 128)
    else:
        assert count is None
        assert slots.shape == (G, 96)
        assert (slots // 16).unique().numel() <= 2 * 7


@pytest.mark.parametrize("name", ["exact-70", "query-5", "quest-70", "window16-256", "stage1-256"])
def test_schemes_know_when_they_leave_nothing_out(name: str) -> None:
    """Which is what their readers do: with so few tokens they choose none."""
    network = SimpleNamespace(heads=Heads(G * GROUP, G, D, D**-0.5))
    scheme, found = candidates.schemes([name], 2048, network)[name], set()
    for prompt in (60, 68, 69, 70, 318, 319, 320, 1200, 1500):
        layer = _layer()
        keys = torch.randn(G, prompt, D, generator=torch.Generator().manual_seed(2))
        layer = layer._replace(keys=keys, values=keys)
        count = scheme.count(prompt)
        less = count is not None and count < prompt
        held = Held(layer, scheme.keep(layer, count) if less else None, 3)
        read = scheme.read(prompt)
        for generated in (2, 3):  # the first token of a reply comes with its prompt
            held.append(*torch.randn(2, G, D))
            less |= read(torch.randn(G, GROUP, D), held) is not None
            assert scheme.leaves_out(prompt, generated) == less, (prompt, generated)
        found.add(less)
    assert found == {False, True}


def test_policies_know_the_model_s_scale() -> None:
    policy = candidates.policy_of(parse_arm("rocket-256"), 2048, Heads(G * GROUP, G, D, 0.125))
    assert policy.shape.logit_scale == 0.125


def test_quest_s_index_grows_with_the_tokens() -> None:
    policy = Quest(
        QuestSettings(token_budget=64, page_size=8, min_context=64), Shape(D, GROUP, 16, 2048)
    )
    for held, query, read in _grown(_layer(), candidates.ReadPolicy(policy, 8)):
        pages = -(-held.count // 8)
        low, high = page_extrema(held.keys[:, : held.count], 8)
        index, count = torch.cat((low, high), -1)[None], torch.tensor([held.count])
        assert index.shape[2] == pages
        assert torch.equal(read, policy.select(query[None], index, count, 8, 64)[0])
