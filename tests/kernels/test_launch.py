# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""The table of launches: files, start-up."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from vllm_sparse.kernels.triton import launch
from vllm_sparse.kernels.triton.launch import Launch

from vllm_sparse.errors import ConfigError

pytestmark = pytest.mark.usefixtures("fresh_launches")
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a table of kernel launches"),
        ("[]", "not a table of kernel launches"),
        ("{}", "not a table of kernel launches .'launches'"),
        ('{"launches": {"attend": [[64, 4]]}}', "not a table of kernel launches"),
        ('{"launches": {"attend": [["x", 4, 2], [64, 4, 2]]}}', "not a table of kernel launches"),
        ('{"launches": {"pool": [[48, 4, 2], [64, 4, 2]]}}', "of kernels: pool"),
        ('{"launches": {"pool": [[64, 4, 2], [64, 3, 2]]}}', "of kernels: pool"),
        ('{"launches": {"pool": [[64, 4, 2], [64, 4, 0]]}}', "of kernels: pool"),
        ('{"launches": {"pool": [[0, 4, 2], [64, 4, 2]]}}', "of kernels: pool"),
        ('{"launches": {"pool": [[64, 4, 2]]}}', "of kernels: pool"),
    ],
)
def test_a_broken_table_is_refused_at_start_up(tmp_path, monkeypatch, text, message):
    path = tmp_path / "broken.json"
    path.write_text(text)
    monkeypatch.setenv(launch.LAUNCHES_ENV, str(path))
    with pytest.raises(ConfigError, match=message) as error:
        launch.launches(CPU)
    assert str(path) in str(error.value)
    assert "make gpu-tune" in str(error.value)


def test_a_table_is_read_back_as_it_was_written(tmp_path):
    table = {"pool": (Launch(64, 2, 1), Launch(16, 1, 5))}
    path = tmp_path / "new" / "table.json"
    launch.write_launches(path, table, {"gpu": "some"})
    assert launch.read_launches(path) == table
    assert [found.name for found in path.parent.iterdir()] == ["table.json"]


def test_kernels_of_another_version_are_ignored(tmp_path, monkeypatch):
    """A server is upgraded, and rolled back, with the table that it has."""
    table = {"pool": (Launch(64, 2, 1), Launch(16, 1, 5)), "gone": (Launch(48, 3, 0),) * 2}
    said = []
    monkeypatch.setattr(launch.logger, "warning", lambda text, *facts: said.append(text % facts))
    launch.write_launches(tmp_path / "table.json", table, {})
    assert launch.read_launches(tmp_path / "table.json") == {"pool": table["pool"]}
    (line,) = said
    assert line.endswith("ignored: gone")


def test_where_a_table_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_SPARSE_CACHE", str(tmp_path))
    found = launch.tuned_path("NVIDIA H200")
    assert found.parent == tmp_path / "launches"
    assert re.fullmatch(r"NVIDIA-H200-triton-[\d.]+.*\.json", found.name)
    assert launch.tuned_path("") is None  # the interpreter
    monkeypatch.setenv(launch.LAUNCHES_ENV, "own.json")
    assert launch.tuned_path("NVIDIA H200") == launch.tuned_path("") == Path("own.json")
    monkeypatch.setenv(launch.LAUNCHES_ENV, "")
    assert launch.tuned_path("NVIDIA H200") is launch.tuned_path("") is None


@pytest.mark.parametrize(
    ("capability", "origin"), [((8, 0), "sm_80"), ((8, 9), "sm_80"), ((9, 0), "sm_90")]
)
def test_the_start_up_line_says_where_launches_are_from(tmp_path, monkeypatch, capability, origin):
    gpu = torch.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setenv("VLLM_SPARSE_CACHE", str(tmp_path))
    assert launch.launches(CPU).origin == "not tuned"
    shipped = launch.launches(gpu)
    assert shipped.origin == f"shipped for {origin}"
    path = launch.tuned_path("NVIDIA H200")
    launch.write_launches(path, {"pool": (Launch(64, 2, 1), Launch(16, 1, 5))}, {})
    assert launch.launches(gpu) is shipped  # read once
    launch.launches.cache_clear()
    found = launch.launches(gpu)
    assert found.origin == f"tuned, {path}"
    assert found.launches == {**shipped.launches, "pool": (Launch(64, 2, 1), Launch(16, 1, 5))}
    monkeypatch.setenv(launch.LAUNCHES_ENV, "")
    launch.launches.cache_clear()
    assert launch.launches(gpu).origin == f"shipped for {origin}"


def test_shares_follow_from_shapes(monkeypatch):
    """Few rows fill the GPU; more are split for the sake of long ones, as far as that is cheap."""
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 132)
    entries = [(1, 1 << 17), (1, 300), (4, 1 << 17), (64, 1 << 17), (64, 600), (512, 1 << 17)]
    found = [launch.split_rows(8 * rows, most, 32, CPU) for rows, most in entries]
    assert found == [(64, 1), (10, 1), (17, 1), (16, 8), (3, 8), (2, 16)]


def test_launches_follow_the_bytes_of_a_head(monkeypatch):
    entry = launch.Launch(64, 4, 2), launch.Launch(32, 8, 2)
    monkeypatch.setitem(launch._SM80, "attend", entry)
    sizes = [(128, torch.bfloat16), (64, torch.float32), (256, torch.float16), (128, torch.float32)]
    found = [launch.launch("attend", torch.device("cpu"), *size) for size in sizes]
    assert found == [entry[0], entry[0], entry[1], entry[1]]
    wide = launch.launch("attend", torch.device("cpu"), 256, torch.float32)
    assert wide == (16, 8, 2)


@pytest.mark.parametrize(
    ("kernel", "block", "warps"), [("top_indices", 128, 4), ("choose_blocks", 1024, 8)]
)
def test_threads_that_count_have_an_entry_each(kernel, block, warps):
    assert launch.valid(kernel, launch.Launch(block, warps, 1))
    assert not launch.valid(kernel, launch.Launch(block, 2 * warps, 1))
    assert launch.valid("attend", launch.Launch(block, 2 * warps, 1))


def test_how_kernels_are_launched_stands_in_the_tables():
    """Neither warps nor stages nor tiles are numbers where a kernel is launched."""
    found, launched = [], 0
    for path in sorted(Path(launch.__file__).parent.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.keyword):
                continue
            launched += node.arg == "num_warps"
            parts = [node.value] if str(node.arg).startswith("BLOCK") else []
            if node.arg in ("num_warps", "num_stages"):
                parts = list(ast.walk(node.value))
            if any(isinstance(part, ast.Constant) for part in parts):
                found.append(f"{path.name}: {node.arg}={ast.unparse(node.value)}")
    assert launched > 10
    assert found == []
    assert launch.FIXED.keys().isdisjoint(launch._SM80), "tuned or not"
