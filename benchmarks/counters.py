# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""vLLM's and the plugin's metrics of an engine that lives in this process."""

from __future__ import annotations

from prometheus_client import CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector


def metrics(llm) -> dict[str, float]:
    """Returns the current value of every counter and gauge, by name (and reason, if it has one)."""
    values = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
    return {**values, **_plugin(llm)}


def sparse(llm) -> dict[str, float]:
    """Returns only the plugin's counters, and vLLM's counter of preemptions."""
    return {
        name: value
        for name, value in metrics(llm).items()
        if name.startswith("vllm:sparse") or name == "vllm:num_preemptions"
    }


def _plugin(llm) -> dict[str, float]:
    """Reads the counters that the plugin's processes share through files."""
    from vllm_sparse.metrics import folder

    source = folder(llm.llm_engine.vllm_config.instance_id)
    if not source.is_dir():
        return {}
    values = {}
    for metric in MultiProcessCollector(CollectorRegistry(), path=str(source)).collect():
        for sample in metric.samples:
            reason = sample.labels.get("reason")
            values[f"{sample.name}{{{reason}}}" if reason else sample.name] = sample.value
    return values
