# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Files of processes that were killed, told from files in use by a lock that ends with its process.

A process that is killed by the kernel runs no clean-up, and a process id says nothing in another
container. A lock does: the kernel drops it, whatever the process died of.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

# Far more than lies between the making of a file and its lock.
_GRACE_S = 600
# A worker that was told to end holds its files until it has given back its memory.
_PATIENCE_S, _TICK_S = 10.0, 0.1


def hold(path: Path) -> int:
    """Mark a file as in use until this process ends, or closes the descriptor that it gets.

    Args:
        path: Made if it is not there.
    """
    held = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(held, fcntl.LOCK_SH)
    return held


def sweep(folder: Path, grace_s: float = _GRACE_S) -> None:
    """Remove the files of a folder that nobody holds any more, and the folder if it is empty then.

    Args:
        folder: Left alone if it is a link, or another user's.
        grace_s: Files younger than this may be about to be held.
    """
    with contextlib.suppress(OSError):  # gone, or another process sweeps too
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            return
        before = time.time() - grace_s
        for path in folder.glob("*.db"):
            if path.lstat().st_mtime <= before:
                _remove_unless_held(path)
        if found.st_mtime <= before:
            folder.rmdir()


def sweep_at_the_end(folder: Path, patience_s: float = _PATIENCE_S) -> None:
    """Remove a folder whose processes are ending, as soon as they have let go of their files.

    Args:
        folder: As for `sweep`.
        patience_s: After so long it is left to whoever sweeps next.
    """
    end = time.monotonic() + patience_s
    sweep(folder, grace_s=0)
    while folder.exists() and time.monotonic() < end:
        time.sleep(_TICK_S)
        sweep(folder, grace_s=0)


def _remove_unless_held(path: Path) -> None:
    with contextlib.suppress(OSError):
        opened = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
        finally:
            os.close(opened)
