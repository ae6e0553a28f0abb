# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""What a server's processes hold, seen from outside, and what they leave behind."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import psutil

if TYPE_CHECKING:
    from collections.abc import Callable

_ROLES = {"EngineCore": "engine", "Worker": "worker"}


class Held(NamedTuple):
    """By one process."""

    threads: int
    files: int
    rss_bytes: int


def processes(leader: int) -> dict[str, psutil.Process]:
    """Returns the API server (`server`), the engine and its workers by what they do."""
    root = psutil.Process(leader)
    found = {"server": root}
    for child in root.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            title = " ".join(child.cmdline())
            for part, role in _ROLES.items():
                if title.startswith("VLLM") and part in title:
                    found[role] = child
    return found


def held(leader: int) -> dict[str, Held]:
    """Returns what each process holds."""
    return {
        role: Held(process.num_threads(), process.num_fds(), process.memory_info().rss)
        for role, process in processes(leader).items()
    }


def group(leader: int) -> list[int]:
    """Returns the live processes of a server's process group, which outlive their leader."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.Error):
            if os.getpgid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found


def files_of(leader: int) -> set[str]:
    """Returns the shared memory and the counters that processes of a server's group have mapped."""
    counters = str(Path(tempfile.gettempdir()) / f"vllm-sparse-{os.getuid()}-")
    found = set()
    for pid in group(leader):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines():
                path = [*line.split(maxsplit=5), ""][5]
                if path.startswith(("/dev/shm/", counters)) and not path.endswith("(deleted)"):
                    found.add(path)
    return found


def left_behind(files: set[str], seconds: float = 15) -> list[str]:
    """Returns which files, and folders of counters, still exist after a while."""
    paths = [*map(Path, files), *{Path(x).parent for x in files if not x.startswith("/dev/shm/")}]
    until(lambda: not any(path.exists() for path in paths), seconds)
    return sorted(str(path) for path in paths if path.exists())


def until(condition: Callable[[], bool], seconds: float, pause_s: float = 0.25) -> bool:
    """Returns whether something came true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause_s)
    return True


def kill(process: psutil.Process) -> None:
    """Ends a process as the kernel does when memory runs out."""
    process.send_signal(signal.SIGKILL)
