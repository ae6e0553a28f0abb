# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Inputs of SPARDA's operations."""

from __future__ import annotations

import pytest
import torch

from benchmarks.ops.sparda_inputs import pinned

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm


def test_pinned_memory_is_found_pinned(monkeypatch):
    """PyTorch asks of the beginning of the storage; else vLLM shows a device a copy."""
    registered = []
    monkeypatch.setattr(
        "vllm.v1.simple_kv_offload.cuda_mem_ops.pin_tensor",
        lambda tensor: registered.append(tensor.data_ptr()),
    )
    monkeypatch.setattr(
        "vllm.utils.torch_utils.get_accelerator_view_from_cpu_tensor", lambda host: host
    )
    values = torch.arange(3000.0).view(3, -1)
    host, seen = pinned(values, torch.device("cuda"))
    assert seen is host
    assert host.equal(values)
    assert registered == [host.untyped_storage().data_ptr()]
