# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""No file is longer than one can read, and one page says where everything is."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES, TESTS = 400, 500


@pytest.mark.parametrize(
    ("folder", "limit"),
    [("vllm_sparse", MODULES), ("kernels", MODULES), ("benchmarks", MODULES), ("scripts", MODULES),
     ("tests", TESTS)],
)  # fmt: skip
def test_files_are_short(folder, limit):
    files = [path for kind in ("*.py", "*.cpp", "*.h") for path in (ROOT / folder).rglob(kind)]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    assert len(lengths) > 5
    assert {name: length for name, length in lengths.items() if length > limit} == {}


def test_the_page_on_architecture_names_every_part():
    page = (ROOT / "docs" / "architecture.md").read_text()
    parts = [path for path in (ROOT / "vllm_sparse").iterdir() if path.name[0] not in "_."]
    names = {path.name + "/" * path.is_dir() for path in parts} - {"py.typed"}
    assert {name for name in names if f"`{name}" not in page} == set()


# Modules whose tests stand elsewhere: beside what they are a part of.
TESTED_IN = {
    "backends/asked": "test_features",
    "backends/gpu": "test_plugin",
    "backends/policy_step": "backends/test_policy_cpu",
    "backends/sparda_cpu": "backends/test_sparda",
    "cli": "test_plugin",
    "demo/document": "demo/test_run",
    "demo/gguf": "demo/test_models",
    "demo/server": "demo/test_run",
    "device_room": "test_quantized",
    "doctor/examine": "doctor/test_commands",
    "doctor/model": "doctor/test_commands",
    "doctor/probe": "doctor/test_commands",
    "features/cache": "test_features",
    "features/models": "test_features",
    "features/serving": "test_features",
    "features/verdicts": "test_features",
    "forecast/convert": "forecast/test_official",
    "forecast/reload": "forecast/test_tapped",
    "forecast/torch_file": "forecast/test_reading",
    "kv/host/ranks": "test_startup",
    "machine/cores": "machine/test_memory",
    "machine/imports": "machine/test_probe",
    "machine/observe": "machine/test_probe",
    "paths": "test_quantized",
    "planner/commands": "planner/test_plan",
    "planner/devices": "planner/test_plan",
    "planner/shapes": "benchmarks/gpu/test_shapes",
    "platform": "test_plugin",
    "buffers": "backends/test_policy_variants",
    "policies/controlled": "steps/test_rules",
    "steps/drafts": "steps/test_split",
    "steps/parked": "steps/test_layer",
    "training/geometry": "training/test_files",
    "upload": "steps/test_devices",
    "versions": "test_plugin",
}
UNTESTED = {"errors"}  # classes without code


def test_every_module_has_tests_where_one_looks_for_them():
    """``a/b.py`` in ``tests/a/test_b*.py``, or where the table says."""
    package, tests = ROOT / "vllm_sparse", ROOT / "tests"
    modules = {path.relative_to(package).with_suffix("") for path in package.rglob("*.py")}
    alone = {
        str(module)
        for module in modules
        if module.name != "__init__"
        and not list((tests / module.parent).glob(f"test_{module.name}*.py"))
    }
    assert alone - TESTED_IN.keys() - UNTESTED == set()
    assert {name for name in (*TESTED_IN, *UNTESTED) if Path(name) not in modules} == set()
    assert [test for test in TESTED_IN.values() if not (tests / f"{test}.py").is_file()] == []
