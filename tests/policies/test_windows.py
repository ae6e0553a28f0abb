# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""SparDA's policy functions against the independent brute force, and their properties."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import sparda_bruteforce as brute
from support.policies import tensors

from vllm_sparse.policies import sparda

WINDOW = {"kernel_size": 8, "kernel_stride": 4}
SMALL = {"block_size": 16, "kernel_stride": 4, "init_blocks": 1, "local_blocks": 2}


def _compare(ours: torch.Tensor, expected: list, **tolerance: float) -> None:
    expected = torch.tensor(expected, dtype=torch.float64).view(ours.shape)
    torch.testing.assert_close(
        ours.double(), expected, **(tolerance or {"atol": 1e-5, "rtol": 1e-5})
    )


def _brute_select(scores, positions, top_k, **options):
    options = {
        "block_size": 64,
        "init_blocks": 1,
        "local_blocks": 32,
        "kernel_stride": 16,
    } | options
    stride = options.pop("kernel_stride")
    return brute.select_blocks(scores, positions, top_k=top_k, stride=stride, **options)


# ---- windows and compressed keys -----------------------------------------------------------------


@given(tokens=st.integers(0, 400), stride=st.sampled_from([1, 3, 8, 16]))
@settings(deadline=None)
def test_window_count_equals_brute_force(tokens, stride):
    expected = len(brute.complete_windows(tokens, 2 * stride, stride))
    assert sparda.num_windows(tokens, 2 * stride, stride) == expected


@pytest.mark.parametrize("tokens", [0, 1, 31, 32, 33, 47, 48, 63, 64, 65, 95, 96, 130])
def test_compressed_keys_equal_brute_force(tokens):
    (keys,) = tensors(tokens, (2, tokens, 16))
    ours = sparda.compress_keys(keys)
    assert ours.shape == (2, sparda.num_windows(tokens), 16)
    assert ours.dtype == torch.float32
    _compare(ours, brute.compress_keys(keys))


@pytest.mark.parametrize("dim", [16, 64, 128])
def test_compressed_bfloat16_keys_are_averaged_in_float32(dim):
    (keys,) = tensors(dim, (2, 75, dim))
    keys = (100 * keys + 300.0).bfloat16()
    ours = sparda.compress_keys(keys)
    assert ours.dtype == torch.bfloat16
    # One rounding, at the end, by at most half a unit in the last place.
    _compare(ours, brute.compress_keys(keys), atol=1e-6, rtol=2.0**-8 + 1e-6)


@pytest.mark.parametrize(("kernel", "stride"), [(8, 4), (16, 8), (4, 2), (64, 32)])
def test_compressed_keys_with_another_window(kernel, stride):
    (keys,) = tensors(kernel, (3, 3 * kernel + stride + 1, 8))
    ours = sparda.compress_keys(keys, kernel, stride)
    _compare(ours, brute.compress_keys(keys, kernel, stride))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compressing_token_by_token_equals_compressing_at_once(dtype):
    (keys,) = tensors(3, (2, 150, 32))
    keys = keys.to(dtype)
    batch, grown = sparda.compress_keys(keys), []
    for tokens in range(1, 151):
        if sparda.num_windows(tokens) > sparda.num_windows(tokens - 1):
            grown.append(sparda.compress_keys(keys[:, tokens - 32 : tokens]))
        assert torch.equal(sparda.compress_keys(keys[:, :tokens]), batch[:, : len(grown)])
    assert torch.equal(torch.cat(grown, dim=1), batch)


# ---- window scores -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("groups", "dim"), [(1, 16), (2, 64), (3, 128)])
def test_forecast_scores_equal_brute_force(groups, dim, dtype):
    forecast, keys = (x.to(dtype) for x in tensors(dim, (groups, 5, dim), (groups, 7, dim)))
    ours = sparda.forecast_scores(forecast, keys)
    assert ours.dtype == torch.float32
    _compare(ours, brute.forecast_scores(forecast, keys), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [16, 128])
