# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Entry points that are missing, shadowed or not allowed; installations that hide each other."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from support.site import install, package

from vllm_sparse.machine import plugin
from vllm_sparse.machine.plugin import GROUPS, plugin_findings

POINTS = {group: {"vllm_sparse": value} for group, value in GROUPS.items()}


def wrong():
    return [found for found in plugin_findings() if found.level != "ok"]


@pytest.fixture
def site(monkeypatch, tmp_path):
    """Nothing is installed but what a test installs; the package is where it is."""
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    monkeypatch.setattr(plugin, "_imported", lambda copy: iter(()))
    return tmp_path


def test_what_is_declared_is_what_is_looked_for():
    said = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    found = {group: points["vllm_sparse"] for group, points in said["entry-points"].items()}
    assert found == GROUPS


def test_this_installation_is_fine(monkeypatch):
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    assert [found.what for found in wrong() if found.level == "error"] == []


def test_not_installed(site):
    found = wrong()
    assert [each.level for each in found] == ["error"] * 3
    assert "pip install" in found[0].todo


def test_installed_twice(site, monkeypatch, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    monkeypatch.setattr("sys.path", [str(other), str(site)])
    install(site, "vllm-sparse", "0.1.0", points=POINTS)
    install(other, "vllm_sparse", "0.0.9", points=POINTS)
    (found,) = wrong()
    assert found.level == "warning"
    assert found.what == f"installed 2 times: 0.0.9 in {other}, 0.1.0 in {site}"


def test_an_older_installation_shadows_an_entry_point(site):
    old = {**POINTS, "vllm.general_plugins": {"vllm_sparse": "vllm_sparse.old:register"}}
    install(site, "vllm-sparse", "0.0.1", points=old)
    (found,) = wrong()
    assert "vllm_sparse.old:register of vllm-sparse" in found.what


def test_another_package_takes_the_name(site):
    install(site, "vllm-sparse", "0.1.0", points=POINTS)
    install(site, "thief", "1", points={"vllm.platform_plugins": {"vllm_sparse": "thief:run"}})
    (found,) = wrong()
    assert found.level == "error"
    assert "thief:run of thief" in found.what


@pytest.mark.parametrize(("listed", "count"), [("other", 1), ("", 1), ("other, vllm_sparse", 0)])
def test_vllm_plugins_must_list_us(site, monkeypatch, listed, count):
    install(site, "vllm-sparse", "0.1.0", points=POINTS)
    monkeypatch.setenv("VLLM_PLUGINS", listed)
    assert len(wrong()) == count


def test_other_platforms_and_policies(site, monkeypatch):
    install(site, "vllm-sparse", "0.1.0", points=POINTS)
    further = {
        "vllm.platform_plugins": {"npu": "npu:platform"},
        "vllm_sparse.policies": {"ROCKETKV": "npu:Policy", "small": "npu:Policy"},
    }
    install(site, "vllm-npu", "1", points=further)
    assert [found.subject for found in wrong()] == ["entry points", "policies", "policies"]
    assert "npu" in wrong()[0].what


def test_another_copy_is_imported(monkeypatch, tmp_path):
    """As in a checkout that is not the one that was installed."""
    package(tmp_path, "vllm_sparse", "")
    monkeypatch.setattr(
        plugin.importlib.util, "find_spec",
        lambda name: type("Spec", (), {"origin": str(tmp_path / "vllm_sparse" / "__init__.py")})
        if name == "vllm_sparse" else None,
    )  # fmt: skip
    imported, kernels = wrong()
    assert f"imported from {tmp_path}" in imported.what
    assert "has no kernels" in kernels.what
