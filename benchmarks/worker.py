# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Engines in processes of their own, driven command by command.

The process gets JSON lines on stdin: the first says how to build the engine and where to answer;
every further one is a command, a function of `benchmarks.commands`. Answers go to a pipe, because
engines print. An arm of another checkout runs that one's worker and commands, so that before and
after can take turns.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import harness

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from benchmarks.arms import Arm


class WorkerError(RuntimeError):
    """A worker failed; the message carries the end of its log."""


class Worker:
    """One arm's engine in a subprocess; use it in a ``with`` statement.

    Attributes:
        arm: The side of the comparison.
        start_seconds: How long the engine took to start.
    """

    def __init__(self, arm: Arm, engine_args: dict, *, served: bool = False) -> None:
        """Starts the engine and waits until it is ready.

        Args:
            arm: The side of the comparison.
            engine_args: Arguments of `LLM`, without the arm's.
            served: Whether the engine core runs in its own process, as under ``vllm serve``.
                Otherwise it advances only when a command calls ``step()``. The model runs in the
                same kind of process either way.
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
            [arm.python, "-m", "benchmarks.worker"], stdin=subprocess.PIPE, stdout=handle,
            stderr=subprocess.STDOUT, pass_fds=(write_end,), start_new_session=True,
            cwd=arm.folder, env=_environment(served), text=True,
        )  # fmt: skip
        os.close(write_end)
        os.close(handle)
        self._replies = os.fdopen(read_end)
        self._send({"engine_args": arguments, "reply_fd": write_end})
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


@contextlib.contextmanager
def alive(
    arms: Iterable[Arm], arguments: dict, prepare: Callable[[Worker], object] = lambda _: None
) -> Iterator[list[Worker]]:
    """Engines of all arms at once, paused: each runs within `Worker.running` only.

    Args:
        arms: The sides of the comparison.
        arguments: Arguments of `LLM`, without the arms'.
        prepare: Called with each one before the next one starts.
    """
    with contextlib.ExitStack() as stack:
        workers: list[Worker] = []
        for arm in arms:
            workers.append(stack.enter_context(Worker(arm, arguments)))
            prepare(workers[-1])
            workers[-1].pause()
            harness.progress(f"{arm.name} is up after {workers[-1].start_seconds:.0f} s")
        yield workers


def _environment(served: bool) -> dict[str, str]:
    cores = ",".join(str(core) for core in sorted(os.sched_getaffinity(0)))
    defaults = {
        # Without it vLLM leaves one core to the API server, and decoding takes twice as long.
        "VLLM_CPU_OMP_THREADS_BIND": cores,
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    fixed = {**harness.ALIKE, "VLLM_ENABLE_V1_MULTIPROCESSING": "1" if served else "0"}
    return {**defaults, **os.environ, **fixed}


def main() -> None:
    """The process: builds the engine, then answers commands until stdin is closed."""
    job = json.loads(sys.stdin.readline())
    with os.fdopen(job["reply_fd"], "w") as replies:

        def answer(message: dict) -> None:
            replies.write(json.dumps(message) + "\n")
            replies.flush()

        try:
            from vllm import LLM

            from benchmarks import commands

            llm = LLM(**job["engine_args"])
        except Exception as error:
            traceback.print_exc()
            answer({"error": f"the engine did not start: {error}"})
            return
        answer({"result": "ready"})
        for line in sys.stdin:
            request = json.loads(line)
            try:
                result = getattr(commands, request["command"])(llm, **request["arguments"])
            except Exception as error:
                traceback.print_exc()
                answer({"error": f"{request['command']}: {error}"})
            else:
                answer({"result": result})


if __name__ == "__main__":
    main()
