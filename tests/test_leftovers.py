# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What a killed process leaves is swept, what a live one holds is not."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from vllm_sparse import leftovers
from vllm_sparse.metrics.published import Counters
from vllm_sparse.metrics.published import folder as folder_of


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


def test_the_end_waits_for_whoever_is_ending(folder):
    killed_holder(folder / "dead.db")
    held, holds = os.pipe()
    told, tell = os.pipe()
    child = os.fork()
    if not child:
        leftovers.hold(folder / "ending.db")
        os.write(holds, b"!")
        os.read(told, 1)
        os._exit(0)
    os.read(held, 1)
    leftovers.sweep_at_the_end(folder, patience_s=0)
    assert [path.name for path in folder.iterdir()] == ["ending.db"]
    ending = threading.Timer(0.3, os.write, (tell, b"!"))
    ending.start()
    leftovers.sweep_at_the_end(folder, patience_s=60)
    assert not folder.exists()
    os.waitpid(child, 0)
    ending.join()
    for end in (held, holds, told, tell):
        os.close(end)


def test_links_and_what_is_not_there_are_left_alone(folder, tmp_path):
    killed_holder(folder / "dead.db")
    (tmp_path / "link").symlink_to(folder)
    leftovers.sweep(tmp_path / "link", grace_s=-1)
    leftovers.sweep(tmp_path / "nowhere")
    assert (folder / "dead.db").exists()


def test_the_next_start_sweeps_the_counters_of_killed_processes(tmp_path, monkeypatch):
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    child = os.fork()
    if not child:
        Counters().publish_to(folder_of("killed"), "policies")
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    left = folder_of("killed")
    assert len(list(left.iterdir())) == 2
    old = time.time() - 3600
    for path in (*left.iterdir(), left):
        os.utime(path, (old, old))
    started = Counters()
    started.publish_to(folder_of("started"), "policies")
    assert not left.exists()
    assert len(list(folder_of("started").iterdir())) == 2
    Counters().publish_to(folder_of("another"), "policies")
    assert len(list(folder_of("started").iterdir())) == 2, "in use"
