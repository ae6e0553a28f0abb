# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Pages and the tokens of the best ones, against the independent brute force."""

from __future__ import annotations

import pytest
import torch
from reference import rocketkv_bruteforce as brute
from support.policies import tensors

from vllm_sparse.policies import rocketkv


@pytest.mark.parametrize("page_size", [1, 2, 3, 4])
@pytest.mark.parametrize("tokens", [1, 5, 8, 13])
def test_page_extrema_equal_brute_force(tokens, page_size):
    (keys,) = tensors(tokens, (3, tokens, 8))
    for ours, expected in zip(
        rocketkv.page_extrema(keys, page_size), brute.page_extrema(keys, page_size), strict=True
    ):
        assert torch.equal(ours, expected.float())


@pytest.mark.parametrize("force_newest", [True, False])
@pytest.mark.parametrize("group", [1, 2, 5, 16])
@pytest.mark.parametrize("page_size", [1, 2, 3, 4])
@pytest.mark.parametrize(("tokens", "scale"), [(3, None), (37, None), (90, None), (90, 0.03)])
def test_decode_selection_equals_brute_force(tokens, scale, page_size, group, force_newest):
    query, keys = tensors(tokens + group, (2 * group, 16), (2, tokens, 16))
    low, high = rocketkv.page_extrema(keys, page_size)
    for top_r, top_k in ((1, 8), (7, 13), (16, 32), (16, tokens), (5, tokens + 3)):
        given = query, low, high, tokens, page_size, top_r, top_k
        options = {"force_newest": force_newest, "scale": scale}
        ours = rocketkv.select_decode_tokens(*given, **options)
        expected = brute.select_decode_tokens(*given, **options)
        assert ours.tolist() == expected


@pytest.mark.parametrize("elsewhere", [0, 0.01])
def test_decode_selection_knows_queries_by_their_direction(elsewhere):
    """However short they are, channels that are left out sharpen the rest; but there may be none.

    A head whose query is zero, at least in the channels of its group, wants every token as much as
    any other.
    """
    query, keys = tensors(11, (6, 16), (2, 90, 16))
    query[0, :8] *= 10
    query[1, :8], query[1, 8:] = 0, elsewhere
    bounds = rocketkv.page_extrema(keys, 2)
    for shrink in (1, 1e-2, 1e-6):
        given = query * shrink, *bounds, 90, 2, 5, 31
        ours = rocketkv.select_decode_tokens(*given, scale=2 / shrink)
        assert ours.tolist() == brute.select_decode_tokens(*given, scale=2 / shrink)


def test_decode_selection_with_every_channel_and_page_size_one_is_exact_top_k():
    query, keys = tensors(3, (2, 16), (2, 50, 16))  # one query head per KV head
    chosen = rocketkv.select_decode_tokens(query, keys, keys, 50, 1, 16, 10, force_newest=False)
    exact = (keys @ query.unsqueeze(-1)).squeeze(-1).topk(10).indices.sort(-1).values
    assert torch.equal(chosen, exact)
