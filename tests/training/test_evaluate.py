# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""How selectors compare."""

from __future__ import annotations

import json

import torch
from support.training import GEOMETRY, backbone, scaled_backbones, sequences

from vllm_sparse.training.evaluate import Evaluation
from vllm_sparse.training.forecast import Forecast


def test_evaluation_ranks_the_selectors():
    frozen = backbone()
    forecast = Forecast(3, 64, 2, 16)
    forecast.initialise("uniform", frozen, 0)
    report = Evaluation(frozen, GEOMETRY, forecast, queries=0, chunk=50).run(sequences(2))
    assert report.queries == 2 * (256 - 6 * 32)
    recall = {name: values["recall"] for name, values in report.summary().items()}
    assert recall["exact"] == 1
    assert recall["query"] > recall["random"] + 0.1
    assert report.mass["exact"].ge(report.mass["query"] - 1e-9).all()
    assert len(report.table().splitlines()) == 3 + 4
    json.dumps(report.as_dict())


def test_the_look_ahead_is_judged_as_it_is_served():
    """By one vector per KV head, the mean of its queries, as a Forecast that was not trained."""
    frozen = backbone()
    untrained = Forecast(3, 64, 2, 16, bias=True)
    untrained.initialise("lookahead", frozen, 0)
    report = Evaluation(frozen, GEOMETRY, untrained, chunk=50).run(sequences(1))
    for found in (report.recall, report.mass):
        assert torch.equal(found["lookahead-query"], found["forecast"])
        assert not torch.equal(found["lookahead-query"][0], found["query"][0])


def test_selectors_use_the_scale_of_the_model():
    reports = [
        Evaluation(frozen, GEOMETRY, chunk=50).run(sequences(1)) for frozen in scaled_backbones()
    ]
    for kind in ("recall", "mass"):
        first, second = (getattr(report, kind) for report in reports)
        for name in first:
            torch.testing.assert_close(first[name], second[name])
