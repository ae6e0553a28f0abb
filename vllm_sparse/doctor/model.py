# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Whether this machine can serve a model, and which backends refuse it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_sparse.device_room import weight_bytes
from vllm_sparse.errors import ConfigError
from vllm_sparse.kv.host.memory import available_bytes
from vllm_sparse.machine.findings import error, fine, warning
from vllm_sparse.planner.devices import CPU, Device
from vllm_sparse.planner.model import Model, read_model
from vllm_sparse.planner.plan import Question, answer
from vllm_sparse.registry import entries

if TYPE_CHECKING:
    from vllm_sparse.machine.findings import Finding

CONTEXT, OUTPUT = 32768, 256
_GIB = 1 << 30


def model_findings(name: str) -> list[Finding]:
    """Its weights against memory, and what each backend says to it.

    Args:
        name: See :func:`read_model`.
    """
    try:
        model = read_model(name)
    except ConfigError as problem:
        return [error("model", str(problem), "nothing can be said about it", "give another path")]
    longest = min(model.max_model_len, CONTEXT + OUTPUT)
    model = Model(model.folder, model.config, longest)
    backends = [_backend(model, name, backend) for backend in entries()]
    return [_weights(model), *backends]


def _weights(model: Model) -> Finding:
    taken, free = weight_bytes(model), available_bytes()
    place = "host memory"
    if torch.cuda.is_available():
        free, place = torch.cuda.mem_get_info()[0], "the first GPU"
    what = (
        f"weights of {model.architecture} take {taken / _GIB:.2f} GiB; "
        f"{free / _GIB:.2f} GiB of {place} are free"
    )
    if taken > free:
        return error(
            "model",
            what,
            "it cannot be loaded",
            "spread it (--tensor-parallel-size), or take a smaller one",
        )
    return fine("model", what)


def _backend(model: Model, name: str, backend: str) -> Finding:
    device, memory = CPU, 0
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory
        newest = 3 if torch.cuda.get_device_capability(0) >= (9, 0) else 2
        device = Device(
            torch.cuda.get_device_name(0), memory / _GIB, 1e12, 24e9, flash_attention=newest
        )
    context = max(model.max_model_len - OUTPUT, 1)
    host = available_bytes()
    # What is left on a CPU is vLLM's to choose; here only refusals are asked for.
    pool = None if memory else 4 * _GIB
    arm = answer(
        Question(
            model,
            name,
            context,
            model.max_model_len - context,
            1,
            device,
            memory,
            host,
            kv_bytes=pool,
        ),
        backend,
    )
    if arm.refused:
        others = "use another backend, or leave out --attention-backend"
        return warning(
            "model", f"{backend} refuses it: {'; '.join(arm.refused)}", "it would not start", others
        )
    host_pool = (
        f"; host pool of one request {arm.host_bytes / _GIB:.2f} GiB" if arm.host_bytes else ""
    )
    return fine("model", f"{backend} serves {context} tokens: {arm.kept}{host_pool}")
