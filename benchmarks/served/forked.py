# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""`vllm serve` in a fork of this process, which has imported vLLM: starts in a third of the time.

What runs is vLLM's own command; but its processes are forked, where on CPUs it spawns them. So
stock vLLM is served, which is only compared with, and ours if asked for.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import signal
import subprocess
import sys
import traceback
from functools import cache, partial
from typing import IO, TYPE_CHECKING

from vllm_sparse.demo.server import Server

if TYPE_CHECKING:
    from typing import NoReturn


class ForkedServer(Server):
    """A server that is forked: what Popen runs before a command is all that runs."""

    def _start(
        self, command: list[str], environment: dict[str, str], log: IO[bytes]
    ) -> subprocess.Popen[bytes]:
        _import()
        own = set(os.listdir("/proc/self/fd"))
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            start_new_session=True, restore_signals=False,
            preexec_fn=partial(_run, command, environment, own),
        )  # fmt: skip


@cache
def _import() -> None:
    """What every server imports, once."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from support.forked import VLLM

    for name in (*VLLM, "vllm.entrypoints.cli.main", "vllm.entrypoints.openai.api_server"):
        importlib.import_module(name)
    gc.freeze()  # or every child would collect all that was imported


def _run(command: list[str], environment: dict[str, str], own: set[str]) -> NoReturn:
    """Be the server."""
    status = 1
    try:
        for descriptor in map(int, set(os.listdir("/proc/self/fd")) - own):
            if descriptor > 2:  # Popen returns when its pipe is closed
                with contextlib.suppress(OSError):
                    os.close(descriptor)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
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
