# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Steps that ``vllm-sparse plan`` estimates."""

from __future__ import annotations

import json

import pytest
from support.planner import plan

from vllm_sparse.cli import main


def test_a_measured_bandwidth_scales_the_steps(config, capsys):
    _, estimated = plan(capsys, config(), "--device", "cpu")
    _, measured = plan(capsys, config(), "--device", "cpu", "--bandwidth", "40")
    for name, arm in measured.items():
        assert arm["step_ms"] == pytest.approx(estimated[name]["step_ms"] / 2)
        assert arm["wins_from"] == estimated[name]["wins_from"]
    assert main(["plan", config(), "--bandwidth", "0"]) == 1


def test_a_cpu_pays_for_sparda_s_copies(config, capsys):
    """Each fetched block is read and written once more than a resident one."""
    settings = {"top_k": 65, "local_blocks": 32, "dense_len": 0, "host_gib": 60}
    options = ("--backend", "SPARDA", "--device", "cpu", "--concurrency", "1", "--settings")
    _, fetched = plan(capsys, config(), *options, json.dumps(settings))
    _, resident = plan(capsys, config(), *options, json.dumps({**settings, "resident": True}))
    free, block = 65 - 34, 64 * 128 * 1024
    extra = 1e3 * 2 * 0.25 * free * block / 20e9
    assert fetched["SPARDA"]["step_ms"] - resident["SPARDA"]["step_ms"] == pytest.approx(extra)
    assert fetched["SPARDA"]["wins_from"] is not None
    assert "bookkeeping" in fetched["SPARDA"]["left_out"]