@pytest.mark.parametrize("group", [1, 2, 3, 7, 16])
def test_query_scores_equal_brute_force(group, dim, dtype):
    # Before the first window, at the borders of windows, and past the last one.
    positions = torch.tensor([0, 30, 31, 32, 46, 47, 100, 158, 159, 160, 175])
    shapes = (2 * group, len(positions), dim), (2, 9, dim)
    query, keys = (x.to(dtype) for x in tensors(group * dim, *shapes))
    ours = sparda.query_scores(query, keys, positions)
    assert ours.dtype == torch.float32
    _compare(ours, brute.query_scores(query, keys, positions))
    assert not ours[:, :2].any()
    visible = torch.tensor([0, 0, 1, 1, 1, 2, 5, 8, 9, 9, 9])
    assert (ours > 0).sum(-1).tolist() == [visible.tolist()] * 2
    torch.testing.assert_close(ours.sum(-1), torch.where(visible > 0, group, 0.0).expand(2, -1))


def test_query_scores_with_another_window_and_scale():
    query, keys = tensors(8, (6, 4, 16), (2, 9, 16))
    positions = torch.tensor([6, 7, 22, 60])
    ours = sparda.query_scores(query, keys, positions, **WINDOW, scale=0.7)
    _compare(ours, brute.query_scores(query, keys, positions, 8, 4, 0.7))


def test_query_scores_of_extreme_logits_are_finite():
    query, keys = tensors(9, (4, 2, 16), (2, 6, 16))
    ours = sparda.query_scores(200 * query, 200 * keys, torch.tensor([40, 111]))
    _compare(ours, brute.query_scores(200 * query, 200 * keys, [40, 111]))


def test_scores_without_a_window():
    query, keys = torch.ones(4, 3, 16), torch.ones(2, 0, 16)
    assert sparda.query_scores(query, keys, torch.arange(3)).shape == (2, 3, 0)
    assert sparda.forecast_scores(query[:2], keys).shape == (2, 3, 0)


# ---- block scores --------------------------------------------------------------------------------


@given(
    windows=st.integers(0, 40),
    blocks=st.integers(1, 14),
    per_block=st.sampled_from([2, 4, 8]),
    seed=st.integers(0, 99),
)
@settings(deadline=None)
def test_block_scores_equal_brute_force(windows, blocks, per_block, seed):
    (scores,) = tensors(seed, (2, 3, windows))
    ours = sparda.block_scores(scores, blocks, per_block)
    expected = [
        [[brute.block_score(row, m, per_block) for m in range(blocks)] for row in of_group]
        for of_group in scores.tolist()
    ]
    _compare(ours, expected, atol=0.0, rtol=0.0)


