# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What the block benchmark sums up of a tiny model, against the same counted one by one."""

from __future__ import annotations

import pytest
import torch
from support.training import backbone

from benchmarks import blocks
from vllm_sparse.policies import sparda
from vllm_sparse.training.evaluate import forecasts_of

TOKENS, STEPS, TOP = 700, 5, 6


@pytest.fixture(scope="module")
def measured():
    frozen = backbone()
    tokens = torch.randint(0, 64, (TOKENS,), generator=torch.Generator().manual_seed(1))
    probe = blocks.Probe(frozen, [TOP, 8], forecasts_of(frozen, None))
    probe.add(tokens.tolist(), STEPS)
    views = []
    frozen.run(tokens, views.append)
    return probe.result(), views


def test_every_selector_has_shares_of_every_layer(measured):
    found, views = measured
    assert found["steps"] == STEPS
    assert list(found["selectors"]) == ["exact", "query", "lookahead-query", "previous"]
    for selector in found["selectors"].values():
        for row in selector.values():
            assert len(row["captured_by_layer"]) == len(row["miss_rate_by_layer"]) == len(views)
            assert 0 < row["captured"] <= 1
            assert 0 <= row["miss_rate"] <= 1
    for top in (str(TOP), "8"):
        best = found["selectors"]["exact"][top]["captured"]
        assert all(selector[top]["captured"] <= best for selector in found["selectors"].values())


def test_the_query_selector_counted_one_by_one(measured):
    found, views = measured
    row = found["selectors"]["query"][str(TOP)]
    for layer, view in enumerate(views):
        keys, (kv_heads, count, dim) = sparda.compress_keys(view.keys), view.keys.shape
        forced_mass = all_mass = captured = 0.0
        new = picks = 0
        before = None
        for position in range(TOKENS - STEPS, TOKENS):
            at = torch.tensor([position])
            scores = sparda.query_scores(view.query[:, at], keys, at)
            geometry = {"init_blocks": 1, "local_blocks": 2, "top_k": TOP}
            chosen = sparda.select_blocks(scores, at, **geometry)[:, 0].tolist()
            own = position // 64
            for head in range(kv_heads):
                query = view.query.view(kv_heads, -1, count, dim)[head, :, position]
                weights = (query @ view.keys[head, : position + 1].T * dim**-0.5).softmax(-1).sum(0)
                mass = [float(weights[n * 64 : n * 64 + 64].sum()) for n in range(own + 1)]
                forced = {0, own, own - 1, own - 2}
                free = set(chosen[head]) - forced
                all_mass += sum(mass)
                forced_mass += sum(mass[n] for n in forced)
                captured += sum(mass[n] for n in free)
                if before is not None:
                    picks += len(free)
                    new += len(free - set(before[head]))
            before = chosen
        share = forced_mass / all_mass
        assert found["forced_share_by_layer"][layer] == pytest.approx(share, abs=2e-4)
        expected = captured / (all_mass - forced_mass)
        assert row["captured_by_layer"][layer] == pytest.approx(expected, abs=2e-4)
        assert row["miss_rate_by_layer"][layer] == pytest.approx(new / picks, abs=1e-4)
