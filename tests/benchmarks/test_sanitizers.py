# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Stages that watch a GPU say where they cannot, and find their tool where it is."""

from __future__ import annotations

import shutil
import sys
from types import ModuleType

import pytest

from benchmarks.gpu import check, stages

GSAN = "triton.experimental.gsan"


@pytest.fixture
def report(tmp_path):
    return stages.Report(tmp_path / "report.json")


def options(*arguments):
    return check.parser_of().parse_args([*arguments])


def nothing_on_path(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(sys, "path", [])


def test_the_sanitizer_is_found_in_a_wheel(tmp_path, monkeypatch):
    nothing_on_path(monkeypatch)
    assert check.sanitizer() is None
    monkeypatch.setattr(sys, "path", [str(tmp_path / "other"), str(tmp_path)])
    found = tmp_path / "nvidia" / "cu13" / "compute-sanitizer" / "compute-sanitizer"
    found.parent.mkdir(parents=True)  # of the same name, and no program
    assert check.sanitizer() is None
    found.write_text("#!/bin/sh\n")
    assert check.sanitizer() is None, "it cannot be run"
    found.chmod(0o755)
    assert check.sanitizer() == str(found)
    monkeypatch.setattr(shutil, "which", lambda name: "/first" if "cuda" in name else None)
    assert check.sanitizer() == "/first"


def test_the_stage_runs_under_what_was_found(monkeypatch):
    def stage():
        return next(each for each in check.plan(options()) if each.name == "sanitizer")

    nothing_on_path(monkeypatch)
    assert (stage().run, stage().prefix) == (check.no_sanitizer, ())
    monkeypatch.setattr(check, "sanitizer", lambda: "/tool")
    assert (stage().run, stage().prefix[:2]) == (check.sanitized, ("/tool", "--tool=memcheck"))


def test_without_a_sanitizer_the_stage_is_not_available(report):
    with pytest.raises(stages.NotAvailableError, match="nvidia-cuda-sanitizer-api"):
        check.no_sanitizer(report, options())


def test_without_gsan_or_a_gpu_races_are_not_looked_for(report, monkeypatch):
    monkeypatch.setitem(sys.modules, GSAN, None)  # as of a Triton that has none
    with pytest.raises(stages.NotAvailableError, match="this Triton has no GSan"):
        check.raced(report, options())
    monkeypatch.setitem(sys.modules, GSAN, ModuleType(GSAN))
    with pytest.raises(stages.NotAvailableError, match="needs a GPU"):
        check.raced(report, options("--device", "cpu"))
