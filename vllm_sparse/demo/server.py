# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""A `vllm serve` process with a health check, a log file and a clean end."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

MAX_THREADS = 8
_LOG_TAIL_LINES = 30
_GRACE_TICKS, _TICK_SECONDS = 100, 0.1


class ServerError(RuntimeError):
    """The server did not start or stopped; the message ends with the end of its log."""


class Server:
    """A context manager: healthy on entry, gone with all its children on exit.

    Args:
        arguments: What follows ``vllm serve`` on the command line.
        log_path: Receives the server's output.
        start_timeout_seconds: How long it may take to become healthy.
        environment: Added to this process's.
    """

    def __init__(
        self,
        arguments: list[str],
        log_path: Path,
        start_timeout_seconds: float = 240,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._arguments = arguments
        self._log_path = log_path
        self._start_timeout_seconds = start_timeout_seconds
        self._further = environment or {}
        self._process: subprocess.Popen[bytes] | None = None
        self.url = ""

    def __enter__(self) -> Server:
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = [_vllm_executable(), "serve", *self._arguments]
        with self._log_path.open("wb") as log:
            self._process = self._start(
                [*command, "--host", "127.0.0.1", "--port", str(port)],
                {**_environment(), **self._further},
                log,
            )
        try:
            self._wait_until_healthy(self._process)
        except BaseException:
            self._stop(self._process)
            raise
        return self

    def _start(
        self, command: list[str], environment: dict[str, str], log: IO[bytes]
    ) -> subprocess.Popen[bytes]:
        """A process that leads a session, so that its workers can be ended with it."""
        return subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._process is not None:
            self._stop(self._process)

    @property
    def pid(self) -> int:
        """Of the API server, which leads the group of all processes."""
        assert self._process is not None, "only between entry and exit"
        return self._process.pid

    def ended(self, timeout_seconds: float) -> bool:
        """Returns whether the API server ends in that time."""
        assert self._process is not None, "only between entry and exit"
        try:
            self._process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def metrics(self) -> dict[str, float]:
        """Returns every metric's value, summed over its labels."""
        return {
            name: sum(value for _, value in samples) for name, samples in self._samples().items()
        }

    def num_blocks(self) -> int:
        """Returns the size of the KV cache in blocks."""
        labels, _ = self._samples()["vllm:cache_config_info"][0]
        return int(labels["num_gpu_blocks"])

    def log_tail(self) -> str:
        """Returns the end of the server's log."""
        lines = self._log_path.read_text(errors="replace").splitlines()[-_LOG_TAIL_LINES:]
        return "\n".join(f"  | {line}" for line in lines)

    def _samples(self) -> dict[str, list[tuple[dict[str, str], float]]]:
        samples: dict[str, list[tuple[dict[str, str], float]]] = {}
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=120) as response:
            text = response.read().decode()
        # Here, because the other commands work without it.
        from prometheus_client.parser import text_string_to_metric_families

        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                samples.setdefault(sample.name, []).append((sample.labels, sample.value))
        return samples

    def _wait_until_healthy(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + self._start_timeout_seconds
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise ServerError(
                    f"vllm serve ended with status {process.returncode}:\n{self.log_tail()}"
                )
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        raise ServerError(
            f"vllm serve was not healthy after {self._start_timeout_seconds:.0f} s:\n"
            f"{self.log_tail()}"
        )

    @staticmethod
    def _stop(process: subprocess.Popen[bytes]) -> None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=30)
        with contextlib.suppress(ProcessLookupError):
            # Engine and worker may still be cleaning up after the API server has gone.
            for _ in range(_GRACE_TICKS):
                os.killpg(process.pid, 0)
                time.sleep(_TICK_SECONDS)
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _vllm_executable() -> str:
    """Returns the console script of this interpreter's environment, else the one on PATH."""
    beside = Path(sys.executable).with_name("vllm")
    found = str(beside) if beside.exists() else shutil.which("vllm")
    if found is None:
        raise ServerError(
            "the command `vllm` is not installed. Run `make setup`, or install vLLM 0.32 or 0.33 "
            "into this environment."
        )
    return found


def _environment() -> dict[str, str]:
    environment = dict(os.environ)
    # By default vLLM's CPU build keeps one core for itself: on two cores that is half the speed.
    cores = sorted(os.sched_getaffinity(0))[:MAX_THREADS]
    environment.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores)))
    environment.setdefault("VLLM_NO_USAGE_STATS", "1")
    environment.setdefault("HF_HUB_OFFLINE", "1")
    return environment


def _free_port() -> int:
    """Below those that systems hand out, of which others could get it before the server has it."""
    for port in random.SystemRandom().sample(range(12_000, 30_000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise ServerError("no port is free")
