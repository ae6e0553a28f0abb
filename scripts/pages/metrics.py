# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: The vllm-sparse authors
"""Tables of the metrics, of the dashboard's panels and of the alerts, from what defines them."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from benchmarks.tables import table
from vllm_sparse.metrics.definitions import METRICS

if TYPE_CHECKING:
    from vllm_sparse.metrics.definitions import Family

GRAFANA = Path(__file__).parents[2] / "grafana"
DASHBOARD, ALERTS = GRAFANA / "vllm-sparse.json", GRAFANA / "alerts.yml"


def of_family(family: Family | None) -> str:
    """The metrics of a family; ``None``: those that all have."""
    return table(
        [metric for metric in METRICS.values() if metric.family == family],
        {
            "metric": lambda metric: f"`{metric.series}{'{reason}' if metric.reasons else ''}`",
            "type": lambda metric: "gauge" if metric.gauge else "counter",
            "unit": lambda metric: metric.unit,
            "added over ranks": lambda metric: "yes" if metric.per_rank else "",
            "meaning": lambda metric: metric.meaning,
        },
    )


def reasons() -> str:
    """Values of the label ``reason``."""
    return table(
        [(metric, reason) for metric in METRICS.values() for reason in metric.reasons],
        {
            "metric": lambda found: f"`{found[0].name}`",
            "reason": lambda found: f"`{found[1].value}`",
            "counted by": lambda found: found[1].family or "all",
            "when": lambda found: found[1].meaning,
        },
    )


def dashboard() -> list[dict[str, Any]]:
    """The panels that show something."""
    panels: list[dict[str, Any]] = json.loads(DASHBOARD.read_text())["panels"]
    return [panel for panel in panels if panel["type"] != "row"]


def panels() -> str:
    """What the dashboard shows."""
    return table(dashboard(), {"panel": "title", "what to look for": "description"})


def rules() -> list[dict[str, Any]]:
    """The rules of all groups."""
    groups = yaml.safe_load(ALERTS.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def alerts() -> str:
    """When somebody is called, and what to do."""

    def summary(rule: dict[str, Any]) -> str:
        text: str = rule["annotations"]["summary"]
        return text.replace("{{ $labels.instance }}", "a server")

    return table(
        rules(),
        {
            "alert": "alert",
            "when": lambda rule: f"{summary(rule)}, for {rule['for']}",
            "what to do": lambda rule: rule["annotations"]["description"],
        },
    )


TABLES = {
    "metrics": partial(of_family, None),
    "metrics-policies": partial(of_family, "policies"),
    "metrics-sparda": partial(of_family, "SPARDA"),
    "metrics-reasons": reasons,
    "metrics-panels": panels,
    "metrics-alerts": alerts,
}
