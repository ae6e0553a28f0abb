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
    # The first layer's look-ahead is its own query.
    torch.testing.assert_close(report.recall["lookahead-query"][0], report.recall["query"][0])
    assert report.mass["exact"].ge(report.mass["query"] - 1e-9).all()
    assert len(report.table().splitlines()) == 3 + 4
    json.dumps(report.as_dict())


def test_selectors_use_the_scale_of_the_model():
    reports = [
        Evaluation(frozen, GEOMETRY, chunk=50).run(sequences(1)) for frozen in scaled_backbones()
    ]
    for kind in ("recall", "mass"):
        first, second = (getattr(report, kind) for report in reports)
        for name in first:
            torch.testing.assert_close(first[name], second[name])
