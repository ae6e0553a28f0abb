# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""All that is looked at, in the order in which it is said."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_sparse.doctor.probe import MODEL, THOROUGH
from vllm_sparse.kv.host.memory import available_bytes, container_limit
from vllm_sparse.machine.cores import core_findings, quota
from vllm_sparse.machine.findings import Finding, fine, warning
from vllm_sparse.machine.imports import import_findings
from vllm_sparse.machine.kernels import kernel_findings, on_gpu
from vllm_sparse.machine.memory import cache_finding, memory_findings
from vllm_sparse.machine.observe import Probe
from vllm_sparse.machine.plugin import plugin_findings
from vllm_sparse.machine.versions import version_findings

if TYPE_CHECKING:
    from vllm_sparse.machine.observe import Observed

PROBE = "vllm_sparse.doctor.probe"
QUICK_S, THOROUGH_S = 3.5, 180.0
MODEL_S = 30.0  # more, for the model that was asked about


def examine(model: str | None = None, thorough: bool = False) -> list[Finding]:
    """Looks at this machine.

    Args:
        model: Also at this model: see :func:`vllm_sparse.planner.model.read_model`.
        thorough: Also compiles kernels, and loads vLLM with the plugin as a server does.
    """
    arguments = [*([THOROUGH] if thorough else []), *([MODEL, model] if model else [])]
    probe = Probe(PROBE, tuple(arguments), THOROUGH_S if thorough else QUICK_S)
    findings = [*version_findings(), *plugin_findings()]
    observed = probe.collect(*(("model", MODEL_S) if model else ()))
    gpu = on_gpu(observed)
    return [
        *findings,
        *import_findings(observed),
        *kernel_findings(observed),
        cache_finding(),
        *memory_findings(available_bytes(), container_limit(), gpu),
        *core_findings(gpu, quota()),
        *(_of_model(observed) if model else ()),
    ]


def _of_model(observed: Observed) -> list[Finding]:
    found = observed.facts.get("model", {})
    if "findings" in found:
        return [Finding(*each) for each in found["findings"]]
    if "error" in found:
        return [
            warning(
                "model", f"not looked at: {found['error']}", "what reads it failed",
                "mend the errors above first; is it a decoder's config.json?",
            )
        ]  # fmt: skip
    return [fine("model", "not looked at: the time was up; --thorough waits")]
