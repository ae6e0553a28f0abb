# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Engines in processes of their own, driven command by command, and who else uses the machine."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.harness import Arm, progress


class WorkerError(RuntimeError):
    """A worker failed; the message carries the end of its log."""


class Worker:
    """One arm's engine in a subprocess; use it in a ``with`` statement.

    Attributes:
        arm: The side of the comparison.
        start_seconds: How long the engine took to start.
    """

    def __init__(
        self,
        module: str,
        arm: Arm,
        engine_args: dict,
        *,
        served: bool = False,
        env: dict[str, str] | None = None,
    ) -> None:
        """Starts the engine and waits until it is ready.

        Args:
            module: The module whose functions are the commands; each takes the `LLM` first.
            arm: The side of the comparison.
            engine_args: Arguments of `LLM`, without the arm's.
            served: Whether the engine core runs in its own process, as under ``vllm serve``.
                Otherwise it advances only when a command calls ``step()``. The model runs in the
                same kind of process either way.
            env: Further environment variables.
        """
        self.arm = arm
        handle, log_name = tempfile.mkstemp(prefix=f"vllm-sparse-{arm.name}-", suffix=".log")
        self._log_path = Path(log_name)
        read_end, write_end = os.pipe()
        arguments = {**engine_args, **arm.engine_args(engine_args)}
        if not served:
            # Only in a process that vLLM starts does it bind the threads to cores.
            arguments.setdefault("distributed_executor_backend", "mp")
        started = time.perf_counter()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker"],
            stdin=subprocess.PIPE,
            stdout=handle,
            stderr=subprocess.STDOUT,
            pass_fds=(write_end,),
            start_new_session=True,
            cwd=Path(__file__).parent.parent,
            env=_environment(served, env or {}),
            text=True,
        )
        os.close(write_end)
        os.close(handle)
        self._replies = os.fdopen(read_end)
        self._send({"module": module, "engine_args": arguments, "reply_fd": write_end})
        self._receive()
        self.start_seconds = time.perf_counter() - started

    @property
    def group(self) -> int:
        """Process group of the worker and everything that it started."""
        return self._process.pid

    def call(self, command: str, **arguments):
        """Runs a command in the worker and returns its result."""
        self._send({"command": command, "arguments": arguments})
        return self._receive()

    def pause(self) -> None:
        """Stops all of the worker's processes, so that it takes no time from another one."""
        os.killpg(self.group, signal.SIGSTOP)

    def resume(self) -> None:
        """Continues after `pause`."""
        os.killpg(self.group, signal.SIGCONT)

    @contextlib.contextmanager
    def running(self):
        """Lets a paused worker run inside the ``with`` block."""
        self.resume()
        try:
            yield self
        finally:
            with contextlib.suppress(ProcessLookupError):
                self.pause()

    def log(self) -> str:
        """Returns everything that the engine has printed."""
        return self._log_path.read_text(errors="replace")

    def close(self) -> None:
        """Ends the worker and everything that it started."""
        with contextlib.suppress(OSError):
            self.resume()
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.group, signal.SIGKILL)
        self._process.wait()
        self._replies.close()
        self._log_path.unlink(missing_ok=True)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _send(self, message: dict) -> None:
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failure("it has ended") from None

    def _receive(self):
        line = self._replies.readline()
        if not line:
            raise self._failure("it ended without an answer")
        reply = json.loads(line)
        if "error" in reply:
            raise self._failure(reply["error"])
        return reply["result"]

    def _failure(self, reason: str) -> WorkerError:
        tail = "\n".join(self.log().splitlines()[-40:])
        self.close()
        return WorkerError(f"{tail}\nthe worker of arm {self.arm.name} failed: {reason}")


def _environment(served: bool, extra: dict[str, str]) -> dict[str, str]:
    cores = ",".join(str(core) for core in sorted(os.sched_getaffinity(0)))
    defaults = {
        # Without it vLLM leaves one core to the API server, and decoding takes twice as long.
        "VLLM_CPU_OMP_THREADS_BIND": cores,
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    fixed = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1" if served else "0"}
    return {**defaults, **os.environ, **fixed, **extra}


class Neighbours:
    """How much of the machine processes other than the benchmark's use.

    Args:
        workers: The benchmark's workers; their processes and this one are not neighbours.
        patience_s: How long `wait` waits in all for a quiet machine.
    """

    QUIET_CORES = 0.15

    def __init__(self, workers: list[Worker], patience_s: float) -> None:
        self._groups = {os.getpgrp(), *(worker.group for worker in workers)}
        self._patience_s = patience_s
        self._announced = False

    @contextlib.contextmanager
    def observed(self, into: list[float]):
        """Appends the cores that neighbours used on average during the ``with`` block."""
        begin, ticks = time.perf_counter(), self._ticks()
        yield
        elapsed = (time.perf_counter() - begin) * os.sysconf("SC_CLK_TCK")
        into.append(round(max(0.0, self._ticks() - ticks) / elapsed, 3))

    def wait(self) -> None:
        """Returns when the neighbours are quiet, or when patience is used up."""
        while self._patience_s > 0:
            used: list[float] = []
            with self.observed(used):
                time.sleep(0.3)
            if used[0] < self.QUIET_CORES:
                return
            if not self._announced:
                progress(f"waiting for a quiet machine: others use {used[0]:.1f} cores")
                self._announced = True
            time.sleep(1.0)
            self._patience_s -= 1.3

    def _ticks(self) -> int:
        """Clock ticks that all cores spent on others so far, stolen time included."""
        fields = [int(value) for value in Path("/proc/stat").read_text().split("\n")[0].split()[1:]]
        user, nice, system, _idle, _iowait, irq, softirq, steal = fields[:8]
        busy = user + nice + system + irq + softirq + steal
        own = 0
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    stat = (entry / "stat").read_text().rpartition(")")[2].split()
                    if int(stat[2]) in self._groups:
                        own += int(stat[11]) + int(stat[12])
        return busy - own
