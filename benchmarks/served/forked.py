# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""`vllm serve` in a fork of this process, which has imported vLLM: starts in a third of the time.

What runs is vLLM's own command; but its processes are forked, where on CPUs it spawns them. So
stock vLLM is served, which is only compared with, and ours if asked for.
"""

from __future__ import annotations

import gc
import importlib
import os
import signal
import subprocess
import sys
import time
import traceback
from functools import cache
from typing import IO, TYPE_CHECKING, cast

from vllm_sparse.demo.server import Server

if TYPE_CHECKING:
    from typing import NoReturn


class ForkedServer(Server):
    """A server that is forked."""

    def _start(
        self, command: list[str], environment: dict[str, str], log: IO[bytes]
    ) -> subprocess.Popen[bytes]:
        _import()
        child = os.fork()
        if not child:
            _run(command, environment, log)
        return cast("subprocess.Popen[bytes]", _Child(child))


class _Child:
    """What a server asks of its process."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit status, if it has ended."""
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if ended else None
        return self.returncode

    def wait(self, timeout: float = 60) -> int:
        """The exit status, once it has ended."""
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("vllm serve", timeout)
            time.sleep(0.1)
        assert self.returncode is not None
        return self.returncode

    def terminate(self) -> None:
        """Ask it to end."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGTERM)


@cache
def _import() -> None:
    """What every server imports, once."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from support.forked import VLLM

    for name in (*VLLM, "vllm.entrypoints.cli.main", "vllm.entrypoints.openai.api_server"):
        importlib.import_module(name)
    gc.freeze()  # or every child would collect all that was imported


def _run(command: list[str], environment: dict[str, str], log: IO[bytes]) -> NoReturn:
    """Be the server."""
    status = 1
    try:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for descriptor in (1, 2):
            os.dup2(log.fileno(), descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ.update(environment)
        sys.path[1:1] = environment.get("PYTHONPATH", "").split(os.pathsep)
        sys.argv = command
        from support.stand_ins import forked_workers
        from vllm.entrypoints.cli.main import main

        forked_workers()
        main()
        status = 0
    except SystemExit as ending:
        status = ending.code if isinstance(ending.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
