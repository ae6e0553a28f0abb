# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Memory that the machine or its container can still give."""

from __future__ import annotations

import errno
import mmap
from types import SimpleNamespace
from typing import TYPE_CHECKING

import psutil
import pytest
import torch
from support.memory import advice_of

from vllm_sparse.kv.host import memory
from vllm_sparse.kv.host.memory import available_bytes, container_limit, page_aligned

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("shape", [(3, 5), (2, 1 << 20)])
def test_memory_to_be_pinned_shares_no_page(shape):
    first, second = (page_aligned(shape, torch.bfloat16) for _ in range(2))
    for tensor in (first, second):
        assert tensor.shape == shape
        assert tensor.is_contiguous()
        assert tensor.data_ptr() % (2 << 20) == 0
        assert tensor.untyped_storage().nbytes() % (2 << 20) == 0
    first.fill_(1)
    second.fill_(2)  # still mapped, and another memory
    assert bool((first == 1).all())


def test_memory_to_be_pinned_is_found_pinned(monkeypatch):
    """PyTorch asks of the beginning of the storage, which must be the beginning of what is pinned.

    Recent kernels align large mappings to huge pages by themselves, but not to these.
    """
    monkeypatch.setattr(memory, "_HUGE_PAGE", 64 << 20)
    kept = []
    for _ in range(3):
        tensor = page_aligned((1 << 20,), torch.bfloat16)
        begin, asked = tensor.data_ptr(), tensor.untyped_storage().data_ptr()
        assert begin % (64 << 20) == 0
        assert asked == begin
        kept += [tensor.fill_(1), mmap.mmap(-1, 2 << 20)]  # the next one begins elsewhere


def test_memory_to_be_pinned_stays_with_its_process():
    """A fork would leave a device with pages that are no longer the parent's."""
    assert "dc" in advice_of(page_aligned((1 << 20,), torch.uint8))


def test_a_kernel_without_huge_pages_will_do(monkeypatch):
    class Mapping(mmap.mmap):
        def madvise(self, advice, *place):
            if advice == mmap.MADV_HUGEPAGE:
                raise OSError(errno.EINVAL, "Invalid argument")
            super().madvise(advice, *place)

    monkeypatch.setattr(mmap, "mmap", Mapping)
    tensor = page_aligned((1 << 20,), torch.uint8)
    assert {"dc", "hg"} & advice_of(tensor.fill_(1)) == {"dc"}


class TestAvailableBytes:
    @pytest.fixture(autouse=True)
    def _machine(self, monkeypatch):
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))

    @staticmethod
    def cgroup(folder: Path, limit: str, used: str = "500\n", stat: str | None = None) -> Path:
        (folder / "memory.max").write_text(limit)
        (folder / "memory.current").write_text(used)
        stat = "anon 300\ninactive_file 150\nactive_file 50\n" if stat is None else stat
        (folder / "memory.stat").write_text(stat)
        return folder

    def test_the_containers_limit_counts_without_its_page_cache(self, tmp_path):
        """Neither what was read once nor what was read again."""
        assert available_bytes(self.cgroup(tmp_path, "800\n")) == 800 - 500 + 150 + 50

    def test_the_machine_counts_where_it_has_less(self, tmp_path):
        assert available_bytes(self.cgroup(tmp_path, "9000\n")) == 1000

    @pytest.mark.parametrize(
        ("limit", "used"), [("max\n", "500\n"), ("nonsense", "500\n"), ("800\n", "")]
    )
    def test_no_limit_or_none_that_can_be_read(self, tmp_path, limit, used):
        if limit == "nonsense":
            (tmp_path / "memory.max").write_text("800\n")  # the other files are missing
        else:
            self.cgroup(tmp_path, limit, used)
        assert available_bytes(tmp_path) == 1000

    def test_no_control_group(self, tmp_path):
        assert available_bytes(tmp_path / "none") == 1000

    def test_old_statistics(self, tmp_path):
        assert available_bytes(self.cgroup(tmp_path, "800\n", stat="anon 300\n")) == 300

    def test_the_first_version_of_control_groups(self, tmp_path):
        folder = tmp_path / "memory"
        folder.mkdir()
        (folder / "memory.limit_in_bytes").write_text("800\n")
        (folder / "memory.usage_in_bytes").write_text("500\n")
        (folder / "memory.stat").write_text(
            "inactive_file 7\nactive_file 7\ntotal_inactive_file 150\ntotal_active_file 50\n"
        )
        assert container_limit(tmp_path) == 800
        assert available_bytes(tmp_path) == 800 - 500 + 150 + 50
        (folder / "memory.limit_in_bytes").write_text("9223372036854771712\n")
        assert available_bytes(tmp_path) == 1000


def test_the_container_s_limit(tmp_path):
    assert container_limit(tmp_path) is None
    (tmp_path / "memory.max").write_text("max\n")
    assert container_limit(tmp_path) is None
    (tmp_path / "memory.max").write_text("800\n")
    assert container_limit(tmp_path) == 800
