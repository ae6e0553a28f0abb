# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Scores of prompt tokens."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from support.kernels import DEVICE
from support.pages import PROMPTS, make_prompts, packed_views
from vllm_sparse.kernels.layout import PageLayout
from vllm_sparse.kernels.reference import prompt as ref_prompt
from vllm_sparse.kernels.triton import prompt, topk

from vllm_sparse.policies import rocketkv as policy


@pytest.mark.usefixtures("_splitting_rows")
@pytest.mark.parametrize("shape", PROMPTS, ids=lambda s: f"{s['dim']}-{s['group']}-{s['dtype']}")
def test_prompt_scores_equal_reference(shape):
    cache, table, lens, query = make_prompts([351, 0, 130, 9], **shape)
    layout = PageLayout(shape["block_size"], shape["dim"], shape["page_size"])
    keys, _ = packed_views(cache, layout)
    expected, actual = (
        kernel.score_prompt(query, keys, table, lens, pool_kernel=63, scale=0.3)
        for kernel in (ref_prompt, prompt)
    )
    for row in (0, 2, 3):
        torch.testing.assert_close(actual[row], expected[row], rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("_splitting_rows")
@pytest.mark.parametrize("scale", [0.125, 0.02])
@pytest.mark.parametrize("budget", [8, 9, 100, 300])
def test_gathered_keys_select_what_the_policy_selects(budget, scale):
    """Keys that lie together are one block of as many tokens."""
    generator = torch.Generator().manual_seed(budget)
    keys = torch.randn(2, 301, 64, generator=generator).to(DEVICE)
    query = torch.randn(6, 8, 64, generator=generator).to(DEVICE)
    table = torch.zeros(1, 1, dtype=torch.int32, device=DEVICE)
    lens = torch.tensor([301], dtype=torch.int32, device=DEVICE)
    score = prompt.score_prompt(query[None], keys[None], table, lens, pool_kernel=7, scale=scale)
    index = topk.top_indices(score, lens - 8, lens - 301 + budget - 8, max(budget - 8, 1))
    expected = policy.select_prompt_tokens(query, keys, budget, 7, scale)
    assert torch.equal(index[0, :, : budget - 8].long(), expected[:, : budget - 8])
