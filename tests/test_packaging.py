# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The package list, the entry points, the presets and the wheel."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata, resources
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]


def packages_under(folder: str, name: str) -> set[str]:
    """Names of all packages in a folder of the repository that is installed as `name`."""
    root = ROOT / folder
    return {
        ".".join((name, *init.parent.relative_to(root).parts)) for init in root.rglob("__init__.py")
    }


def package_dir(package: str) -> Path:
    """Directory of a package in the repository."""
    mapped = SETUPTOOLS["package-dir"].get(package)
    return ROOT / (mapped or package.replace(".", "/"))


def installed() -> metadata.Distribution:
    """What is installed, not what building a wheel writes into the checkout meanwhile."""
    places = [place for place in sys.path if Path(place).resolve() != ROOT]
    return next(iter(metadata.distributions(name="vllm-sparse", path=places)))


def test_packages_list_matches_tree():
    in_tree = (
        packages_under("vllm_sparse", "vllm_sparse")
        | packages_under("kernels", "vllm_sparse.kernels")
        | packages_under("configs", "vllm_sparse.configs")
    )
    assert set(SETUPTOOLS["packages"]) == in_tree


def test_folders_with_modules_are_packages():
    for folder in ("vllm_sparse", "kernels", "configs"):
        for module in (ROOT / folder).rglob("*.py"):
            assert (module.parent / "__init__.py").exists(), f"{module.parent} has no __init__.py"


def test_outside_folders_are_mapped():
    mapped = {"vllm_sparse.kernels": "kernels", "vllm_sparse.configs": "configs"}
    for package in SETUPTOOLS["packages"]:
        for prefix, folder in mapped.items():
            if package == prefix or package.startswith(f"{prefix}."):
                expected = folder + package.removeprefix(prefix).replace(".", "/")
                assert SETUPTOOLS["package-dir"].get(package) == expected


def test_data_files_are_declared():
    declared = SETUPTOOLS["package-data"]
    for package in SETUPTOOLS["packages"]:
        folder = package_dir(package)
        data = {
            path
            for pattern in ("*.yaml", "*.cpp", "*.h", "py.typed")
            for path in folder.glob(pattern)
        }
        covered = {path for pattern in declared.get(package, []) for path in folder.glob(pattern)}
        assert data <= covered, package


@pytest.mark.parametrize(
    ("group", "value"),
    [
        ("vllm.general_plugins", "vllm_sparse.plugin:register"),
        ("vllm.platform_plugins", "vllm_sparse.plugin:platform"),
    ],
)
def test_plugin_entry_points_are_installed(group, value):
    points = installed().entry_points.select(group=group, name="vllm_sparse")
    assert {point.value for point in points} == {value}


def test_entry_points_resolve():
    points = installed().entry_points
    assert len(points) == 3
    for point in points:
        assert callable(point.load()), point


def test_nothing_asks_an_index_for_this_package():
    """It is not published: whoever owns its name there would be installed."""
    tracked = subprocess.run(
        ["git", "ls-files", "*.py", "*.md", "*.toml", "*.sh", "Dockerfile"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    asked = re.compile(r"""pip install (?:-\S+ )*["']?vllm-sparse""")
    assert [name for name in tracked if asked.search((ROOT / name).read_text())] == []


def test_version_is_the_same_everywhere():
    import vllm_sparse

    assert vllm_sparse.__version__ == PROJECT["project"]["version"]
    assert f"[{vllm_sparse.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_presets_are_valid_and_complete():
    from vllm_sparse.registry import settings_class

    yaml = pytest.importorskip("yaml")
    presets = [
        file
        for file in resources.files("vllm_sparse.configs").iterdir()
        if file.name.endswith(".yaml")
    ]
    assert {preset.name.removesuffix(".yaml") for preset in presets} == {
        "llama-3.1-8b",
        "minicpm4.1-8b",
        "mistral-7b",
        "paper",
        "qwen2.5-7b",
        "qwen2.5-coder-0.5b",
        "qwen2.5-sparda",
        "qwen3-8b",
        "smollm2-135m",
        "smollm2-135m-sparda",
    }
    for preset in presets:
        values = yaml.safe_load(preset.read_text())
        kind = settings_class(values["algorithm"])
        settings, page = kind.model_validate(values), (ROOT / "docs/settings.md").read_text()
        (same,) = re.findall(r"A preset names.*?have every default", page, re.DOTALL)
        assert (f"`{preset.name.removesuffix('.yaml')}`" in same) == (settings == kind())


@pytest.mark.slow
def test_wheel_is_what_the_sources_are(tmp_path):
    """Also where an older build left more; and it is named after the commit.

    In a copy: setuptools writes metadata beside the sources, where Python looks for entry points
    first, and processes of other tests would not find the plugin.
    """
    checkout = tmp_path / "checkout"
    for folder in ("vllm_sparse", "kernels", "configs"):
        shutil.copytree(
            ROOT / folder, checkout / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    for file in filter(Path.is_file, ROOT.iterdir()):
        shutil.copy(file, checkout)
    stale = checkout / "build/lib/vllm_sparse/kernels/cpu"
    stale.mkdir(parents=True)
    for name in ("stale.py", "stale.cpp"):
        (stale / name).touch()
    result = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"),
            *("--wheel-dir", str(tmp_path), str(checkout)),
        ],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "VLLM_SPARSE_COMMIT": "5e41426-Dirty"},
    )
    assert result.returncode == 0, result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    version = f"{PROJECT['project']['version']}+g5e41426.dirty"
    assert wheel.name == f"vllm_sparse-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    found = {name for name in names if not name.startswith(f"vllm_sparse-{version}.dist-info/")}
    expected = set()
    for package in SETUPTOOLS["packages"]:
        target = package.replace(".", "/")
        sources = package_dir(package)
        patterns = ["*.py", *SETUPTOOLS["package-data"].get(package, [])]
        for source in (path for pattern in patterns for path in sources.glob(pattern)):
            expected.add(f"{target}/{source.name}")
    assert found == expected
