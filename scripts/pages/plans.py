# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Tables of what is expected: by ``vllm-sparse plan``, of ROCKETKV's prompts, of a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.gpu import verdicts
from benchmarks.gpu.shapes import LLAMA, config_of
from benchmarks.tables import table
from vllm_sparse.planner.bounds import split_by
from vllm_sparse.planner.devices import DEVICES
from vllm_sparse.planner.model import Model
from vllm_sparse.planner.plan import Arm, Question, answer
from vllm_sparse.policies.making import make_policy
from vllm_sparse.policies.protocol import Shape
from vllm_sparse.policies.rocketkv import RocketKVSettings

_GIB = 1 << 30
_FURTHEST = 131072
_OUTPUT, _REQUESTS, _HOST_GIB = 256, 8, 400
_PLANNED = (4096, 8192, 16384, 32768, 65536, _FURTHEST - _OUTPUT)
_KEPT = (4096, 8192, 16384, 32768, 65536, 131072)
_BUDGETS = (512, 1024, 2048)


def planned(context: int) -> dict[str, Arm]:
    """What the command says of Llama 3.1 8B's shape on an H100, by backend.

    Args:
        context: Tokens of a prompt.
    """
    model = Model(Path("/nowhere"), config_of(LLAMA, _FURTHEST), context + _OUTPUT)
    device = DEVICES["h100"]
    question = Question(
        model, "DIR", context, _OUTPUT, _REQUESTS, device, int(device.memory_gib * _GIB),
        _HOST_GIB * _GIB,
    )  # fmt: skip
    return {name: answer(question, name) for name in ("dense", "ROCKETKV", "SPARDA")}


def gains() -> str:
    """Memory and steps by length of the prompt."""

    def sizes(row: Any) -> str:
        said = ", ".join(f"{arm.request_bytes / _GIB:.2f}" for arm in row["arms"].values())
        return f"{said} GiB"

    def steps(row: Any) -> str:
        return ", ".join(f"{row['arms'][name].speedup:.2g}x" for name in ("ROCKETKV", "SPARDA"))

    def held(row: Any) -> str:
        return (
            "some"
            if row["arms"]["SPARDA"].host_bytes
            else "all: nothing is fetched, no memory saved"
        )

    rows = [{"context": context, "arms": planned(context)} for context in _PLANNED]
    columns = {
        "prompt tokens": "{context:,}",
        "device memory of a request: dense, ROCKETKV, SPARDA": sizes,
        "decode step against dense: ROCKETKV, SPARDA": steps,
        "SPARDA's blocks that have a frame": held,
    }
    return table(rows, columns)


def kept() -> str:
    """Tokens that ROCKETKV keeps of a prompt."""
    shape = Shape(128, 4, 64, 1 << 20)
    rows = []
    for budget in _BUDGETS:
        policy = make_policy("ROCKETKV", RocketKVSettings(token_budget=budget), shape)
        held = {str(context): split_by(policy, context).held for context in _KEPT}
        rows.append({"t": budget, **held})
    columns = {f"of {context // 1024}K": f"{{{context}:,}}" for context in _KEPT}
    return table(rows, {"t": "{t:,}", **columns})


def targets() -> str:
    """What the programs for GPUs compare times with."""
    rows = [target._asdict() for target in verdicts.targets({})]
    return table(rows, {"target": "what", "wanted": verdicts.wanted})


TABLES = {"plan-gains": gains, "rocketkv-kept": kept, "gpu-targets": targets}
