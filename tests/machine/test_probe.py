# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What the probe says of GPUs, compilers and stages that fail."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.site import package
from vllm_sparse.kernels.cpu import build

from vllm_sparse.machine import probe, versions
from vllm_sparse.machine.findings import status
from vllm_sparse.machine.imports import import_findings
from vllm_sparse.machine.kernels import summary
from vllm_sparse.machine.observe import Observed


def test_a_stage_that_fails_costs_no_other_one():
    lines = []
    stages = {"bad": lambda: [][0], "good": lambda: {"x": 1}}
    probe.run(stages, lines.append)
    bad, good = map(json.loads, lines)
    assert bad["error"] == "IndexError: list index out of range"
    assert (good["stage"], good["x"]) == ("good", 1)


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU as torch would show it."""
    launch = pytest.importorskip("vllm_sparse.kernels.triton.launch")
    found = SimpleNamespace(name="H200", major=9, minor=0, total_memory=140 << 30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: found)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: found.name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setenv("VLLM_SPARSE_CACHE", str(tmp_path))
    launch.launches.cache_clear()
    yield launch
    launch.launches.cache_clear()


def test_a_gpu(gpu):
    assert probe.torch_facts()["devices"] == [
        {"name": "H200", "capability": [9, 0], "memory": 140 << 30}
    ]
    assert probe.kernel_facts() == {"launches": ["shipped for sm_90"]}
    assert summary() == "Triton, launches shipped for sm_90"


def test_a_tuned_gpu(gpu):
    path = gpu.tuned_path("H200")
    gpu.write_launches(path, {"prompt": (gpu.Launch(64, 4, 2),) * 2}, {})
    assert probe.kernel_facts() == {"launches": [f"tuned, {path}"]}


def test_a_cpu(monkeypatch, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this is a GPU's machine")
    monkeypatch.setenv("VLLM_SPARSE_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "find_compiler", lambda: "g++")
    found = probe.kernel_facts()
    assert (found["compiler"], found["compiled"]) == ("g++", False)
    assert Path(found["library"]).parent == tmp_path / "kernels"
    assert "when they are first used" in summary()
    monkeypatch.setattr(build, "find_compiler", lambda: None)
    assert probe.kernel_facts() == {"compiler": None, "library": "", "compiled": False}


def test_a_codec_without_ffmpeg_is_not_in_the_way_of_text(monkeypatch, tmp_path):
    """vLLM goes on without it, unlike without torchvision."""
    ffmpeg = "raise RuntimeError('Could not load libtorchcodec. Is FFmpeg there?')"
    for name in versions.MEDIA:
        package(tmp_path, name, ffmpeg)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    broken = probe.media_facts()["broken"]
    assert list(broken) == ["torchvision", "torchaudio", "torchcodec"]
    levels = {}
    for name, reason in broken.items():
        seen = Observed({"media": {"broken": {name: reason}}}, "")
        (found,) = (each for each in import_findings(seen) if name in each.what)
        assert "Could not load libtorchcodec" in found.what
        levels[name] = found.level
        if name == "torchcodec":
            assert "install FFmpeg" in found.todo
            assert status([found]) == 1
    assert levels == {"torchvision": "error", "torchaudio": "error", "torchcodec": "warning"}
