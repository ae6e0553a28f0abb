# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What a killed process leaves is swept, what a live one holds is not."""

from __future__ import annotations

import os
import signal
import time

import pytest

from vllm_sparse import leftovers


def killed_holder(path) -> None:
    """A process holds a file until the kernel ends it."""
    child = os.fork()
    if not child:
        leftovers.hold(path)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "counters"
    made.mkdir()
    return made


def test_files_of_the_killed_are_swept_and_others_kept(folder):
    killed_holder(folder / "dead.db")
    held = leftovers.hold(folder / "alive.db")
    leftovers.sweep(folder, grace_s=-1)
    assert [path.name for path in folder.iterdir()] == ["alive.db"]
    os.close(held)
    leftovers.sweep(folder, grace_s=-1)
    assert not folder.exists()


def test_what_is_young_may_be_about_to_be_held(folder):
    killed_holder(folder / "dead.db")
    leftovers.sweep(folder)
    assert (folder / "dead.db").exists()
    old = time.time() - 3600
    os.utime(folder / "dead.db", (old, old))
    leftovers.sweep(folder)
    assert not (folder / "dead.db").exists()


def test_links_and_what_is_not_there_are_left_alone(folder, tmp_path):
    killed_holder(folder / "dead.db")
    (tmp_path / "link").symlink_to(folder)
    leftovers.sweep(tmp_path / "link", grace_s=-1)
    leftovers.sweep(tmp_path / "nowhere")
    assert (folder / "dead.db").exists()


@pytest.mark.vllm
def test_the_next_start_sweeps_the_counters_of_killed_processes(tmp_path, monkeypatch):
    pytest.importorskip("vllm")
    from vllm_sparse import metrics

    monkeypatch.setattr(metrics.tempfile, "gettempdir", lambda: str(tmp_path))
    child = os.fork()
    if not child:
        metrics.Counters().publish_to(metrics.folder("killed"))
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    left = metrics.folder("killed")
    assert len(list(left.iterdir())) == 2
    old = time.time() - 3600
    for path in (*left.iterdir(), left):
        os.utime(path, (old, old))
    started = metrics.Counters()
    started.publish_to(metrics.folder("started"))
    assert not left.exists()
    assert len(list(metrics.folder("started").iterdir())) == 2
    metrics.Counters().publish_to(metrics.folder("another"))
    assert len(list(metrics.folder("started").iterdir())) == 2, "in use"
