# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Requests are checked where they come in."""

from __future__ import annotations

import pytest

from vllm_sparse.control import Allowed

pytest.importorskip("vllm")


def test_wrong_requests_are_refused_where_ours_serves(monkeypatch):
    from vllm import PoolingParams, SamplingParams
    from vllm.exceptions import VLLMClientError

    from vllm_sparse.platform import SparseCpuPlatform

    # Tests before this one may have configured an engine in this process.
    monkeypatch.setattr(SparseCpuPlatform, "_vllm_sparse_allowed", None)
    wrong = SamplingParams(extra_args={"vllm_sparse.spars": False})
    SparseCpuPlatform.validate_request({}, wrong)  # another backend serves: no concern of ours
    monkeypatch.setattr(SparseCpuPlatform, "_vllm_sparse_allowed", Allowed())
    for fine in (SamplingParams(), PoolingParams(), SamplingParams(extra_args={"mine": "x"})):
        SparseCpuPlatform.validate_request({}, fine)
    with pytest.raises(ValueError, match=r"vllm_sparse\.spars: unknown") as refused:
        SparseCpuPlatform.validate_request({}, wrong)
    assert isinstance(refused.value, VLLMClientError)  # which the API answers with status 400
