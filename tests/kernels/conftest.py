# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Kernels in Triton's interpreter, with poisoned integers."""

from __future__ import annotations

import pytest
import torch
from support.kernels import DEVICE, FAR, sparda


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch):
    """Parts of the interpreter are imported by the first launch."""
    if DEVICE.type == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _poisoned_integers(monkeypatch):
    """Uninitialised lists point far outside any memory, as floats are NaN."""
    poison = {torch.int32: FAR, torch.int64: FAR << 16, torch.uint8: 0xAB}
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        original = getattr(owner, name)

        def poisoned(*args, _original=original, **kwargs):
            tensor = _original(*args, **kwargs)
            if tensor.is_floating_point():
                return tensor.fill_(torch.nan)
            return tensor.fill_(poison[tensor.dtype]) if tensor.dtype in poison else tensor

        monkeypatch.setattr(owner, name, poisoned)


@pytest.fixture(params=["cpu", "triton"])
def ours(request):
    """SparDA's kernels of one implementation, to be compared with the reference."""
    if request.param == "triton":
        pytest.importorskip("triton")
    return sparda(request.param)


@pytest.fixture(params=["reference", "cpu", "triton"])
def every(request):
    """SparDA's kernels of one implementation, the reference included."""
    if request.param == "triton":
        pytest.importorskip("triton")
    return sparda(request.param)


@pytest.fixture(params=[1, 24], ids=["whole", "split"])
def _splitting(request, monkeypatch):
    """One program per row and KV head, or as many as there are tiles."""
    launch = pytest.importorskip("vllm_sparse.kernels.triton.launch")
    monkeypatch.setattr(launch, "multiprocessors", lambda device: request.param)


@pytest.fixture(params=[1, 64], ids=["whole", "split"])
def _splitting_rows(request, monkeypatch):
    """One program per row and KV head, or as many as there are tiles of pages or tokens."""
    launch = pytest.importorskip("vllm_sparse.kernels.triton.launch")
    monkeypatch.setattr(launch, "multiprocessors", lambda device: request.param)


@pytest.fixture
def small_tiles(monkeypatch):
    """Many tiles without large inputs."""
    pytest.importorskip("triton")
    from vllm_sparse.kernels.triton import launch, sparda_paging, sparda_prefill

    small = launch.Launch(16, 1, 1)
    for module in (sparda_paging, sparda_prefill):
        monkeypatch.setattr(module, "launch", lambda *args: small)
