# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What the comparison of `select_slots` with its reference forgives, and what it does not."""

from __future__ import annotations

import pytest
import torch
from vllm_sparse.kernels.reference.pages import best_slots, page_estimates

from benchmarks.ops import rocketkv
from benchmarks.ops.kernels import call, reference
from benchmarks.ops.registry import Side
from benchmarks.ops.rocketkv_inputs import Case, make_decode

CASE = Case("as long as llama-8b's", 4, 2, 64, 16, 4, 1, 2999, 512)
(SELECT,) = (op for op in rocketkv.STEP if op.kernel == "select_slots")


@pytest.fixture(scope="module")
def step():
    """Arguments of a selection, of one row."""
    generator = torch.Generator().manual_seed(0)
    arguments = make_decode(CASE, torch.device("cpu"), generator)
    call(reference("append_tokens"), arguments)
    return arguments


def found_for(step, slots) -> float:
    """What the comparison says of a kernel that has chosen these."""
    right = call(reference("select_slots"), step)
    return SELECT.compare(Side(slots, step), Side(right, step))


def estimates(step):
    inputs = (step[name] for name in ("cache", "probes", "block_table", "lengths"))
    return page_estimates(*inputs, 0, step["layout"])


def slots_by(step, estimate):
    table, length = step["block_table"][0], step["lengths"][0]
    return best_slots(estimate, table, length, step["layout"], CASE.top_k)[None]


def last_chosen_and_next(estimate):
    """Pages on both sides of the threshold, the newest aside, which comes first."""
    order = estimate[0, :-1].argsort(descending=True)
    return order[126], order[128]  # 127 are taken beside it, and of one more a token


def test_a_swap_within_rounding_is_forgiven(step, monkeypatch):
    estimate = estimates(step)
    worse, better = last_chosen_and_next(estimate)
    tied = estimate.clone()
    tied[0, better] = tied[0, worse] * (1 - 3e-5)
    swapped = tied.clone()
    swapped[0, better] = tied[0, worse] * (1 + 3e-5)
    right, ours = slots_by(step, tied), slots_by(step, swapped)
    assert (right != ours).any()
    monkeypatch.setattr(rocketkv, "page_estimates", lambda *arguments: tied)
    assert SELECT.compare(Side(ours, step), Side(right, step)) <= SELECT.limit


def test_a_page_beside_a_chosen_one_is_not_forgiven(step):
    """Of one page of one KV head only: 0.8 % of what it chooses."""
    right = call(reference("select_slots"), step)
    assert found_for(step, right) <= SELECT.limit
    estimate = estimates(step)
    chosen = estimate[0] >= estimate[0, :-1].sort(descending=True).values[100]
    page = int((chosen[:-2] & ~chosen[1:-1]).nonzero()[0])
    shifted = estimate.clone()
    shifted[0, [page, page + 1]] = estimate[0, [page + 1, page]]
    assert found_for(step, slots_by(step, shifted)) > SELECT.limit


def test_another_token_of_the_page_taken_in_part_is_not_forgiven(step):
    """Its first ones count, whatever its rank."""
    right = call(reference("select_slots"), step)
    page = right[0, 0] // CASE.page_size
    (part,) = (page.bincount() == 1).nonzero()[:, 0].tolist()  # the newest has three tokens
    ours = right.clone()
    ours[0, 0, page == part] += 1
    assert found_for(step, ours) > SELECT.limit
