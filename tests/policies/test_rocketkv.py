# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Policy functions against the independent brute force, and their properties."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import rocketkv_bruteforce as brute
from support.policies import make_policy

from vllm_sparse.config import load_settings
from vllm_sparse.policies import rocketkv
from vllm_sparse.policies.attention import attend
from vllm_sparse.policies.votes import top_indices


def _tensors(seed: int, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


@given(
    prompt_len=st.integers(1, 200_000),
    new_tokens=st.integers(0, 4096),
    budget=st.sampled_from([16, 64, 100, 256, 512, 1024, 4096]),
    dim=st.sampled_from([64, 80, 96, 128, 256]),
    sizes=st.sampled_from([None, (1,), (2,), (4,), (1, 2, 4), (2, 8)]),
)
@settings(max_examples=300, deadline=None)
def test_plan_equals_brute_force(prompt_len, new_tokens, budget, dim, sizes):
    ours = rocketkv.plan(prompt_len, new_tokens, budget, dim, page_sizes=sizes)
    assert ours._asdict() == brute.plan(prompt_len, new_tokens, budget, dim, page_sizes=sizes)
    assert 1 <= ours.top_r <= dim
    assert ours.prompt_budget <= prompt_len


def test_plan_reproduces_the_papers_example():
    # 32,128 tokens at t = 512: the split, page and channel count of the paper's worked rows.
    assert rocketkv.plan(32000, 128, 512, 128) == (3186, 3058, 3, 61, 256, False)


def test_the_preset_paper_plans_as_the_paper_does():
    """But that its pages of three tokens are of four, with as many bytes read."""
    own = load_settings({"vllm_sparse": {"config": "paper"}}, "rocketkv")
    assert (own.window, own.pool_kernel) == (32, 63)
    found = set()
    for prompt_len in range(own.min_context + 1, 130_000, 611):
        rest = (prompt_len, own.generation_reserve, own.token_budget, 128)
        ours = rocketkv.plan(*rest, page_sizes=own.page_sizes)
        paper = brute.plan(*rest)
        found.add((paper["page_size"], ours.page_size))
        if paper["page_size"] == 3:
            assert ours.top_r / 4 == pytest.approx(paper["top_r"] / 3, rel=0.02)
        else:
            assert ours._asdict() == paper
    assert found == {(1, 1), (2, 2), (3, 4)}


@pytest.mark.parametrize("scale", [None, 0.05])
@pytest.mark.parametrize("group", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("tokens", [40, 97, 200])
def test_prompt_selection_equals_brute_force(group, tokens, scale):
    query, keys = _tensors(group * tokens, (2 * group, 8, 16), (2, tokens, 16))
    for budget in (8, 9, 30, tokens - 1, tokens, tokens + 5):
        expected = brute.select_prompt_tokens(query, keys, budget, 5, scale=scale)
        ours = rocketkv.select_prompt_tokens(query, keys, budget, 5, scale)
        assert torch.equal(ours, expected)


def test_prompt_selection_with_the_papers_kernel():
    query, keys = _tensors(1, (4, 32, 16), (2, 333, 16))
    expected = brute.select_prompt_tokens(query, keys, 100)
    assert torch.equal(rocketkv.select_prompt_tokens(query, keys, 100), expected)


def test_prompt_selection_breaks_ties_to_the_lowest_position():
    query, keys = torch.zeros(2, 4, 8), torch.zeros(1, 20, 8)  # every score is equal
    kept = rocketkv.select_prompt_tokens(query, keys, 9, 3)
    assert kept.tolist() == [[0, 1, 2, 3, 4, 16, 17, 18, 19]]


def test_prompt_selection_refuses_a_budget_below_the_window():
    query, keys = _tensors(0, (2, 8, 16), (1, 40, 16))
    with pytest.raises(ValueError, match="smaller than the window"):
        rocketkv.select_prompt_tokens(query, keys, 7)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.data())
@settings(max_examples=200, deadline=None)
def test_top_indices_with_ties(values, data):
    count = data.draw(st.integers(0, len(values)))
    chosen = top_indices(torch.tensor(values, dtype=torch.float32), count)
    expected = sorted(sorted(range(len(values)), key=lambda i: (-values[i], i))[:count])
    assert chosen.tolist() == expected


@pytest.mark.parametrize("page_size", [1, 2, 3, 4])
@pytest.mark.parametrize("tokens", [1, 5, 8, 13])
def test_page_extrema_equal_brute_force(tokens, page_size):
    (keys,) = _tensors(tokens, (3, tokens, 8))
    for ours, expected in zip(
        rocketkv.page_extrema(keys, page_size), brute.page_extrema(keys, page_size), strict=True
    ):
        assert torch.equal(ours, expected.float())


@pytest.mark.parametrize("force_newest", [True, False])
@pytest.mark.parametrize("group", [1, 2, 5, 16])
@pytest.mark.parametrize("page_size", [1, 2, 3, 4])
@pytest.mark.parametrize(("tokens", "scale"), [(3, None), (37, None), (90, None), (90, 0.03)])
def test_decode_selection_equals_brute_force(tokens, scale, page_size, group, force_newest):
    query, keys = _tensors(tokens + group, (2 * group, 16), (2, tokens, 16))
    low, high = rocketkv.page_extrema(keys, page_size)
    for top_r, top_k in ((1, 8), (7, 13), (16, 32), (16, tokens), (5, tokens + 3)):
        given = query, low, high, tokens, page_size, top_r, top_k
        options = {"force_newest": force_newest, "scale": scale}
        ours = rocketkv.select_decode_tokens(*given, **options)
        expected = brute.select_decode_tokens(*given, **options)
        assert ours.tolist() == expected


def test_decode_selection_with_every_channel_and_page_size_one_is_exact_top_k():
    query, keys = _tensors(3, (2, 16), (2, 50, 16))  # one query head per KV head
    chosen = rocketkv.select_decode_tokens(query, keys, keys, 50, 1, 16, 10, force_newest=False)
    exact = (keys @ query.unsqueeze(-1)).squeeze(-1).topk(10).indices.sort(-1).values
    assert torch.equal(chosen, exact)


@pytest.mark.parametrize("scale", [None, 0.3])
def test_attend_equals_brute_force(scale):
    query, keys, values = _tensors(4, (6, 16), (2, 30, 16), (2, 30, 16))
    index = torch.tensor([[0, 3, 29], [5, 6, 7]])
    ours = attend(query, keys, values, index, scale)
    torch.testing.assert_close(ours, brute.attend(query, keys, values, index, scale))


def test_attend_to_everything_is_dense_attention():
    query, keys, values = _tensors(5, (6, 16), (2, 30, 16), (2, 30, 16))
    dense = torch.nn.functional.scaled_dot_product_attention(
        query[None, :, None], keys[None], values[None], enable_gqa=True
    )
    everything = torch.arange(30).expand(2, -1)
    torch.testing.assert_close(attend(query, keys, values, everything), dense[0, :, 0])


# -- retention -------------------------------------------------------------------------------------


@given(st.integers(1, 32768), st.sampled_from([16, 32, 128]), st.sampled_from([64, 256, 1024]))
@settings(max_examples=300, deadline=None)
def test_the_tail_holds_the_papers_capacity(prompt_len, block_size, budget):
    policy = make_policy(block_size=block_size, token_budget=budget, max_model_len=32768)
    retention = policy.retention(prompt_len)
    reserve = min(32, 32768 - prompt_len)
    capacity = rocketkv.plan(prompt_len, reserve, budget, 16, 8, (4,)).capacity
    kept = prompt_len - retention.dropped_blocks * block_size
    if not retention.sparse:
        assert retention.dropped_blocks == 0
        assert retention.reason in ("short_prompt", "fits_budget")
        return
    assert retention.dropped_blocks >= 1
    assert kept >= min(capacity, prompt_len)
    # Full tail blocks beyond the capacity would be memory kept for nothing.
    smallest = max(-(-capacity // block_size), policy.room_for_window())
    assert prompt_len // block_size - retention.dropped_blocks == smallest


def test_parked_queries_fit_into_blocks_that_exist_before_the_prompt_ends():
    for block_size in (16, 32, 128):
        for group in (1, 2, 4, 7):
            policy = make_policy(block_size=block_size, group_size=group, window=32)
            room = 2 * (block_size // 4) // group
            for prompt_len in range(65, 2000, 7):
                retention = policy.retention(prompt_len)
                if retention.sparse:
                    first_query = prompt_len - 32
                    whole = first_query // block_size - retention.dropped_blocks
                    assert whole * room >= 32


def test_without_stage1_nothing_is_dropped_but_long_prompts_are_sparse():
    retention = make_policy(stage1=False).retention(1000)
    assert retention.sparse
    assert retention.dropped_blocks == 0
    assert make_policy(stage1=False).publishable_tokens(1000) == 0


def test_short_and_fitting_prompts_stay_dense_and_shared():
    assert make_policy().retention(64).reason == "short_prompt"
    assert make_policy(token_budget=4096).retention(1000).reason == "fits_budget"
    assert make_policy().publishable_tokens(64) is None
