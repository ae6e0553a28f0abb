# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Runs engines in processes of their own without importing vLLM in each.

Importing vLLM takes several times as long as a short run. So a process of each kind imports it once
and forks for every job.
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
import warnings
from pathlib import Path

# An environment in which there is a pretended GPU.
PRETENDED_GPU = "TESTS_PRETEND_GPU"
VLLM = (
    "vllm.distributed.elastic_ep.elastic_execute",
    "vllm.entrypoints.llm",
    "vllm.model_executor.model_loader.base_loader",
    "vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors",
    "vllm.model_executor.layers.quantization.online.base",
    "vllm.model_executor.models.llama",
    "vllm.plugins.lora_resolvers.hf_hub_resolver",
    "vllm.v1.attention.backends.cpu_attn",
    "vllm.v1.core.sched.scheduler",
    "vllm.v1.pool.flash_maxsim",
    "vllm.v1.worker.cpu_worker",
)
_VLLM_ON_GPUS = (
    "vllm.entrypoints.llm",
    "vllm.model_executor.models.llama",
    "vllm.v1.worker.gpu_worker",
)
# What is imported depends on these; everything else of an environment can wait for the fork.
_READ_AT_IMPORT = (
    PRETENDED_GPU,
    "HF_HUB_OFFLINE",
    "TRANSFORMERS_OFFLINE",
    "TRITON_INTERPRET",
    "VLLM_USE_V2_MODEL_RUNNER",
)
_processes: dict[tuple[str, ...], subprocess.Popen[str]] = {}


def run_forked(
    module: str,
    job: object,
    environment: dict[str, str],
    timeout: float,
    imported: tuple[str, ...] = VLLM,
) -> str:
    """Call ``serve(job)`` of a module in a new process.

    Args:
        module: Importable with ``tests`` on the path.
        job: Anything that JSON can hold.
        environment: Added to this process's.
        timeout: Seconds.
        imported: Modules that it finds imported.

    Returns:
        What was printed.

    Raises:
        RuntimeError: The call raised, took too long or took its process down; with the log's end.
    """
    own = {**os.environ, "PYTHONUNBUFFERED": "1"}
    own.pop("PYTEST_CURRENT_TEST", None)
    early = {k: v for k, v in environment.items() if k in _READ_AT_IMPORT}
    if PRETENDED_GPU in early and imported is VLLM:
        imported = _VLLM_ON_GPUS
    process = _process(imported, early, own)
    assert process.stdin is not None
    assert process.stdout is not None
    with tempfile.NamedTemporaryFile("r", errors="replace") as log:
        order = [module, job, {**own, **environment}, int(timeout), log.name]
        print(json.dumps(order), file=process.stdin, flush=True)
        status = process.stdout.readline().strip() or "none: vLLM could not be imported"
        text = log.read()
    if status != "0":
        raise RuntimeError(f"engine failed with status {status}:\n{text[-6000:]}")
    return text


def _process(
    imported: tuple[str, ...], early: dict[str, str], own: dict[str, str]
) -> subprocess.Popen[str]:
    """The process that has imported these modules in an environment with these values."""
    kind = (*imported, *(f"{name}={value}" for name, value in sorted(early.items())))
    process = _processes.get(kind)
    if process is None or process.poll() is not None:
        process = _processes[kind] = subprocess.Popen(
            [sys.executable, __file__, *imported],
            env={**own, **early},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
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
        importlib.import_module("support.interpreter").install()
    for name in sys.argv[1:]:
        importlib.import_module(name)
    if "vllm.v1.worker.cpu_worker" in sys.modules:
        _prepare_worker()
    gc.freeze()  # or every child would collect all that was imported, several times
    gc.unfreeze = lambda: None  # as vLLM does before it ends
    for line in sys.stdin:
        child = os.fork()
        if not child:
            _run(*json.loads(line))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)
    os._exit(0)


def _run(module: str, job: object, environment: dict[str, str], timeout: int, log: str) -> None:
    """Ends the process; without the interpreter's clean-up, which takes a second."""
    signal.alarm(timeout)
    os.environ.update(environment)
    sys.path[1:1] = [at for at in environment.get("PYTHONPATH", "").split(os.pathsep) if at]
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


def _prepare_worker() -> None:
    """Do once what every worker would do again, with the same outcome."""
    from vllm.config.logging import LoggingConfig
    from vllm.logger import configure_logging_if_needed
    from vllm.platforms import current_platform

    from vllm_sparse.registry import entries

    entries.cache_clear()  # a job's path may have packages with policies
    configure_logging_if_needed(LoggingConfig())
    if current_platform.is_cpu():
        with warnings.catch_warnings(action="ignore"):  # it looks at all names of all modules
            current_platform.register_triton_kernel_overrides()
        type(current_platform).register_triton_kernel_overrides = classmethod(lambda cls: None)


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