def test_a_block_is_scored_by_the_windows_that_overlap_it():
    for window in range(20):
        scores = torch.zeros(1, 1, 20)
        scores[..., window] = 1.0
        scored = sparda.block_scores(scores, 6)[0, 0].nonzero().flatten().tolist()
        tokens = range(16 * window, 16 * window + 32)
        assert [m for m in scored if m < 5] == sorted({t // 64 for t in tokens} & {*range(5)})


# ---- selection -----------------------------------------------------------------------------------


@given(
    stride=st.sampled_from([4, 16]),
    per_block=st.sampled_from([2, 4]),
    init=st.integers(0, 3),
    local=st.integers(0, 3),
    extra=st.integers(0, 6),
    length=st.integers(1, 700),
    lag=st.integers(0, 2),
    levels=st.sampled_from([1, 2, 5, None]),
    seed=st.integers(0, 999),
)
@settings(max_examples=300, deadline=None)
def test_selection_equals_brute_force(
    stride, per_block, init, local, extra, length, lag, levels, seed
):
    # Few levels make many ties; ``lag`` newest windows are missing, as when computed ahead.
    generator = torch.Generator().manual_seed(seed)
    windows = max(0, sparda.num_windows(length, 2 * stride, stride) - lag)
    scores = torch.randn(2, 6, windows, generator=generator)
    if levels is not None:
        scores = torch.randint(levels, scores.shape, generator=generator).float()
    positions = torch.randint(length, (6,), generator=generator)
    positions[0] = length - 1
    options = {
        "block_size": per_block * stride,
        "init_blocks": init,
        "local_blocks": local,
        "top_k": init + local + 1 + extra,
        "kernel_stride": stride,
    }
    ours = sparda.select_blocks(scores, positions, **options)
    assert ours.dtype == torch.int64
    assert ours.tolist() == _brute_select(scores, positions, **options)


@pytest.mark.parametrize("position", [0, 63, 64, 2111, 2112, 6143, 6144, 20_000, 65_535])
def test_selection_with_the_checkpoint_defaults(position):
    windows = sparda.num_windows(position + 1)
    (scores,) = tensors(position, (2, 1, windows))
    ours = sparda.select_blocks(scores, torch.tensor([position]))
    assert ours.tolist() == _brute_select(scores, [position], top_k=96)
    own = position // 64
    for row in ours[:, 0].tolist():
        chosen = [m for m in row if m >= 0]
        assert len(chosen) == min(96, own + 1)
        assert {0, *range(max(0, own - 32), own + 1)} <= set(chosen)


def test_selection_of_a_budget_beyond_the_context_is_everything():
    (scores,) = tensors(5, (2, 3, 20))
    ours = sparda.select_blocks(scores, torch.tensor([5, 64, 350]), local_blocks=1, top_k=9)
    padded = [[0, *[-1] * 8], [0, 1, *[-1] * 7], [0, 1, 2, 3, 4, 5, -1, -1, -1]]
    assert ours.tolist() == [padded, padded]


def test_equal_scores_favour_the_lower_block():
    scores = torch.zeros(1, 1, 60)
    ours = sparda.select_blocks(scores, torch.tensor([64 * 15]), local_blocks=1, top_k=6)
    assert ours.tolist() == [[[0, 1, 2, 3, 14, 15]]]
    scores[..., 4 * 7 - 1] = 1.0  # the window that blocks 6 and 7 share
    ours = sparda.select_blocks(scores, torch.tensor([64 * 15]), local_blocks=1, top_k=4)
    assert ours.tolist() == [[[0, 6, 14, 15]]]


def test_blocks_without_a_window_come_last():
    # Scores of the first two blocks only, all negative: they still beat blocks 2 and 3.
    scores = torch.full((1, 1, 8), -5.0)
    position = torch.tensor([64 * 6])
    options = {"init_blocks": 0, "local_blocks": 1}
    ours = sparda.select_blocks(scores, position, top_k=4, **options)
    assert ours.tolist() == [[[0, 1, 5, 6]]]
    ours = sparda.select_blocks(scores, position, top_k=6, **options)
    assert ours.tolist() == [[[0, 1, 2, 3, 5, 6]]]


@pytest.mark.parametrize(("init", "local"), [(1, 2), (0, 3), (4, 0)])
def test_selection_refuses_a_budget_below_the_forced_blocks(init, local):
    scores, position = torch.zeros(1, 1, 60), torch.tensor([900])
    options = {"init_blocks": init, "local_blocks": local}
    with pytest.raises(ValueError, match="always read"):
        sparda.select_blocks(scores, position, top_k=init + local, **options)
    ours = sparda.select_blocks(scores, position, top_k=init + local + 1, **options)
    assert ours.tolist() == [[[*range(init), *range(14 - local, 15)]]]


def test_selection_of_no_tokens():
    assert sparda.select_blocks(torch.zeros(2, 0, 5), torch.zeros(0).long()).shape == (2, 0, 96)


# ---- from keys to blocks -------------------------------------------------------------------------


@pytest.mark.parametrize("group", [1, 4, 16])
@pytest.mark.parametrize("tokens", [5, 33, 200, 257, 400])
def test_whole_selection_equals_brute_force(tokens, group):
    keys, query, forecast = tensors(tokens, (2, tokens, 16), (2 * group, 4, 16), (2, 4, 16))
    positions = torch.tensor([0, tokens // 3, tokens // 2, tokens - 1])
    compressed = sparda.compress_keys(keys, 8, 4)
    expected = torch.tensor(brute.compress_keys(keys, 8, 4)).view(2, -1, 16)
    for ours, theirs in (
        (
            sparda.query_scores(query, compressed, positions, **WINDOW),
            brute.query_scores(query, expected, positions, 8, 4),
        ),
        (sparda.forecast_scores(forecast, compressed), brute.forecast_scores(forecast, expected)),
    ):
        theirs = torch.tensor(theirs).view(ours.shape)
        chosen = sparda.select_blocks(ours, positions, top_k=7, **SMALL)
        assert chosen.tolist() == _brute_select(theirs, positions, top_k=7, **SMALL)


def _scores(selector, vectors, keys, positions):
    compressed = sparda.compress_keys(keys, 8, 4)
    if selector == "query":
        return sparda.query_scores(vectors, compressed, positions, **WINDOW)
    return sparda.forecast_scores(vectors, compressed)


def _blocks(selector, vectors, keys, positions):
    scores = _scores(selector, vectors, keys, positions)
    return sparda.select_blocks(scores, positions, top_k=6, **SMALL)


TOKENS = 230


def _inputs(selector: str, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    heads = 6 if selector == "query" else 2
    keys, vectors = tensors(seed, (2, TOKENS, 16), (heads, TOKENS, 16))
    return keys, vectors


@pytest.mark.parametrize("selector", ["forecast", "query"])
def test_selection_is_causal(selector):
    keys, vectors = _inputs(selector, 1)
    positions = torch.arange(TOKENS)
    before = _blocks(selector, vectors, keys, positions)
    assert len({tuple(row) for row in before[0].tolist()}) > 50
    for token in (15, 16, 50, 127, 128, 200):
        changed = keys.clone()
        changed[:, token + 1 :] *= -50.0
        after = _blocks(selector, vectors, changed, positions)
        assert torch.equal(after[:, : token + 1], before[:, : token + 1])
        assert token > 190 or not torch.equal(after, before)
    own = (positions // 16).view(1, -1, 1)
    assert bool((before <= own).all())


@given(cuts=st.lists(st.integers(1, TOKENS - 1), max_size=6, unique=True), seed=st.integers(0, 20))
@settings(max_examples=40, deadline=None)
@pytest.mark.parametrize("selector", ["forecast", "query"])
def test_selection_does_not_depend_on_the_chunks_of_a_prompt(selector, cuts, seed):
    keys, vectors = _inputs(selector, seed)
    positions = torch.arange(TOKENS)
    at_once = _blocks(selector, vectors, keys, positions)
    borders = [0, *sorted(cuts), TOKENS]
    for first, end in itertools.pairwise(borders):
        chunk = _blocks(selector, vectors[:, first:end], keys[:, :end], positions[first:end])
        assert torch.equal(chunk, at_once[:, first:end])


@pytest.mark.parametrize("selector", ["forecast", "query"])
def test_a_decode_step_equals_the_row_of_a_prefill(selector):
    keys, vectors = _inputs(selector, 2)
    prefill = _blocks(selector, vectors, keys, torch.arange(TOKENS))
    for i in range(TOKENS):
        step = _blocks(selector, vectors[:, i : i + 1], keys[:, : i + 1], torch.tensor([i]))
        assert torch.equal(step[:, 0], prefill[:, i])


@pytest.mark.parametrize("lag", [1, 2, 5, 12])
def test_forecast_selection_needs_no_recent_window(lag):
    """It may run a layer ahead, before this token's key and the newest windows exist."""
    keys, vectors = _inputs("forecast", 3)
    for i in range(TOKENS):
        at, vector = torch.tensor([i]), vectors[:, i : i + 1]
        scores = _scores("forecast", vector, keys[:, : i + 1], at)
        complete = sparda.select_blocks(scores, at, top_k=6, **SMALL)
        # Only the windows that end within or after the local blocks may be missing.
        first_local = (i // 16 - SMALL["local_blocks"]) * 16
        needed = max(0, sparda.num_windows(first_local + 4, 8, 4))
        kept = max(needed, scores.shape[-1] - lag)
        stale = sparda.select_blocks(scores[..., :kept], at, top_k=6, **SMALL)
        assert torch.equal(stale, complete)
        poisoned = scores.clone()
        poisoned[..., kept:] = 1e9
        assert torch.equal(sparda.select_blocks(poisoned, at, top_k=6, **SMALL), complete)
        future = torch.cat([scores, torch.full((2, 1, 9), 1e9)], dim=-1)
        assert torch.equal(sparda.select_blocks(future, at, top_k=6, **SMALL), complete)


def test_without_local_blocks_the_newest_windows_would_matter():
    """The property above is not vacuous."""
    keys, vectors = _inputs("forecast", 3)
    options = {**SMALL, "local_blocks": 0, "top_k": 4}
    differs = 0
    for i in range(100, TOKENS):
        at = torch.tensor([i])
        scores = _scores("forecast", vectors[:, i : i + 1], keys[:, : i + 1], at)
        complete = sparda.select_blocks(scores, at, **options)
        differs += not torch.equal(sparda.select_blocks(scores[..., :-4], at, **options), complete)
    assert differs > 0


@pytest.mark.parametrize("selector", ["forecast", "query"])
def test_selection_of_a_row_ignores_the_rows_beside_it(selector):
    keys, vectors = _inputs(selector, 4)
    order = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(0))
    ordered = _blocks(selector, vectors, keys, torch.arange(TOKENS))
    assert torch.equal(_blocks(selector, vectors[:, order], keys, order), ordered[:, order])


@pytest.mark.parametrize("selector", ["forecast", "query"])
def test_a_batch_equals_its_requests_one_by_one(selector):
    inputs = [_inputs(selector, seed) for seed in (7, 8, 9)]
    # Short and long rows in one request and across requests.
    positions = torch.tensor([[3, 60, 9, 99], [TOKENS - 1, 40, 16, 17], [130, 131, 0, 200]])
    keys = torch.stack([k for k, _ in inputs])
    vectors = torch.stack([v[:, at] for (_, v), at in zip(inputs, positions, strict=True)])
    compressed = torch.stack([sparda.compress_keys(k, 8, 4) for k in keys])
    if selector == "query":
        scores = sparda.query_scores(vectors, compressed, positions, **WINDOW)
    else:
        scores = sparda.forecast_scores(vectors, compressed)
    batch = sparda.select_blocks(scores, positions, top_k=6, **SMALL)
    assert batch.shape == (3, 2, 4, 6)
    for b, at in enumerate(positions):
        alone = _scores(selector, vectors[b], keys[b], at)
        torch.testing.assert_close(scores[b], alone)
        assert batch[b].tolist() == _brute_select(alone, at, top_k=6, **SMALL)
        pooled = sparda.block_scores(scores, 15)[b]
        assert torch.equal(pooled, sparda.block_scores(scores[b], 15))


def test_forecast_ranking_needs_no_scale():
    keys, vectors = _inputs("forecast", 6)
    positions = torch.arange(TOKENS)
    scores = _scores("forecast", vectors, keys, positions)
    blocks = sparda.select_blocks(scores, positions, top_k=6, **SMALL)
    scaled = sparda.select_blocks(scores / math.sqrt(16), positions, top_k=6, **SMALL)
    assert torch.equal(scaled, blocks)
