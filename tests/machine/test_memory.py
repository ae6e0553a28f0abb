# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Memory, its limits, the cache folder, cores."""

from __future__ import annotations

import os
import resource
from types import SimpleNamespace

import pytest

from vllm_sparse.machine import cores, memory

GIB = memory.GIB


def finding(subject, available=64 * GIB, limit=None, on_gpu=False):
    found = memory.memory_findings(available, limit, on_gpu)
    return next(each for each in found if each.subject == subject)


def test_free_memory_and_the_container_s_limit():
    assert finding("host memory", 2 * GIB).level == "warning"
    assert "may use 1.0" in finding("host memory", limit=GIB).what


def test_little_memory_is_warned_of_by_what_takes_it():
    """A GPU's pool takes host memory only beyond what the device holds."""
    for on_gpu in (False, None):
        assert "pool takes 4 GiB or more" in finding("host memory", 2 * GIB, on_gpu=on_gpu).why
    assert "beyond what the device holds" in finding("host memory", 2 * GIB, on_gpu=True).why


def test_pinning_is_limited_on_gpus_only(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (8 << 20, 8 << 20))
    assert finding("locked memory").level == "ok"
    assert finding("locked memory", on_gpu=True).level == "warning"
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (resource.RLIM_INFINITY,) * 2)
    assert finding("locked memory", on_gpu=True).level == "ok"


@pytest.mark.parametrize(
    ("modes", "level"),
    [("always [madvise] never", "ok"), ("always madvise [never]", "warning"), (None, "warning")],
)
def test_huge_pages(monkeypatch, tmp_path, modes, level):
    monkeypatch.setattr(memory, "HUGE_PAGES", tmp_path / "enabled")
    if modes:
        (tmp_path / "enabled").write_text(modes)
    assert finding("huge pages").level == level


def test_huge_pages_of_an_old_kernel(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "HUGE_PAGES", tmp_path / "enabled")
    (tmp_path / "enabled").write_text("[always] madvise never")
    monkeypatch.setattr(memory.platform, "release", lambda: "5.15.0-91-generic")
    assert "background" in finding("huge pages").why


def test_shared_memory(monkeypatch, tmp_path):
    monkeypatch.setattr(memory.shutil, "disk_usage", lambda path: SimpleNamespace(free=64 << 20))
    assert "shm-size" in finding("shared memory").todo
    monkeypatch.undo()
    monkeypatch.setattr(memory, "SHARED", tmp_path / "nowhere")
    assert finding("shared memory").level == "warning"


def test_the_cache_folder(monkeypatch, tmp_path):
    assert memory.cache_finding(tmp_path / "new").level == "ok"
    (tmp_path / "file").touch()
    broken = memory.cache_finding(tmp_path / "file")
    assert broken.level == "error"
    assert "VLLM_SPARSE_CACHE" in broken.todo
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_flag=os.ST_NOEXEC))
    assert "noexec" in memory.cache_finding(tmp_path).what


def test_cores(monkeypatch, tmp_path):
    assert cores.quota(tmp_path) is None
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert cores.quota(tmp_path) == 1.5
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    monkeypatch.delenv("VLLM_CPU_NUM_OF_RESERVED_CPU", raising=False)
    few, threads = cores.core_findings(False, 1.5)
    assert few.level == threads.level == "warning"
    assert "BIND=0,1 " in threads.todo
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0-1")
    assert [each.level for each in cores.core_findings(False, None)] == ["ok", "ok"]
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "auto")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {5, 3})
    assert "BIND=3,5 " in list(cores.core_findings(False, None))[1].todo
    assert len(list(cores.core_findings(True, None))) == 1
