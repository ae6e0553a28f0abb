# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The GPU host: paths of subprocesses, installed copies, the commit."""

from __future__ import annotations

import os
from pathlib import Path

from benchmarks.gpu import machine

ROOT = Path(__file__).resolve().parents[3]


def test_stages_see_the_checkout_only_through_links(tmp_path, monkeypatch):
    site = tmp_path / "site"
    (site / "vllm").mkdir(parents=True)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(site)]))
    assert machine.default_site() == site
    assert str(site) in machine.install_command(site)
    entries = machine.child_paths(tmp_path).split(os.pathsep)
    assert entries[1:] == [str(site)]
    names = sorted(path.name for path in Path(entries[0]).iterdir())
    assert names == ["benchmarks", "tests"]
    monkeypatch.delenv("PYTHONPATH")
    assert machine.default_site() == machine.SITE


def test_a_wheel_that_came_along_is_installed(tmp_path, monkeypatch):
    """Else the checkout is, with setuptools from where vLLM is."""
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    command = machine.install_command(Path("/site"))
    assert command.startswith("PYTHONPATH=/site python3 -m pip install --no-index --no-deps")
    assert command.endswith(f"--no-build-isolation --upgrade --target /site {tmp_path}")
    (tmp_path / "dist").mkdir()
    wheel = tmp_path / "dist" / "vllm_sparse-0.1-py3-none-any.whl"
    wheel.touch()
    command = machine.install_command(Path("/site"))
    assert (
        command == f"python3 -m pip install --no-index --no-deps --upgrade --target /site {wheel}"
    )


def test_stale_installed_files_are_found(tmp_path):
    import shutil

    for folder, target in machine.INSTALLED_AS.items():
        # What Python compiles meanwhile comes and goes.
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, tmp_path / target, ignore=ignored, dirs_exist_ok=True)
    package = tmp_path / "vllm_sparse"
    assert machine.stale_files(package) == []
    (package / "kernels" / "layout.py").write_text("old")
    (package / "plugin.py").unlink()
    assert machine.stale_files(package) == ["vllm_sparse/plugin.py", "kernels/layout.py"]
    assert machine.stale_files(ROOT / "vllm_sparse") == []  # an editable install
