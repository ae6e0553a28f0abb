# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Runs engines in processes of their own without importing vLLM in each.

Importing vLLM takes several times as long as a short run. So a process for each environment imports
it once and forks for every job.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

# An environment in which there is a pretended GPU.
PRETENDED_GPU = "TESTS_PRETEND_GPU"
_IMPORTED = ("vllm.entrypoints.llm", "vllm.model_executor.models.llama")
_WORKERS = ("vllm.v1.worker.cpu_worker", "vllm.v1.worker.gpu_worker")
_MOST_PROCESSES = 3
_processes: dict[frozenset[tuple[str, str]], subprocess.Popen[str]] = {}


def run_forked(module: str, job: object, environment: dict[str, str], timeout: float) -> str:
    """Call ``serve(job)`` of a module in a new process.

    Args:
        module: Importable with ``tests`` on the path.
        job: Anything that JSON can hold.
        environment: Added to this process's; it holds from the first import on.
        timeout: Seconds.

    Returns:
        What was printed.

    Raises:
        RuntimeError: The call raised, took too long or took its process down; with the log's end.
    """
    process = _process({**os.environ, **environment})
    assert process.stdin is not None
    assert process.stdout is not None
    with tempfile.NamedTemporaryFile("r", errors="replace") as log:
        print(json.dumps([module, job, int(timeout), log.name]), file=process.stdin, flush=True)
        status = process.stdout.readline().strip() or "none: vLLM could not be imported"
        text = log.read()
    if status != "0":
        raise RuntimeError(f"engine failed with status {status}:\n{text[-6000:]}")
    return text


def _process(environment: dict[str, str]) -> subprocess.Popen[str]:
    """The process with this environment; those used last are kept."""
    environment.pop("PYTEST_CURRENT_TEST", None)
    key = frozenset(environment.items())
    process = _processes.pop(key, None)
    if process is None or process.poll() is not None:
        process = subprocess.Popen(
            [sys.executable, __file__],
            env={**environment, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
    _processes[key] = process
    if len(_processes) > _MOST_PROCESSES:
        _processes.pop(next(iter(_processes))).communicate()
    return process


def _fork_for_every_job() -> None:
    answers = os.fdopen(os.dup(1), "w")
    sys.path[0] = str(Path(__file__).parents[1])
    os.dup2(2, 1)  # whatever is printed while importing is no answer
    if os.environ.get(PRETENDED_GPU):
        importlib.import_module("support.gpu_walk").install()
    elif os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1":
        _interpret_triton()
    if os.environ.get("TRITON_INTERPRET") == "1" and not os.environ.get(PRETENDED_GPU):
        adversary = importlib.import_module("support.adversary")
        adversary.install()
        adversary.poison_scratch()
        interpreter = importlib.import_module("support.interpreter")
        interpreter.round_to_fp8_as_gpus_do()
        interpreter.patch_language_once_per_launch()
    for name in (*_IMPORTED, _WORKERS[PRETENDED_GPU in os.environ]):
        importlib.import_module(name)
    gc.freeze()  # or every child would collect all that was imported, several times
    for line in sys.stdin:
        child = os.fork()
        if not child:
            _run(*json.loads(line))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)
    os._exit(0)


def _run(module: str, job: object, timeout: int, log: str) -> None:
    """Ends the process; without the interpreter's clean-up, which takes a second."""
    signal.alarm(timeout)
    for descriptor in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), descriptor)
    status = 1
    try:
        importlib.import_module(module).serve(job)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        os._exit(status)


def _interpret_triton() -> None:
    """Model Runner V2 needs Triton, whose CPU stand-in is its interpreter."""
    import types

    from triton.backends import backends

    class Driver:
        @staticmethod
        def is_active() -> bool:
            return True

    backends["cpu"] = types.SimpleNamespace(driver=Driver, compiler=None)


if __name__ == "__main__":
    _fork_for_every_job()
