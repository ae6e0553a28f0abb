# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The pretended GPU refuses what a GPU would, and its graphs replay what was captured."""

from __future__ import annotations

import json

import pytest
from support.forked import PRETENDED_GPU, run_forked

from benchmarks.gpu import machine

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm


def test_it_is_as_strict_as_a_gpu(tmp_path):
    job = {"result": str(tmp_path / "found.json")}
    run_forked("support.pretend_check", job, {**machine.ENVIRONMENT, PRETENDED_GPU: "1"}, 900)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["refused"] == found["expected"]
    assert found["not captured"] == found["expected in captures"]
    assert not found["not captured, wrongly"]
    assert found["devices"] == ["cuda:0", "cpu", "cuda:0"]
    assert found["replayed"] == [[2, 2, 3, 4], [20, 20, 21, 22]]
